"""What else could run the model: the paper's baselines, and all experts local at the best main spec.

- CPU        the whole model in CPU memory
- GPU        the whole model in GPU memory
- Fetch      ideal offloading: experts in CPU memory, and each needed one is on the GPU already, which has room for one layer's
- MIX        experts in CPU memory, the rest where main functions have it, on the smallest main spec that holds them
- all-local  the same on the cheapest spec that meets the targets (MIX*): a plan without remote experts

MIX and all-local have the most used experts on the GPU, as many as fit, where an instance has one and the time of an expert on it is known.

Where the traffic is unknown, a request has no price on an instance that is rented by the hour: there all-local and MIX are paid by use if
the catalog has main functions that are, and what runs on rented GPUs has a price per hour only.

Times of CPU, GPU and Fetch come from descriptions (profile/hardware). Their GPU takes a fixed time for each layer and for each expert that
is called: that is what eager code costs, and it decides these baselines. Prices are those of main functions: by the GB-second, or the hours
of an instance.

Source: method.md, section 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.cost import assistant, main_function, prices
from remoe_cli.plan.cost.placement import Priced, busy_s, layer_outcomes, total
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.cost.requests import longest_s
from remoe_cli.plan.document import GPU_BY_USE, Baseline, BaselineName, LayerPlan, MainSpec, Outcome
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import MB, Main, Placement, Problem, local_layers
from remoe_cli.plan.wording import request_tokens
from remoe_cli.profile.hardware import Gpu, MainSpeed, as_stored, read_hardware, whole_on_cpu, whole_on_gpu
from remoe_cli.profile.latency_record import AssistantTimes
from remoe_cli.units import size

DIGITS = 12  # to which shares of tokens are rounded before they are compared
_STORED = "weights are read as they are stored and computed with as if they were unpacked"


@dataclass(frozen=True)
class Baselines:
    """The baselines that can be priced, and why others cannot.

    missing     sentences for people
    all_local   the placement of the baseline of that name; None where there is none
    """

    priced: dict[BaselineName, Baseline]
    missing: dict[BaselineName, str]
    all_local: Priced | None


def baselines(problem: Problem, aim: Aim) -> Baselines:
    """Price every other way to run the model, or say why it cannot be priced."""
    local = [one for spec in problem.menu if (one := all_local_on(problem, spec)) is not None]
    found = {
        BaselineName.CPU: _cpu(problem, aim, local),
        BaselineName.GPU: _gpu(problem, aim),
        BaselineName.FETCH: _fetch(problem, aim),
        BaselineName.MIX: _mix(problem, aim, local),
    }
    if problem.spec.stored is not None:
        found |= {
            BaselineName.STORED_CPU: _cpu_as_stored(problem, aim),
            BaselineName.STORED_GPU: _on_gpu(problem, aim, problem.spec.stored_bytes, 0, ideal=False, as_it_is_stored=True),
        }
    best = _best(aim, local)
    found[BaselineName.ALL_LOCAL] = found[BaselineName.MIX] if best is None else _priced(problem, aim, best)
    priced = {name: way for name, way in found.items() if not isinstance(way, str)}
    missing = {name: way for name, way in found.items() if isinstance(way, str)}
    return Baselines(priced, missing, best)


def all_local_on(problem: Problem, spec: MainSpec) -> Priced | None:
    """Keep all experts local on one main spec, with as few instances as the traffic needs.

    Returns None where the spec does not hold them, or takes too long for a request.
    """
    problem = problem.at_main(spec)
    placement = Placement(spec, _filled(problem, main_function.gpu_capacity(problem, spec)))
    on_cpu = sum(problem.spec.experts_per_layer - len(layer.gpu) for layer in placement.layers)
    if main_function.local_capacity(problem, spec) < on_cpu or main_function.fetch_capacity(problem, spec) < problem.spec.experts:
        return None
    layers = layer_outcomes(problem, placement)
    outcome = total(problem, placement, layers)
    ends_s = main_function.longest_request_s(problem, spec) * (1 + SLACK)
    if ends_s < math.inf and (longest_s(problem, placement, outcome.tpot_s, problem.workload.front) > ends_s).any():
        return None
    request_s = busy_s(problem, placement, outcome, layers)
    if not main_function.always_on(problem, spec):
        return Priced(placement, outcome)
    several = replace(placement, instances=instances_for(problem, request_s))
    return Priced(several, total(problem, several, layers))


def _filled(problem: Problem, capacity: int) -> tuple[LayerPlan, ...]:
    """Put the experts that most decode tokens use on the GPU, as many as it has room for, whichever layers they are of.

    Of equals, the first goes first. Shares are rounded, so that sums in another order find the same equals.
    """
    layers = local_layers(problem)
    if not capacity:
        return layers
    by_use = np.argsort(-problem.workload.decode_hits.round(DIGITS), axis=None, kind="stable")
    there = np.zeros(problem.workload.decode_hits.shape, dtype=bool)
    there.flat[by_use[:capacity]] = True
    return tuple(layer.model_copy(update={"gpu": tuple(np.flatnonzero(row).tolist())}) for layer, row in zip(layers, there, strict=True))


def instances_for(problem: Problem, request_s: float) -> int:
    """Count the always-on instances that have time for the traffic.

    A mean request keeps one busy for so long.
    """
    return max(1, -int(-(request_s * (problem.workload.requests_per_hour or 0.0) / 3600 - 1e-9) // 1))


def _best(aim: Aim, local: list[Priced]) -> Priced | None:
    """Find the cheapest that meets the targets, else the cheapest; of equals, the fastest."""
    pool = [one for one in local if meets(aim, one.outcome)] or local
    least = min((one.outcome.cost_usd_per_request for one in pool), default=0.0)
    equals = [one for one in pool if one.outcome.cost_usd_per_request <= least * (1 + SLACK)]
    return min(equals, key=lambda one: one.outcome.ttft_s, default=None)


def _priced(problem: Problem, aim: Aim, local: Priced) -> Baseline:
    placement = local.placement
    return Baseline(
        **local.outcome.model_dump(),
        cold_start_s=cold_wait_s(problem, placement),
        usd_per_hour=placement.main.usd_per_hour,
        spec=placement.main.name,
        instances=placement.instances,
        meets=meets(aim, local.outcome),
    )


def _mix(problem: Problem, aim: Aim, local: list[Priced]) -> Baseline | str:
    if local:
        return _priced(problem, aim, min(local, key=lambda one: (one.placement.main.memory_mb, one.placement.main.usd_per_hour or 0.0)))
    of_these = "" if len(problem.menu) == len(problem.catalog.main.menu) else " that is paid by use"
    needed = [_all_local_bytes(problem, spec) for spec in problem.menu]
    if any(each <= spec.memory_mb * MB for each, spec in zip(needed, problem.menu, strict=True)):
        return f"no main function{of_these} holds all experts, on its GPU or in its /tmp where it has them, and answers in time"
    largest = max(spec.memory_mb for spec in problem.menu)
    return f"all experts local need a main function of {min(needed) / MB:.0f} MB, but the largest{of_these} has {largest} MB"


def _all_local_bytes(problem: Problem, spec: MainSpec) -> float:
    """Compute the CPU memory that a main function needs for all experts that its GPU does not hold."""
    problem = problem.at_main(spec)
    on_cpu = max(0, problem.spec.experts - main_function.gpu_capacity(problem, spec))
    return main_function.main_memory_bytes(problem, spec, on_cpu)


def _cpu(problem: Problem, aim: Aim, local: list[Priced]) -> Baseline | str:
    """Price the whole model on CPUs.

    Where main functions have no GPU, this is all experts local. Else experts take their time in the main function, the rest that of a
    description.
    """
    problem = _paid_by_use(problem)
    bytes_needed = problem.catalog.main.runtime_memory_mb * MB + main_function.base_bytes(problem) + problem.spec.routed_bytes
    hardware = read_hardware(problem.catalog.reference.hardware)
    nonexpert, _ = whole_on_cpu(hardware, problem.spec)
    known = {one.placement.main.name: one.outcome for one in local}

    def outcome(spec: MainSpec) -> Outcome | None:
        if not main_function.on_gpu(problem, spec):
            return known.get(spec.name)
        vcpus, expert = main_function.vcpus(problem, spec), problem.latency_of(spec).local_expert
        slow = hardware.main.saturation_vcpus / main_function.useful_vcpus(problem, spec)
        helper = assistant.times_on(problem, hardware, hardware.main.saturation_vcpus, slow)
        return _by_use(problem, spec, lambda n: float(nonexpert.seconds(n)) * slow, lambda n: expert.seconds(n, vcpus), helper)

    holding = _holding(problem, bytes_needed)
    if (best := _cheapest(aim, holding, outcome, read_s(problem))) is None and holding:
        return f"no main function paid by use that holds the whole model of {size(bytes_needed)} {_in_time(problem)}"
    return best or f"no main function paid by use holds the whole model of {size(bytes_needed)}"


def _paid_by_use(problem: Problem) -> Problem:
    """Look at the problem of main functions that are paid by use: fewer requests at once, where the platform says so."""
    return problem.at_main(MainSpec(name=GPU_BY_USE, memory_mb=1))


def _cpu_as_stored(problem: Problem, aim: Aim) -> Baseline | str:
    """Price the quantised model on CPUs, with all times of a description."""
    problem = _paid_by_use(problem)
    hardware = read_hardware(problem.catalog.reference.hardware)
    if not _computes(problem, hardware.main):
        return f"no server is known that computes from {_format(problem)} on the CPUs of '{hardware.name}'"
    nonexpert, expert = as_stored(*whole_on_cpu(hardware, problem.spec), problem.spec)
    bytes_needed = _requests_bytes(problem) + problem.spec.stored_bytes + problem.catalog.main.runtime_memory_mb * MB
    most = hardware.main.saturation_vcpus

    def outcome(spec: MainSpec) -> Outcome | None:
        vcpus = min(spec.vcpus or most, most)
        slow = most / vcpus
        helper = assistant.times_on(problem, hardware, most, slow)
        return _by_use(problem, spec, lambda n: float(nonexpert.seconds(n)) * slow, lambda n: expert.seconds(n, vcpus), helper, True)

    best = _cheapest(aim, _holding(problem, bytes_needed), outcome, read_s(problem, True), assumed=_STORED)
    return best or f"no main function paid by use holds the quantised model of {size(bytes_needed)} and answers in time"


def _format(problem: Problem) -> str:
    return "" if problem.spec.stored is None else problem.spec.stored.format


def _computes(problem: Problem, side: MainSpeed | Gpu) -> bool:
    """Tell whether some server is known to compute from the form in which the checkpoint is stored."""
    return _format(problem) in side.formats


def _holding(problem: Problem, bytes_needed: float) -> list[MainSpec]:
    """List the main specs that are paid by use and have so much memory."""
    return [spec for spec in problem.menu if spec.usd_per_hour is None and spec.memory_mb * MB >= bytes_needed]


def _by_use(
    problem: Problem,
    spec: MainSpec,
    nonexpert_s: Callable[[float], float],
    expert_s: Callable[[Floats | int], Floats],
    helper: AssistantTimes | None,
    as_it_is_stored: bool = False,
) -> Outcome | None:
    """Price one main spec that is paid by use and computes everything."""
    usd_per_s, fixed_usd = prices.main_prices(problem.catalog, spec).usd_per_s, main_function.fixed_usd(problem, Main(spec))
    return _outcome(problem, nonexpert_s, expert_s, helper, usd_per_s, fixed_usd, by_use=True, as_it_is_stored=as_it_is_stored)


def _cheapest(
    aim: Aim, specs: list[MainSpec], outcome: Callable[[MainSpec], Outcome | None], cold_s: float, assumed: str = ""
) -> Baseline | None:
    """Choose the spec on which a request costs least; of equals, the first. A cold start takes `cold_s`."""
    found = [(spec, one) for spec in specs if (one := outcome(spec)) is not None]
    if not found:
        return None
    spec, best = min(found, key=lambda pair: pair[1].cost_usd_per_request)
    return Baseline(**best.model_dump(), cold_start_s=cold_s, spec=spec.name, meets=meets(aim, best), assumed=assumed)


def _gpu(problem: Problem, aim: Aim) -> Baseline | str:
    return _on_gpu(problem, aim, problem.spec.nonexpert_bytes + problem.spec.routed_bytes, 0, ideal=False)


def _fetch(problem: Problem, aim: Aim) -> Baseline | str:
    weights = problem.spec.nonexpert_bytes + problem.spec.experts_per_layer * problem.spec.expert_bytes
    return _on_gpu(problem, aim, weights, problem.spec.routed_bytes, ideal=True)


def _requests_bytes(problem: Problem) -> int:
    """Compute the memory that requests take beside the model."""
    return main_function.base_bytes(problem) - problem.spec.nonexpert_bytes


def _on_gpu(problem: Problem, aim: Aim, weights: int, cpu_bytes: int, ideal: bool, as_it_is_stored: bool = False) -> Baseline | str:
    """Price the cheapest way to have so many bytes of weights on a GPU, with all arithmetic there."""
    reference, side = problem.catalog.reference, problem.catalog.main
    cpu_needed, gpu_bytes = cpu_bytes + side.runtime_memory_mb * MB, _requests_bytes(problem) + weights
    options: list[tuple[str, str, float, float | None]] = []  # name, hardware, USD a second, USD an hour of an instance
    if side.usd_per_accelerator_gb_second > 0:
        held = _requests_bytes(_paid_by_use(problem)) + weights
        usd = side.usd_per_accelerator_gb_second * held / 2**30 + problem.catalog.main_usd_per_gb_second * cpu_needed / 2**30
        options.append((GPU_BY_USE, reference.hardware, usd, None))
    for spec in reference.gpus:
        if side.usable_gpu_mb(spec.gpu_memory_mb or 0) * MB >= gpu_bytes and spec.memory_mb * MB >= cpu_needed:
            options.append((spec.name, spec.hardware or reference.hardware, (spec.usd_per_hour or 0.0) / 3600, spec.usd_per_hour))
    if as_it_is_stored:
        options = [one for one in options if (gpu := read_hardware(one[1]).gpu) is not None and _computes(problem, gpu)]
    best: Baseline | None = None
    least = (True, math.inf)  # whether it has no price for a request, and what it costs: an hour, or a request
    for name, described, usd_per_s, per_hour in options:
        hardware = read_hardware(described)
        if hardware.gpu is None:
            continue
        nonexpert, expert = whole_on_gpu(hardware, problem.spec)
        if as_it_is_stored:
            nonexpert, expert = as_stored(nonexpert, expert, problem.spec)
        by_use = per_hour is None
        here = _paid_by_use(problem) if by_use else problem
        outcome = _outcome(
            here,
            lambda n: float(nonexpert.seconds(n)),  # noqa: B023
            lambda n: expert.seconds(n, 1),  # noqa: B023
            assistant.times_on(problem, hardware, None),
            usd_per_s,
            0.0,
            by_use=by_use,
            as_it_is_stored=as_it_is_stored,
        )
        if outcome is None:
            continue
        traffic, instances = problem.workload.requests_per_hour, 1
        request_usd: float | None = outcome.cost_usd_per_request
        if per_hour is not None:
            instances = instances_for(problem, main_function.busy_s(here, outcome.ttft_s, outcome.tpot_s, 0.0))
            request_usd = None if traffic is None else instances * per_hour / traffic
        # What has no price misses no budget.
        asked = replace(aim, budget_usd=None if request_usd is None else aim.budget_usd)
        in_time = meets(asked, outcome.model_copy(update={"cost_usd_per_request": request_usd or 0.0}))
        overhead = (
            f"GPU overhead of {hardware.main.layer_overhead_s * 1e3:g} ms for each layer "
            f"and {hardware.gpu.expert_overhead_s * 1e3:g} ms for each expert"
        ) + (f"; {_STORED}" if as_it_is_stored else "")
        if (rank := (request_usd is None, per_hour or 0.0 if request_usd is None else request_usd)) < least:
            least = rank
            best = Baseline(
                cost_usd_per_request=request_usd,
                ttft_s=outcome.ttft_s,
                tpot_s=outcome.tpot_s,
                ttft_percentile_s=outcome.ttft_percentile_s,
                cold_start_s=read_s(problem, as_it_is_stored) if by_use else 0.0,
                usd_per_hour=per_hour,
                spec=name,
                instances=instances,
                meets=in_time,
                assumed=overhead,
                ideal=ideal,
            )
    memory = f"{size(gpu_bytes)}, with {size(cpu_needed)} of CPU memory"
    if best is None and options:
        return f"no GPU of the catalog that has {memory}, {_in_time(problem)}"
    known = f"on which a server is known to compute from {_format(problem)} " if as_it_is_stored else ""
    return best or f"no GPU of the catalog {known}has {memory}"


def _in_time(problem: Problem) -> str:
    longest = problem.workload.most_tokens
    return f"answers a request of {request_tokens(longest.n_in, longest.n_out)} before the platform ends it"


def _outcome(
    problem: Problem,
    nonexpert_s: Callable[[float], float],
    expert_s: Callable[[Floats | int], Floats],
    helper: AssistantTimes | None,
    usd_per_s: float,
    fixed_usd: float,
    *,
    by_use: bool,
    as_it_is_stored: bool = False,
) -> Outcome | None:
    """Price one device that computes everything, one expert after another; None where the platform ends a request before it is answered.

    Where it is paid by use, a cold one reads the whole model first.
    """
    workload, side = problem.workload, problem.catalog.main

    def prefill_s(n_in: int) -> float:
        return nonexpert_s(n_in) + float(expert_s(workload.use * n_in).sum()) + assistant.prompt_s(problem, helper, n_in)

    start_s = read_s(problem, as_it_is_stored) if by_use else 0.0
    cold_s = ttft = workload.cold_share * start_s
    for kind in workload.lengths:
        ttft += kind.share * prefill_s(kind.n_in)
    turn_s = 0.0
    if problem.is_one_token:
        tpot = nonexpert_s(1) + float(workload.decode_hits.sum()) * float(expert_s(1))
    else:
        times_s = expert_s(np.arange(problem.step_tokens + 1.0))
        layers = range(len(workload.patterns))
        step_s = main_function.mean_of_steps(problem, nonexpert_s) + assistant.step_s(problem, helper)
        step_s += sum(float(times_s[problem.step_rows(layer)].sum(axis=0).mean()) for layer in layers)
        tpot = main_function.next_token_s(problem, ttft - cold_s, step_s)
        turn_s = step_s if problem.concurrency > 1 else 0.0
        ttft += turn_s
    ends_s = side.timeout_s if by_use else side.rented_timeout_s
    begin_s = start_s + turn_s
    if ends_s is not None and any(begin_s + prefill_s(n_in) + n_out * tpot > ends_s * (1 + SLACK) for n_in, n_out in workload.front):
        return None
    at = problem.ttft_at
    decided = None if at is None else prefill_s(at.n_in) + turn_s + (start_s if at.cold else 0.0)
    usd = usd_per_s * main_function.busy_s(problem, ttft, tpot, cold_s) + fixed_usd
    return Outcome(cost_usd_per_request=usd, ttft_s=ttft, tpot_s=tpot, ttft_percentile_s=decided)


def read_s(problem: Problem, as_it_is_stored: bool = False) -> float:
    """Compute how long a cold start takes that reads the whole model."""
    spec, side = problem.spec, problem.catalog.main
    read_bytes = (spec.stored_bytes if as_it_is_stored else spec.read_bytes) + assistant.weight_bytes(problem)
    return side.cold_start_s + read_bytes / side.load_bytes_per_s
