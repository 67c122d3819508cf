"""The catalog: menus, prices and quotas as data, each with its date, region and source.

A catalog is a TOML file. Every field of its `[function]` and `[main]` tables must be named by exactly one `[[provenance]]`
entry, so that no figure enters a plan without saying where it comes from. Memory is in MB of 2**20 bytes, as on AWS Lambda,
and prices are per GB of 1024 MB.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from remoe_cli.plan.document import MainSpec, Source
from remoe_cli.sourced import Provenance, check_provenance, read_sourced, shipped_names

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
_SHIPPED = ("remoe_cli.plan", "catalogs")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FunctionSide(_Part):
    """What an expert function may be, and what it costs.

    memory_menu_mb         memory specs (m_1..m_Ve in the paper), ascending
    usd_per_gb_second      price of memory x billed time (c_c)
    usd_per_request        fee of one invocation
    billing_granularity_ms billed time is rounded up to a multiple of this, per invocation
    mb_per_vcpu            memory that comes with one vCPU
    max_useful_vcpus       vCPUs beyond which one expert function gets no faster
    payload_limit_bytes    largest request, and largest response, of one synchronous invocation (U)
    wire_expansion         bytes on the wire per byte of hidden state (base64: 4/3)
    max_replicas           instances of one layer's function that work side by side (z_max)
    warm_unbilled_s        what a warm invocation takes outside the function, for a small payload (t_rem with the next)
    warm_billed_s          what it takes inside besides computing: this is billed
    network_bytes_per_s    rate at which payloads pass between main and expert function, on the wire (B)
    runtime_memory_mb      what interpreter and libraries take before any expert
    expert_memory_factor   bytes of memory per stored byte of an expert
    """

    memory_menu_mb: tuple[PositiveInt, ...] = Field(min_length=1)
    usd_per_gb_second: NonNegative
    usd_per_request: NonNegative
    billing_granularity_ms: Positive
    mb_per_vcpu: Positive
    max_useful_vcpus: Positive
    payload_limit_bytes: PositiveInt
    wire_expansion: Annotated[float, Field(ge=1)]
    max_replicas: PositiveInt
    warm_unbilled_s: NonNegative
    warm_billed_s: NonNegative
    network_bytes_per_s: Positive
    runtime_memory_mb: NonNegative
    expert_memory_factor: Annotated[float, Field(ge=1)]

    @field_validator("memory_menu_mb")
    @classmethod
    def _ascending(cls, menu: tuple[int, ...]) -> tuple[int, ...]:
        if list(menu) != sorted(set(menu)):
            raise ValueError("must ascend without repeats")
        return menu


class MainSide(_Part):
    """What the main function may be.

    menu                            specs, ascending in memory, names unique
    usd_per_gb_second               price of CPU memory (c_c)
    usd_per_accelerator_gb_second   price of accelerator memory (c_g); 0 means that there is no accelerator and the non-expert
                                    modules live in CPU memory too
    runtime_memory_mb               what the interpreter, torch and transformers take before any weight
    """

    menu: tuple[MainSpec, ...] = Field(min_length=1)
    usd_per_gb_second: NonNegative
    usd_per_accelerator_gb_second: NonNegative
    runtime_memory_mb: NonNegative

    @field_validator("menu")
    @classmethod
    def _sound(cls, menu: tuple[MainSpec, ...]) -> tuple[MainSpec, ...]:
        if any(spec.memory_mb <= 0 or (spec.vcpus is not None and spec.vcpus <= 0) for spec in menu):
            raise ValueError("memory_mb and vcpus must be above 0")
        if len({spec.vcpus is None for spec in menu}) > 1:
            raise ValueError("must give vcpus for every spec or for none")
        memories = [spec.memory_mb for spec in menu]
        if memories != sorted(set(memories)) or len({spec.name for spec in menu}) < len(menu):
            raise ValueError("must ascend in memory_mb, without repeats of memory_mb or name")
        return menu


class Catalog(_Part):
    """A catalog as read; `file` is where it came from and is filled in by `read_catalog`."""

    schema_version: str = Field(pattern=r"^remoe\.catalog/1$")
    name: str
    function: FunctionSide
    main: MainSide
    provenance: tuple[Provenance, ...]
    file: Source

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Catalog:
        check_provenance({"function": FunctionSide, "main": MainSide}, self.provenance)
        return self


def catalog_names() -> tuple[str, ...]:
    """Names of the catalogs that come with remoe."""
    return shipped_names(*_SHIPPED)


def read_catalog(name: str) -> Catalog:
    """Read a catalog by name (one that comes with remoe) or by path (anything with a `/` or that ends in `.toml`).

    Raises UsageError when there is no such catalog, or it is not TOML, or a field is unknown, missing or has a bad value.
    """
    return read_sourced("catalog", Catalog, name, *_SHIPPED)
