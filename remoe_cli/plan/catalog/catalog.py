"""The catalog: menus, prices and quotas as data, each with its date, region and source.

A catalog is a TOML file. Exactly one `[[provenance]]` entry names each field of its tables, so that no figure enters a plan without a
source. Memory is in MB of 2**20 bytes, as on AWS Lambda, and prices are per GB of 1024 MB.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from remoe_cli.artifacts import NonNegative, Part, Positive
from remoe_cli.plan.document import MainSpec, Source
from remoe_cli.provenance import Provenance, check_provenance, read_figures, read_figures_file, shipped_names

PositiveInt = Annotated[int, Field(gt=0, le=2**40)]
Few = Annotated[int, Field(gt=0, le=256)]
Architecture = Literal["x86_64", "arm64"]
_SHIPPED = ("remoe_cli.plan.catalog", "data")


class FunctionSide(Part):
    """What an expert function may be, and what it costs.

    memory_menu_mb         memory specs (m_1..m_Ve in the paper), ascending
    usd_per_gb_second      price of memory x billed time (c_c), by architecture
    usd_per_request        fee of one invocation
    usd_per_storage_gb_second   price of a function's /tmp x billed time, beyond the free part; none where experts are not fetched to it
    storage_free_mb        /tmp that every function has
    storage_spare_mb       /tmp that a function is given beside its experts
    bytes_per_read         bytes of one read of S3 in a cold start; 0 where experts are not read from S3
    log_bytes_per_call     what is logged of one invocation, of an expert function or a main function paid by use; 0 where that is free
    billing_granularity_ms billed time is rounded up to a multiple of this, per invocation
    mb_per_vcpu            memory that comes with one vCPU
    max_useful_vcpus       vCPUs beyond which one expert function gets no faster
    payload_limit_bytes    largest request, and largest response, of one synchronous invocation (U)
    wire_expansion         bytes on the wire per byte of hidden state (base64: 4/3)
    max_replicas           instances of one layer's function that work side by side (z_max)
    max_functions          functions among which one layer's remote experts may be divided
    concurrency_limit      instances of all functions together that may work at once
    timeout_s              longest invocation
    warm_unbilled_s        what a warm invocation takes outside the function, for a small payload (t_rem with the next)
    warm_billed_s          what it takes inside besides computing: this is billed
    network_bytes_per_s    rate at which payloads pass between main and expert function, on the wire (B)
    cold_start_s           from the call to the first result of an instance that has to be started, besides reading its experts
    load_bytes_per_s       rate at which a starting instance reads its experts
    idle_ttl_s             an instance that had no call for so long is gone
    runtime_memory_mb      what interpreter and libraries take before any expert
    expert_memory_factor   bytes of memory per stored byte of an expert
    """

    memory_menu_mb: tuple[PositiveInt, ...] = Field(min_length=1, max_length=1024)
    usd_per_gb_second: dict[Architecture, NonNegative]
    usd_per_request: NonNegative
    usd_per_storage_gb_second: NonNegative = 0.0
    storage_free_mb: NonNegative = 0.0
    storage_spare_mb: NonNegative = 0.0
    bytes_per_read: NonNegative = 0.0
    log_bytes_per_call: NonNegative = 0.0
    billing_granularity_ms: Positive
    mb_per_vcpu: Positive
    max_useful_vcpus: Positive
    payload_limit_bytes: PositiveInt
    wire_expansion: Annotated[float, Field(ge=1, le=1e6)]
    max_replicas: Few
    max_functions: Few
    concurrency_limit: PositiveInt
    timeout_s: Positive
    warm_unbilled_s: NonNegative
    warm_billed_s: NonNegative
    network_bytes_per_s: Positive
    cold_start_s: NonNegative
    load_bytes_per_s: Positive
    idle_ttl_s: Positive
    runtime_memory_mb: NonNegative
    expert_memory_factor: Annotated[float, Field(ge=1, le=1e6)]

    @field_validator("memory_menu_mb")
    @classmethod
    def _ascending(cls, menu: tuple[int, ...]) -> tuple[int, ...]:
        if list(menu) != sorted(set(menu)):
            raise ValueError("must ascend without repeats")
        return menu


class MainSide(Part):
    """What the main function may be.

    menu                            specs with unique names: those paid by use first, ascending in memory
    usd_per_gb_second               price of CPU memory (c_c), by architecture
    usd_per_request                 fee of one request to a main function paid by use
    usd_per_accelerator_gb_second   price of accelerator memory (c_g) beside a main function paid by use; 0 means that it has none
                                    and that the non-expert modules live in CPU memory too
    runtime_memory_mb               what the interpreter, torch and transformers take before any weight
    gpu_hidden_share                share of an instance's nominal GPU memory that no program is given: error correction, the driver
    gpu_runtime_memory_mb           what CUDA and its libraries take of the rest before any weight
    gpu_load_factor                 beside a GPU, most bytes of CPU memory for each byte of the experts in it, while they are loaded
    cold_start_s                    from the request to a main function paid by use that can begin to read the model
    load_bytes_per_s                rate at which it reads the model
    bytes_per_read                  bytes of one read of S3 when it starts; 0 where it does not read the model from S3
    usd_per_storage_gb_second       price of its /tmp, as large as its memory, beyond what functions have free; none where it needs none
    timeout_s                       longest request to a main function paid by use
    serverless_concurrency          most requests that one main function which is paid by use, or scales to zero, serves at once; none where
                                    nothing limits it
    rented_timeout_s                longest request to a rented instance; none where nothing ends it
    """

    menu: tuple[MainSpec, ...] = Field(min_length=1, max_length=1024)
    usd_per_gb_second: dict[Architecture, NonNegative]
    usd_per_request: NonNegative
    usd_per_accelerator_gb_second: NonNegative
    runtime_memory_mb: NonNegative
    gpu_hidden_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gpu_runtime_memory_mb: NonNegative = 0.0
    gpu_load_factor: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    cold_start_s: NonNegative
    load_bytes_per_s: Positive
    bytes_per_read: NonNegative = 0.0
    usd_per_storage_gb_second: NonNegative = 0.0
    timeout_s: Positive
    serverless_concurrency: PositiveInt | None = None
    rented_timeout_s: Positive | None = None

    def concurrency_of(self, main: MainSpec) -> int | None:
        """Look up how many requests one instance of a main function may serve at once.

        None where nothing limits it.
        """
        return self.serverless_concurrency if main.starts else None

    def usable_gpu_mb(self, gpu_memory_mb: float) -> float:
        """Compute how much of a GPU's nominal memory is left for weights, KV cache and hidden states."""
        return max(0.0, gpu_memory_mb * (1 - self.gpu_hidden_share) - self.gpu_runtime_memory_mb)

    @field_validator("menu")
    @classmethod
    def _sound(cls, menu: tuple[MainSpec, ...]) -> tuple[MainSpec, ...]:
        figures = [(spec.memory_mb, spec.vcpus, spec.gpu_memory_mb, spec.usd_per_hour) for spec in menu]
        if any(figure is not None and figure <= 0 for row in figures for figure in row):
            raise ValueError("memory_mb, vcpus, gpu_memory_mb and usd_per_hour must be above 0")
        by_use = [spec for spec in menu if spec.usd_per_hour is None]
        if len({spec.vcpus is None for spec in by_use}) > 1 or any(spec.vcpus is None for spec in menu if spec.usd_per_hour is not None):
            raise ValueError("must give vcpus for every instance, and for every spec that is paid by use or for none")
        if any(spec.scales_to_zero and spec.usd_per_hour is None for spec in menu):
            raise ValueError("must give usd_per_hour for every spec that scales to zero: what an hour costs while it is up")
        if any(spec.gpu_memory_mb is not None for spec in by_use):
            raise ValueError("gives gpu_memory_mb to a spec that is paid by use; its price is usd_per_accelerator_gb_second")
        memories = [spec.memory_mb for spec in by_use]
        if memories != sorted(set(memories)) or len({spec.name for spec in menu}) < len(menu) or list(menu[: len(by_use)]) != by_use:
            raise ValueError("must list specs that are paid by use first, ascending in memory_mb, without repeats of memory_mb or name")
        return menu


