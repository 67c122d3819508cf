"""Latencies of hardware that is not here, from a description: bandwidth, FLOP/s and overheads.

A description is a TOML file with `[main]` (the CPU of the main function), optionally `[gpu]` (then the non-expert modules run there) and
`[function]` (an expert function); each figure has its source (provenance.py). With a model's sizes it makes the `Latency` that a
measurement would make:

- one expert takes the overhead of its call, and the longer of reading its weights and computing its rows, divided by the vCPUs in use;
- all non-expert modules take the overhead of each layer, and the longer of reading their weights and computing their rows.

Computing is two operations for each weight and token. Left out are attention's quadratic term in the length of a prompt, reading the KV
cache, and that an embedding table is not multiplied (its part of `nonexpert_bytes` is not known here). So long prompts come out too fast,
and models with a large vocabulary too slow. A fraction of a vCPU counts as that much slower; waiting for a CPU quota is not described.
"""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel, Field, model_validator

from remoe_cli.artifacts import NonNegative, Part, Positive
from remoe_cli.errors import UsageError
from remoe_cli.model.spec import AssistantSpec, MoeSpec
from remoe_cli.profile.latency_record import AssistantTimes, Latency, Linear, Roofline, Timing
from remoe_cli.provenance import Provenance, check_provenance, read_figures, shipped_names

_SHIPPED = ("remoe_cli.profile", "hardware")
# A packed product of FP8 with few rows takes so many times as long as one of bfloat16, and with many about as long, where both use AVX2
# alone: docs/adr/0011-packed-experts.md, "Other forms".
_PACKED_FP8 = 1.25
_WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class FunctionSpeed(Part):
    """How fast the vCPUs of an expert function run experts.

    bytes_per_s_per_vcpu   rate of reading weights from memory
    flop_per_s_per_vcpu    rate of multiplying in the model's number type, with the software that is used
    saturation_vcpus       vCPUs beyond which nothing gets faster
    expert_overhead_s      overhead of calling one expert
    """

    bytes_per_s_per_vcpu: Positive
    flop_per_s_per_vcpu: Positive
    saturation_vcpus: Positive
    expert_overhead_s: NonNegative


class MainSpeed(FunctionSpeed):
    """How fast the main function is.

    vcpus              its vCPUs
    layer_overhead_s   overhead of calling one decoder layer's non-expert modules, on CPU or GPU
    load_bytes_per_s   rate of reading the model from disk
    formats            quantised formats (`StoredWeights.format`) from which some server is known to compute on such CPUs
    """

    vcpus: Positive
    layer_overhead_s: NonNegative
    load_bytes_per_s: Positive
    formats: tuple[str, ...] = ()


class Gpu(Part):
    """How fast the GPU is.

    bytes_per_s, flop_per_s            the vendor's figures; what software adds is in the overheads
    copy_latency_s, copy_bytes_per_s   one copy between GPU and CPU memory
    expert_overhead_s                  overhead of calling one expert on the GPU
    formats                            quantised formats from which some server is known to compute on such a GPU
    """

    bytes_per_s: Positive
    flop_per_s: Positive
    copy_latency_s: NonNegative
    copy_bytes_per_s: Positive
    expert_overhead_s: NonNegative
    formats: tuple[str, ...] = ()


class HardwareFile(Part):
    """Where a description comes from."""

    path: str
    sha256: str


class Hardware(Part):
    """A description of hardware. `read_hardware` fills in `file`."""

    schema_version: str = Field(pattern=r"^remoe\.hardware/1$")
    name: str
    main: MainSpeed
    gpu: Gpu | None = None
    function: FunctionSpeed
    provenance: tuple[Provenance, ...] = Field(min_length=1)
    file: HardwareFile

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Hardware:
        sides: dict[str, BaseModel] = {"main": self.main, "function": self.function}
        check_provenance(sides | ({"gpu": self.gpu} if self.gpu else {}), self.provenance)
        return self


def hardware_names() -> tuple[str, ...]:
    """List the names of the descriptions that come with remoe."""
    return shipped_names(*_SHIPPED)


def read_hardware(name: str) -> Hardware:
    """Read a description by name, of those that come with remoe, or by path.

    Raises: UsageError when there is no such description, or it is wrong.
    """
    return _shipped(name) if name in hardware_names() else _read(name)


def _read(name: str) -> Hardware:
    return read_figures("hardware description", Hardware, name, *_SHIPPED)


_shipped = cache(_read)  # a plan needs it for every main spec, and these files do not change while remoe runs


