"""For the verifier, by reprice.py: what else could run the model, and the plan as it stands under other circumstances.

What each baseline is stands in the method, section 10: all experts local on the cheapest main spec that meets the targets, and on the
smallest (MIX); everything in CPU memory; everything in GPU memory; and experts in CPU memory that are always on the GPU in time (Fetch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.document import LayerPlan, MainSpec, Outcome, Plan
from remoe_cli.plan.verify.cost import (
    TOLERANCE,
    Books,
    accelerated,
    evenly,
    latency_of,
    main_bytes,
    outcome,
    pooled,
    request_bytes,
    vcpus_of,
)
from remoe_cli.profile.hardware import read_hardware, whole_on_cpu, whole_on_gpu

MB, GB = 2**20, 2**30
Seconds = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
Ways = Mapping[str, Outcome]  # of equal cost, by what they run on; none where a baseline is missing


def missed(plan: Plan, found: Outcome) -> dict[str, float]:
    """The targets that an outcome misses, and by what."""
    values = {"ttft_s": found.ttft_s, "tpot_s": found.tpot_s, "budget_usd": found.cost_usd_per_request}
    return {name: values[name] for name, target in plan.targets if target is not None and values[name] > target * (1 + 2 * TOLERANCE)}


def baselines(books: Books) -> dict[str, Ways]:
    local = list(_local(books))
    whole_gpu_bytes = request_bytes(books) + books.profile.record.spec.routed_bytes
    layer_bytes = books.profile.record.spec.experts_per_layer * books.profile.record.spec.expert_bytes
    in_time = [way for way in local if not missed(books.plan, way.outcome)]
    smallest = min(local, key=lambda way: (way.main.memory_mb, way.main.usd_per_hour or 0.0), default=None)
    fastest = min(_cheapest(in_time or local), key=lambda way: way.outcome.ttft_s, default=None)
    return {
        "all-local": {fastest.name: fastest.outcome} if fastest else {},
        "mix": {smallest.name: smallest.outcome} if smallest else {},
        "cpu": _named(_on_cpu(books, local)),
        "gpu": _named(_on_gpu(books, whole_gpu_bytes, 0)),
        "fetch": _named(_on_gpu(books, request_bytes(books) + layer_bytes, books.profile.record.spec.routed_bytes)),
    }


def shifts(books: Books) -> dict[str, Outcome]:
    """The plan as it stands with other times, prices and routing, by what the plan calls them."""
    changed = {
        **{f"t_rem x {factor:g}": replace(books, call_factor=factor) for factor in (0.5, 2.0)},
        **{f"the price of expert functions x {factor:g}": replace(books, price_factor=factor) for factor in (0.5, 2.0)},
        "50% of tokens routed evenly": evenly(books, 0.5),
    }
    if books.plan.workload.routing is not None:
        changed["routed as all of the profile's prompts"] = replace(books, layers=pooled(books.profile)[0], hits={})
    return {what: outcome(other, other.plan.main, other.plan.instances, other.plan.layers) for what, other in changed.items()}


@dataclass(frozen=True)
class _Way:
    """The whole model on one main spec, or on so many of them."""

    main: MainSpec
    outcome: Outcome
    instances: int = 1

    @property
    def name(self) -> str:
        return self.main.name if self.instances == 1 else f"{self.instances} x {self.main.name}"


def _cheapest(ways: Iterable[_Way]) -> list[_Way]:
    ways = list(ways)
    least = min((way.outcome.cost_usd_per_request for way in ways), default=0.0)
    return [way for way in ways if way.outcome.cost_usd_per_request <= least * (1 + TOLERANCE)]


def _named(ways: Iterable[_Way]) -> Ways:
    return {way.main.name: way.outcome for way in _cheapest(ways)}


def _local(books: Books) -> Iterator[_Way]:
    """All experts local on each main spec that holds them and has the time, on as many instances as the traffic needs."""
    spec = books.profile.record.spec
    layers = tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in spec.moe_layers)
    for main in books.catalog.main.menu:
        room = main_bytes(books, main, spec.experts_per_layer * len(layers)) <= main.memory_mb * MB
        if not room or (main.gpu_memory_mb is not None and request_bytes(books) > main.gpu_memory_mb * MB):
            continue
        found = outcome(books, main, 1, layers)
        if main.usd_per_hour is not None and books.plan.workload.requests_per_hour is not None:
            count = _instances(books, found)
            yield _Way(main, outcome(books, main, count, layers), count)
        elif main.usd_per_hour is not None or _request_s(books, found) <= books.catalog.main.timeout_s * (1 + TOLERANCE):
            yield _Way(main, found)


def _request_s(books: Books, found: Outcome) -> float:
    return found.ttft_s + books.n_out * found.tpot_s


def _instances(books: Books, found: Outcome) -> int:
    return max(1, math.ceil(_request_s(books, found) * (books.plan.workload.requests_per_hour or 0.0) / 3600 - 1e-9))


def _on_cpu(books: Books, local: list[_Way]) -> Iterator[_Way]:
    """On each spec that is paid by use and holds the model; where it has a GPU, as if it had none."""
    spec, side = books.profile.record.spec, books.catalog.main
    hardware = read_hardware(books.catalog.reference.hardware)
    nonexpert, _ = whole_on_cpu(hardware, spec)
    needed = side.runtime_memory_mb * MB + request_bytes(books) + spec.routed_bytes
    for main in side.menu:
        if main.usd_per_hour is not None or main.memory_mb * MB < needed:
            continue
        if not accelerated(books, main):
            yield from (way for way in local if way.main == main)
            continue
        latency = latency_of(books, main)
        vcpus, useful = vcpus_of(latency, main)
        slower = hardware.main.saturation_vcpus / min(vcpus, useful)
        found = _whole(
            books,
            lambda n, slower=slower: nonexpert.seconds(n) * slower,  # type: ignore[misc]
            lambda n, latency=latency, vcpus=vcpus: latency.local_expert.seconds(n, vcpus),  # type: ignore[misc]
            cold=True,
        )
        usd_per_s = books.catalog.main_usd_per_gb_second * main.memory_mb / 1024
        yield _Way(main, found.model_copy(update={"cost_usd_per_request": usd_per_s * _request_s(books, found) + side.usd_per_request}))


def _on_gpu(books: Books, gpu_bytes: float, cpu_bytes: float) -> Iterator[_Way]:
    """With all arithmetic on a GPU with that much memory: one by the GB-second where the catalog sells it so, and each that it lists."""
    side, reference, spec = books.catalog.main, books.catalog.reference, books.profile.record.spec
    cpu_bytes += side.runtime_memory_mb * MB
    by_use = [MainSpec(name="memory by the GB-second", memory_mb=1)] if side.usd_per_accelerator_gb_second > 0 else []
    holding = [gpu for gpu in reference.gpus if (gpu.gpu_memory_mb or 0) * MB >= gpu_bytes and gpu.memory_mb * MB >= cpu_bytes]
    for main in [*by_use, *holding]:
        hardware = read_hardware(main.hardware or reference.hardware)
        if hardware.gpu is None:
            continue
        nonexpert, expert = whole_on_gpu(hardware, spec)
        found = _whole(books, nonexpert.seconds, lambda n, expert=expert: expert.seconds(n, 1), cold=main in by_use)  # type: ignore[misc]
        if main.usd_per_hour is None:
            usd_per_s = side.usd_per_accelerator_gb_second * gpu_bytes / GB + books.catalog.main_usd_per_gb_second * cpu_bytes / GB
            usd = usd_per_s * _request_s(books, found)
        elif books.plan.workload.requests_per_hour is None:
            usd = main.usd_per_hour / 3600 * _request_s(books, found)
        else:
            usd = main.usd_per_hour * _instances(books, found) / books.plan.workload.requests_per_hour
        yield _Way(main, found.model_copy(update={"cost_usd_per_request": usd}))


def _whole(books: Books, nonexpert_s: Seconds, expert_s: Seconds, *, cold: bool) -> Outcome:
    """TTFT and TPOT of one device that does everything, one expert after another; a cold one reads the whole model first."""
    spec, side = books.profile.record.spec, books.catalog.main
    start_s = side.cold_start_s + (spec.nonexpert_bytes + spec.routed_bytes) / side.load_bytes_per_s
    uses, one = np.array([layer.use for layer in books.layers]), np.ones(1)
    ttft = sum(kind.share * float(nonexpert_s(one * kind.n_in).sum() + expert_s(uses * kind.n_in).sum()) for kind in books.kinds)
    tpot = float(nonexpert_s(one).sum() + sum(layer.experts_per_token for layer in books.layers) * expert_s(one).sum())
    return Outcome(cost_usd_per_request=0.0, ttft_s=ttft + (books.plan.workload.cold_share * start_s if cold else 0.0), tpot_s=tpot)