class ScaleToZero(Part):
    """How instances that scale to zero are bought: by the hour while they are up, and by the request.

    idle_s             an instance that had no request for so long is given back
    wake_s             from a request that finds none to a main function that can begin to read the model; paid as if it were up
    load_bytes_per_s   rate at which it reads the model
    usd_per_request    fee of one request
    storage_mb         of its part of the model that it can fetch to /tmp
    timeout_s          longest request, without the time that waking takes
    """

    idle_s: Positive
    wake_s: NonNegative
    load_bytes_per_s: Positive
    usd_per_request: NonNegative
    storage_mb: PositiveInt
    timeout_s: Positive


class Reference(Part):
    """What a plan is compared with: the whole model on a GPU or on CPUs (assess/baselines.py).

    hardware   description (profile/hardware) of the CPU, and of the GPU where `gpus` is empty
    gpus       instances that may hold a whole model; empty where GPU memory is bought by the GB-second
    """

    hardware: str
    gpus: tuple[MainSpec, ...] = ()

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, gpus: tuple[MainSpec, ...]) -> tuple[MainSpec, ...]:
        if any(spec.gpu_memory_mb is None or spec.usd_per_hour is None or spec.hardware is None for spec in gpus):
            raise ValueError("must give gpu_memory_mb, usd_per_hour and hardware of every instance")
        return gpus