def latency_from(name: str, spec: MoeSpec, vcpus: float | None = None, assistant: AssistantSpec | None = None) -> Latency:
    """Compute the latencies of a model, and of an assistant, on the hardware that `name` describes.

    `measured_on` is the date of the newest figure. `vcpus` asks for a larger instance of the same family: its memory bandwidth is taken
    in proportion to its vCPUs, because AWS sells slices of the same servers.

    Raises: UsageError when there is no such description.
    """
    hardware = read_hardware(name)
    if vcpus is not None and vcpus > hardware.main.vcpus:
        sized = {"vcpus": vcpus, "saturation_vcpus": hardware.main.saturation_vcpus * vcpus / hardware.main.vcpus}
        hardware = hardware.model_copy(update={"main": hardware.main.model_copy(update=sized)})
    main, gpu = hardware.main, hardware.gpu
    nonexpert = _nonexpert_on_gpu(main, gpu, spec) if gpu else _nonexpert_on_cpu(main, min(main.vcpus, main.saturation_vcpus), spec)
    copied = Linear(fixed_s=gpu.copy_latency_s if gpu else 0.0, per_token_s=spec.hidden_state_bytes / gpu.copy_bytes_per_s if gpu else 0.0)
    return Latency(
        source="described",
        machine=hardware.name,
        measured_on=max(entry.date for entry in hardware.provenance).isoformat(),
        main_vcpus=main.vcpus,
        nonexpert_prefill=nonexpert,
        nonexpert_decode_s=float(nonexpert.seconds(1)),
        nonexpert_layers=None,
        local_expert=_timing(_expert_on_cpu(main, spec)),
        remote_expert=_timing(_expert_in_function(hardware.function, spec)),
        packed_expert=_timing(_packed_in_function(hardware.function, spec)) if spec.stored is not None and spec.stored.either else None,
        unquantised_expert=None if spec.remote is None else _timing(_expert_on_cpu(hardware.function, spec)),
        gpu_expert=_timing(whole_on_gpu(hardware, spec)[1]) if gpu else None,
        assistant=None
        if assistant is None
        else assistant_times(hardware, assistant, None if gpu else min(main.vcpus, main.saturation_vcpus)),
        copy_s=copied,
        load_s=spec.read_bytes / main.load_bytes_per_s,
    )


def assistant_times(hardware: Hardware, spec: AssistantSpec, vcpus: float | None) -> AssistantTimes:
    """Time an assistant on so many vCPUs, or on the GPU (None).

    Raises: UsageError when the description has no GPU.
    """
    main = hardware.main
    if vcpus is None:
        gpu = _gpu_of(hardware)
        rates = gpu.bytes_per_s, gpu.flop_per_s
    else:
        rates = main.bytes_per_s_per_vcpu * vcpus, main.flop_per_s_per_vcpu * vcpus
    prefill = _all_layers(main.layer_overhead_s, *rates, spec.bytes, spec)
    return AssistantTimes(prefill=prefill, decode_s=float(prefill.seconds(1)))


def whole_on_gpu(hardware: Hardware, spec: MoeSpec) -> tuple[Linear, Roofline]:
    """Time all non-expert modules, and one expert, of a model that is on the GPU as a whole.

    Nothing is copied then, and vCPUs do not matter.

    Raises: UsageError when the description has no GPU.
    """
    gpu = _gpu_of(hardware)
    expert = _roofline(gpu.expert_overhead_s, gpu.bytes_per_s, gpu.flop_per_s, spec.expert_bytes, spec)
    return _nonexpert_on_gpu(hardware.main, gpu, spec), expert


def whole_on_cpu(hardware: Hardware, spec: MoeSpec) -> tuple[Linear, Roofline]:
    """Time all non-expert modules, and one expert, of a model that is on CPUs as a whole.

    The former are at `main.saturation_vcpus` vCPUs.
    """
    main = hardware.main
    return _nonexpert_on_cpu(main, main.saturation_vcpus, spec), _expert_on_cpu(main, spec)


def as_stored(nonexpert: Linear, expert: Roofline, spec: MoeSpec) -> tuple[Linear, Roofline]:
    """Change those times to weights as a quantised checkpoint stores them.

    They are read in fewer bytes; the arithmetic stays.
    """
    if (stored := spec.stored) is None:
        return nonexpert, expert
    least_s = nonexpert.fixed_s + ((nonexpert.least_s or 0.0) - nonexpert.fixed_s) * stored.nonexpert_bytes / spec.nonexpert_bytes
    return (
        nonexpert.model_copy(update={"least_s": least_s}),
        expert.model_copy(update={"weights_s": expert.weights_s * stored.expert_bytes / spec.expert_bytes}),
    )


