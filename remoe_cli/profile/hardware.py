"""Latencies of hardware that is not here, from a description of it: a roofline of bandwidth, FLOP/s and overheads.

A description is a TOML file with `[main]` (the CPU of the main process), optionally `[gpu]` (non-expert modules run there when it is
given) and `[function]` (an expert function); each figure has its source (provenance.py). With a model's sizes it makes the `Latency` that
a measurement would make:

- an expert takes its call's overhead, and the longer of reading its weights and computing its rows, divided by the vCPUs in use;
- all non-expert modules take each layer's overhead, and the longer of reading their weights and computing their rows.

Computing is two operations a weight and token. Left out: attention's term that grows with the square of the prompt, reading the KV
cache, and that an embedding table is not multiplied (its share of `nonexpert_bytes` is not known here), so long prompts come out too
fast and models with a large vocabulary too slow. A share of a vCPU is taken as that much slower; the waiting of a CPU quota in periods
is not described.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from remoe_cli.artifacts import Part
from remoe_cli.errors import UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.latency_record import Latency, Linear, Roofline, Timing
from remoe_cli.provenance import Provenance, check_provenance, read_figures, shipped_names

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
_SHIPPED = ("remoe_cli.profile", "hardware")
_WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class FunctionSpeed(Part):
    """How fast vCPUs run experts.

    bytes_per_s_per_vcpu   reading weights from memory
    flop_per_s_per_vcpu    multiplying in the model's number type, as the software at hand does it
    saturation_vcpus       vCPUs beyond which nothing gets faster
    expert_overhead_s      calling one expert
    """

    bytes_per_s_per_vcpu: Positive
    flop_per_s_per_vcpu: Positive
    saturation_vcpus: Positive
    expert_overhead_s: NonNegative


class MainSpeed(FunctionSpeed):
    """The main process.

    vcpus                  that it has
    layer_overhead_s       calling one decoder layer's non-expert modules, on whatever they run
    load_bytes_per_s       reading the model from disk
    """

    vcpus: Positive
    layer_overhead_s: NonNegative
    load_bytes_per_s: Positive


class Gpu(Part):
    """The accelerator.

    bytes_per_s, flop_per_s              as a vendor gives them; what software adds is in the overheads
    copy_latency_s, copy_bytes_per_s     of one copy between it and CPU memory
    expert_overhead_s                    calling one expert on it, where a whole model is there
    """

    bytes_per_s: Positive
    flop_per_s: Positive
    copy_latency_s: NonNegative
    copy_bytes_per_s: Positive
    expert_overhead_s: NonNegative


class File(Part):
    path: str
    sha256: str


class Hardware(Part):
    """A description as read; `file` is where it came from and is filled in by `read_hardware`."""

    schema_version: str = Field(pattern=r"^remoe\.hardware/1$")
    name: str
    main: MainSpeed
    gpu: Gpu | None = None
    function: FunctionSpeed
    provenance: tuple[Provenance, ...] = Field(min_length=1)
    file: File

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Hardware:
        sides: dict[str, BaseModel] = {"main": self.main, "function": self.function}
        check_provenance(sides | ({"gpu": self.gpu} if self.gpu else {}), self.provenance)
        return self


def hardware_names() -> tuple[str, ...]:
    """Names of the descriptions that come with remoe."""
    return shipped_names(*_SHIPPED)


def read_hardware(name: str) -> Hardware:
    """A description by name or by path; UsageError when there is none, or it is wrong."""
    return _shipped(name) if name in hardware_names() else _read(name)


def _read(name: str) -> Hardware:
    return read_figures("hardware description", Hardware, name, *_SHIPPED)


_shipped = cache(_read)  # what comes with remoe does not change while it runs, and a plan looks at it for every main spec


def latency_from(name: str, spec: MoeSpec, vcpus: float | None = None) -> Latency:
    """What a model of these sizes takes on the hardware described by `name`; `measured_on` is the date of its newest figure.

    `vcpus` is for another size of the same family of instances: memory bandwidth is taken to grow in proportion, as AWS sells slices of
    the same servers.
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
        remote_expert=_timing(_expert_on_cpu(hardware.function, spec)),
        copy_s=copied,
        load_s=(spec.nonexpert_bytes + spec.routed_bytes) / main.load_bytes_per_s,
    )


def whole_on_gpu(hardware: Hardware, spec: MoeSpec) -> tuple[Linear, Roofline]:
    """All non-expert modules and one expert of a model that is on the GPU as a whole, so nothing is copied; vCPUs do not matter.

    UsageError when the description has no GPU.
    """
    if (gpu := hardware.gpu) is None:
        raise UsageError(f"The hardware description {hardware.file.path} has no [gpu].", "Name one that has, such as g5.xlarge.")
    expert = _roofline(gpu.expert_overhead_s, gpu.bytes_per_s, gpu.flop_per_s, spec.expert_bytes, spec)
    return _nonexpert_on_gpu(hardware.main, gpu, spec), expert


def whole_on_cpu(hardware: Hardware, spec: MoeSpec) -> tuple[Linear, Roofline]:
    """All non-expert modules and one expert of a model that is on CPUs as a whole; the former at `main.saturation_vcpus` vCPUs."""
    main = hardware.main
    return _nonexpert_on_cpu(main, main.saturation_vcpus, spec), _expert_on_cpu(main, spec)


def _nonexpert_on_gpu(main: MainSpeed, gpu: Gpu, spec: MoeSpec) -> Linear:
    return _nonexpert(main.layer_overhead_s, gpu.bytes_per_s, gpu.flop_per_s, spec)


def _nonexpert_on_cpu(main: MainSpeed, vcpus: float, spec: MoeSpec) -> Linear:
    return _nonexpert(main.layer_overhead_s, main.bytes_per_s_per_vcpu * vcpus, main.flop_per_s_per_vcpu * vcpus, spec)


def _nonexpert(layer_overhead_s: float, bytes_per_s: float, flop_per_s: float, spec: MoeSpec) -> Linear:
    curve = _roofline(layer_overhead_s * spec.hidden_layers, bytes_per_s, flop_per_s, spec.nonexpert_bytes, spec)
    return Linear(fixed_s=curve.overhead_s, per_token_s=curve.per_token_s, least_s=curve.overhead_s + curve.weights_s)


def _expert_on_cpu(speed: FunctionSpeed, spec: MoeSpec) -> Roofline:
    bytes_per_s, flop_per_s = speed.bytes_per_s_per_vcpu, speed.flop_per_s_per_vcpu
    return _roofline(speed.expert_overhead_s, bytes_per_s, flop_per_s, spec.expert_bytes, spec, speed.saturation_vcpus)


def _roofline(
    overhead_s: float, bytes_per_s: float, flop_per_s: float, weight_bytes: int, spec: MoeSpec, saturation_vcpus: float = 1.0
) -> Roofline:
    per_token_s = _flop(spec, weight_bytes) / flop_per_s
    weights_s = weight_bytes / bytes_per_s
    return Roofline(overhead_s=overhead_s, weights_s=weights_s, per_token_s=per_token_s, saturation_vcpus=saturation_vcpus)


def _timing(curve: Roofline) -> Timing:
    return Timing(curve=curve, held_out_error=None, errors={}, points=(), residuals=())


def _flop(spec: MoeSpec, weight_bytes: int) -> float:
    """Operations of one token with that many bytes of weights: a multiplication and an addition each."""
    return 2.0 * weight_bytes / _WEIGHT_BYTES[spec.dtype]