class Storage(Part):
    """What keeping and reading the model costs, and what is logged.

    Keeping it is the same for every placement, used or not, so no plan contains that.

    usd_per_log_gb   of what is logged, when it is written
    """

    usd_per_gb_month: NonNegative
    usd_per_1000_reads: NonNegative
    usd_per_1000_writes: NonNegative
    usd_per_log_gb: NonNegative = 0.0


class Catalog(Part):
    """A catalog as `read_catalog` reads it.

    architecture   whose prices hold
    zero           how main functions are bought that scale to zero; None where the menu has none
    file           where the catalog comes from; `read_catalog` fills it in
    """

    schema_version: str = Field(pattern=r"^remoe\.catalog/2$")
    name: str
    architecture: Architecture
    function: FunctionSide
    main: MainSide
    reference: Reference
    storage: Storage
    zero: ScaleToZero | None = None
    provenance: tuple[Provenance, ...]
    file: Source

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Catalog:
        sides: dict[str, Part] = {"function": self.function, "main": self.main, "reference": self.reference, "storage": self.storage}
        check_provenance(sides if self.zero is None else sides | {"zero": self.zero}, self.provenance)
        if self.zero is None and any(spec.scales_to_zero for spec in self.main.menu):
            raise ValueError("no table [zero], which a main function that scales to zero needs")
        if missing := [side for side in ("function", "main") if self.architecture not in getattr(self, side).usd_per_gb_second]:
            raise ValueError(f"no {missing[0]}.usd_per_gb_second for the architecture {self.architecture}")
        return self

    @property
    def function_usd_per_gb_second(self) -> float:
        """Price of an expert function's memory (c_c)."""
        return self.function.usd_per_gb_second[self.architecture]

    @property
    def main_usd_per_gb_second(self) -> float:
        """Price of the main function's CPU memory."""
        return self.main.usd_per_gb_second[self.architecture]

    @property
    def oldest_price(self) -> date:
        """Date of the oldest figure that is a price. What is free does not age."""
        return min(entry.date for entry in self.provenance if any(self._is_price(field) for field in entry.of))

    def _is_price(self, field: str) -> bool:
        side, name = field.split(".")
        value = getattr(getattr(self, side), name)
        if isinstance(value, tuple):
            return any(isinstance(spec, MainSpec) and spec.usd_per_hour for spec in value)
        return name.startswith("usd_") and value != 0


def catalog_names() -> tuple[str, ...]:
    """List the names of the catalogs that come with remoe."""
    return shipped_names(*_SHIPPED)


def read_catalog(name: str) -> Catalog:
    """Read a catalog by name, or by path: a text with a `/` or that ends in `.toml`.

    >>> catalog = read_catalog("aws-us-east-1")
    >>> catalog.function.payload_limit_bytes, catalog.architecture
    (6291456, 'x86_64')

    Raises: UsageError when there is no such catalog, it is not TOML, or a field is unknown, missing or wrong.
    """
    return read_figures("catalog", Catalog, name, *_SHIPPED)


def catalog_text(name: str) -> str:
    """Read the TOML text of a catalog that `read_catalog` has accepted."""
    return read_figures_file("catalog", name, *_SHIPPED).decode("utf-8")