def dequantised_times(latency: Latency, spec: MoeSpec) -> Latency:
    """Change the times of packed expert functions to those for a copy that is not quantised.

    They are those of dequantised experts where a profile has both. Else described functions read more bytes, and measured times stay as
    they are: those of the copy are not known, and with one row they are longer (docs/adr/0011-packed-experts.md).
    """
    if spec.remote is None and latency.unquantised_expert is not None:
        return latency.model_copy(update={"remote_expert": latency.unquantised_expert, "unquantised_expert": None})
    curve = latency.remote_expert.curve
    if latency.source != "described" or not isinstance(curve, Roofline):
        return latency
    curve = curve.model_copy(update={"weights_s": curve.weights_s * spec.expert_bytes / spec.function_expert_bytes})
    return latency.model_copy(update={"remote_expert": latency.remote_expert.model_copy(update={"curve": curve})})


def _gpu_of(hardware: Hardware) -> Gpu:
    if hardware.gpu is None:
        raise UsageError(f"The hardware description {hardware.file.path} has no [gpu].", "Name one that has it, such as g5.xlarge.")
    return hardware.gpu


def _nonexpert_on_gpu(main: MainSpeed, gpu: Gpu, spec: MoeSpec) -> Linear:
    return _all_layers(main.layer_overhead_s, gpu.bytes_per_s, gpu.flop_per_s, spec.nonexpert_bytes, spec)


def _nonexpert_on_cpu(main: MainSpeed, vcpus: float, spec: MoeSpec) -> Linear:
    bytes_per_s, flop_per_s = main.bytes_per_s_per_vcpu * vcpus, main.flop_per_s_per_vcpu * vcpus
    return _all_layers(main.layer_overhead_s, bytes_per_s, flop_per_s, spec.nonexpert_bytes, spec)


def _all_layers(layer_overhead_s: float, bytes_per_s: float, flop_per_s: float, weight_bytes: int, spec: MoeSpec | AssistantSpec) -> Linear:
    curve = _roofline(layer_overhead_s * spec.hidden_layers, bytes_per_s, flop_per_s, weight_bytes, spec)
    return Linear(fixed_s=curve.overhead_s, per_token_s=curve.per_token_s, least_s=curve.overhead_s + curve.weights_s)


def _expert_on_cpu(speed: FunctionSpeed, spec: MoeSpec) -> Roofline:
    bytes_per_s, flop_per_s = speed.bytes_per_s_per_vcpu, speed.flop_per_s_per_vcpu
    return _roofline(speed.expert_overhead_s, bytes_per_s, flop_per_s, spec.expert_bytes, spec, speed.saturation_vcpus)


def _expert_in_function(speed: FunctionSpeed, spec: MoeSpec) -> Roofline:
    """Time an expert in a function: a packed one is read as it is stored, and computed as if it were unpacked."""
    curve = _expert_on_cpu(speed, spec)
    return curve.model_copy(update={"weights_s": curve.weights_s * spec.function_expert_bytes / spec.expert_bytes})


def _packed_in_function(speed: FunctionSpeed, spec: MoeSpec) -> Roofline:
    """Time an expert in FP8 that is computed from its stored bytes.

    Fewer bytes are read, but making numbers of them takes longer than reading them dequantised.
    """
    curve = _expert_on_cpu(speed, spec)
    return curve.model_copy(update={"weights_s": curve.weights_s * _PACKED_FP8})


def _roofline(
    overhead_s: float,
    bytes_per_s: float,
    flop_per_s: float,
    weight_bytes: int,
    spec: MoeSpec | AssistantSpec,
    saturation_vcpus: float = 1.0,
) -> Roofline:
    per_token_s = _flop(spec, weight_bytes) / flop_per_s
    weights_s = weight_bytes / bytes_per_s
    return Roofline(overhead_s=overhead_s, weights_s=weights_s, per_token_s=per_token_s, saturation_vcpus=saturation_vcpus)


def _timing(curve: Roofline) -> Timing:
    return Timing(curve=curve, held_out_error=None, errors={}, points=(), residuals=())


def _flop(spec: MoeSpec | AssistantSpec, weight_bytes: int) -> float:
    """Count one token's operations: a multiplication and an addition for each weight."""
    return 2.0 * weight_bytes / _WEIGHT_BYTES[spec.dtype]
