"""For the verifier: what else could run the model, and the plan as it stands in other scenarios.

The baselines are all experts local on the cheapest main spec that meets the targets, and on the smallest (MIX); everything in CPU memory;
everything in GPU memory; and experts in CPU memory that are always on the GPU in time (Fetch).

Source: method.md, section 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.document import GPU_BY_USE, Baseline, BaselineName, LayerPlan, MainSpec, Outcome, Plan, ScenarioKind
from remoe_cli.plan.verify import assistant
from remoe_cli.plan.verify.cost import (
    TOLERANCE,
    accelerated,
    cold_wait_s,
    cpu_usd_per_s,
    each_usd,
    functions_wait_s,
    gpu_room_bytes,
    gpu_tier,
    gpu_work_bytes,
    latency_of,
    main_bytes,
    outcome,
    read_bytes,
    request_bytes,
    vcpus_of,
)
from remoe_cli.plan.verify.inputs import VerifierInputs, as_profiled, evenly
from remoe_cli.plan.verify.steps import at_once, drawn, is_drawn, mean_of_steps, most_tokens
from remoe_cli.plan.verify.waking import holds, start_of
from remoe_cli.profile.hardware import as_stored, read_hardware, whole_on_cpu, whole_on_gpu
from remoe_cli.profile.latency_record import AssistantTimes

MB, GB = 2**20, 2**30
DIGITS = 12  # to which shares of tokens are compared: sums in another order differ in the last ones
Seconds = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
Bought = tuple[str, int]  # name of a main spec or instance, and how many of them
Ways = Mapping[Bought, "Way"]  # of equal cost; none where a baseline is missing


def missed(plan: Plan, found: Outcome | Baseline) -> dict[str, float]:
    """Find the targets that an outcome misses, with its values; what has no price misses no budget."""
    values = {"ttft_s": found.held_ttft_s, "tpot_s": found.tpot_s, "budget_usd": found.cost_usd_per_request or 0.0}
    targets = {name: getattr(plan.targets, name) for name in values}
    return {name: values[name] for name, target in targets.items() if target is not None and values[name] > target * (1 + 2 * TOLERANCE)}


def baselines(inputs: VerifierInputs) -> dict[BaselineName, Ways]:
    """Price each baseline, on everything that costs as little."""
    local = list(_local(inputs))
    layer_bytes = inputs.profile.record.spec.experts_per_layer * inputs.profile.record.spec.expert_bytes
    in_time = [way for way in local if not missed(inputs.plan, way.outcome)]
    smallest = min(local, key=lambda way: (way.main.memory_mb, way.main.usd_per_hour or 0.0), default=None)
    fastest = min(_cheapest(in_time or local), key=lambda way: way.outcome.ttft_s, default=None)
    spec, stored = inputs.profile.record.spec, inputs.profile.record.spec.stored
    quantised: dict[BaselineName, Ways] = {}
    if stored is not None:
        weights = stored.nonexpert_bytes + stored.expert_bytes * spec.experts
        quantised[BaselineName.STORED_CPU] = _by_bought(_quantised_on_cpu(inputs, weights))
        quantised[BaselineName.STORED_GPU] = _by_bought(_on_gpu(inputs, weights, 0, quantised=True))
    return {
        **quantised,
        BaselineName.ALL_LOCAL: {fastest.bought: fastest} if fastest else {},
        BaselineName.MIX: {smallest.bought: smallest} if smallest else {},
        BaselineName.CPU: _by_bought(_on_cpu(inputs, local)),
        BaselineName.GPU: _by_bought(_on_gpu(inputs, spec.nonexpert_bytes + spec.routed_bytes, 0)),
        BaselineName.FETCH: _by_bought(_on_gpu(inputs, spec.nonexpert_bytes + layer_bytes, spec.routed_bytes)),
    }


def scenarios(inputs: VerifierInputs) -> dict[tuple[ScenarioKind, float | None], Outcome]:
    """Price the plan as it stands in each scenario that needs no search, by kind and value."""
    changed: dict[tuple[ScenarioKind, float | None], VerifierInputs] = {
        **{(ScenarioKind.CALL_OVERHEAD, factor): replace(inputs, call_factor=factor) for factor in (0.5, 2.0)},
        **{(ScenarioKind.FUNCTION_PRICE, factor): replace(inputs, price_factor=factor) for factor in (0.5, 2.0)},
        (ScenarioKind.EVEN_ROUTING, 0.5): evenly(inputs, 0.5),
    }
    if inputs.plan.workload.routing is not None:
        changed[ScenarioKind.PROFILE_ROUTING, None] = as_profiled(inputs)
    return {key: outcome(other, other.plan.main, other.plan.instances, other.plan.layers) for key, other in changed.items()}


@dataclass(frozen=True)
class Way:
    """The whole model on one main spec, or on several instances of it.

    outcome        its cost is that of an hour where `priced` is false
    cold_start_s   what a cold start adds to TTFT
    priced         whether a request has a price: an instance that is rented by the hour has none where the traffic is unknown
    """

    main: MainSpec
    outcome: Outcome
    instances: int = 1
    cold_start_s: float = 0.0
    priced: bool = True

    @property
    def bought(self) -> Bought:
        """What it runs on."""
        return self.main.name, self.instances


def _cheapest(ways: Iterable[Way]) -> list[Way]:
    ways = list(ways)
    ways = [way for way in ways if way.priced] or ways
    least = min((way.outcome.cost_usd_per_request for way in ways), default=0.0)
    return [way for way in ways if way.outcome.cost_usd_per_request <= least * (1 + TOLERANCE)]


def _by_bought(ways: Iterable[Way]) -> Ways:
    return {way.bought: way for way in _cheapest(ways)}


def _local(inputs: VerifierInputs) -> Iterator[Way]:
    """Keep all experts local on each main spec that holds them and has the time.

    There are as many instances as the traffic needs.
    """
    spec = inputs.profile.record.spec
    by_use = _by_use(inputs)
    for main in _menu(inputs):
        room = gpu_room_bytes(inputs, main) - request_bytes(inputs, main)
        if main.gpu_memory_mb is not None and room < 0:
            continue
        there = set(by_use[: max(0, int((room - gpu_work_bytes(inputs, main)) // spec.expert_bytes))]) if gpu_tier(inputs, main) else set()
        layers = tuple(
            LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0, gpu=tuple(sorted(expert for at, expert in there if at == index)))
            for index, layer in enumerate(spec.moe_layers)
        )
        nonexpert_bytes, expert_bytes = read_bytes(inputs)
        if not holds(inputs.catalog, main, nonexpert_bytes + expert_bytes * spec.experts):
            continue
        if main_bytes(inputs, main, spec.experts_per_layer * len(layers) - len(there)) > main.memory_mb * MB:
            continue
        found, cold_s = outcome(inputs, main, 1, layers), cold_wait_s(inputs, main, layers)
        start = start_of(inputs.catalog, inputs.plan.workload, main)
        ends_s = inputs.catalog.main.rented_timeout_s if start is None else start.ends_s
        if ends_s is not None and any(
            cold_s + _alone_s(inputs, one, main, found, layers) > ends_s * (1 + TOLERANCE) for one in _each(inputs)
        ):
            continue
        if main.usd_per_hour is not None and inputs.plan.workload.requests_per_hour is not None:
            count = _instances(inputs, main, found, cold_mean_s(inputs, main, layers))
            yield Way(main, outcome(inputs, main, count, layers), count, cold_s)
        else:
            yield Way(main, found, 1, cold_s)


def _by_use(inputs: VerifierInputs) -> list[tuple[int, int]]:
    """List the experts of all layers, as places of layer and expert, by falling share of the recorded tokens that use them."""
    shares: dict[tuple[int, int], float] = {}
    for index, layer in enumerate(inputs.layers):
        total = sum(layer.choices.values())
        used = [0.0] * len(layer.use)
        for choice, tokens in layer.choices.items():
            for expert in choice:
                used[expert] += tokens
        shares |= {(index, expert): round(tokens / total, DIGITS) for expert, tokens in enumerate(used)}
    return sorted(shares, key=lambda place: (-shares[place], place))


def break_even_per_hour(inputs: VerifierInputs) -> float | None:
    """Compute the traffic above which the plan costs more than the instance that it names.

    Returns None where the plan names none, where the instance needs expert functions, and where the traffic is known, because the plan
    then compares something else than itself.
    """
    plan = inputs.plan
    traffic = plan.break_even_traffic
    if traffic is None or traffic.against is None or plan.workload.requests_per_hour is not None:
        return None
    warm = replace(inputs, plan=plan.model_copy(update={"workload": plan.workload.model_copy(update={"cold_share": 0.0})}))
    return traffic.usd_per_hour / outcome(warm, plan.main, 1, plan.layers).cost_usd_per_request


def _menu(inputs: VerifierInputs) -> tuple[MainSpec, ...]:
    """List the main specs on which a request has a price."""
    menu = inputs.catalog.main.menu
    return menu if inputs.plan.workload.requests_per_hour is not None else tuple(main for main in menu if main.usd_per_hour is None)


def _each(inputs: VerifierInputs) -> Iterator[VerifierInputs]:
    """Look at each of the longest requests by itself, warm."""
    for n_in, n_out in inputs.longest:
        alone = inputs.plan.workload.model_copy(
            update={"kinds": (), "longest": (), "n_in": n_in, "n_out": n_out, "cold_share": 0.0, "waking": None}
        )
        yield replace(inputs, plan=inputs.plan.model_copy(update={"workload": alone}))


def _alone_s(inputs: VerifierInputs, one: VerifierInputs, main: MainSpec, mean: Outcome, layers: Sequence[LayerPlan]) -> float:
    """Compute the time of one request, warm: its own prompt, and its tokens among those of mean requests."""
    own = outcome(one, main, 1, layers)
    if at_once(inputs.catalog, inputs.plan.workload, main) > 1:
        return own.ttft_s + one.n_out * mean.tpot_s
    return own.ttft_s + one.n_out * own.tpot_s


def busy_s(inputs: VerifierInputs, main: MainSpec, found: Outcome, cold_mean_s: float) -> float:
    """Compute how long a mean request keeps a main function busy.

    Those that are served at once share it, but for waits for cold starts.
    """
    warm_s = found.ttft_s - cold_mean_s + inputs.n_out * found.tpot_s
    return warm_s / at_once(inputs.catalog, inputs.plan.workload, main) + cold_mean_s


def cold_mean_s(inputs: VerifierInputs, main: MainSpec, layers: Sequence[LayerPlan]) -> float:
    """Compute what cold starts add to the mean TTFT."""
    start, cold = start_of(inputs.catalog, inputs.plan.workload, main), inputs.plan.workload.cold_share
    if start is None:
        return cold * functions_wait_s(inputs, layers)
    return start.share * cold_wait_s(inputs, main, layers) + start.functions_share * functions_wait_s(inputs, layers)


def _instances(inputs: VerifierInputs, main: MainSpec, found: Outcome, cold_mean_s: float) -> int:
    busy = busy_s(inputs, main, found, cold_mean_s)
    return max(1, math.ceil(busy * (inputs.plan.workload.requests_per_hour or 0.0) / 3600 - 1e-9))


def _on_cpu(inputs: VerifierInputs, local: list[Way]) -> Iterator[Way]:
    """Price each spec that is paid by use and holds the model; where it has a GPU, as if it had none."""
    spec, side = inputs.profile.record.spec, inputs.catalog.main
    hardware = read_hardware(inputs.catalog.reference.hardware)
    nonexpert, _ = whole_on_cpu(hardware, spec)
    for main in side.menu:
        needed = side.runtime_memory_mb * MB + request_bytes(inputs, main) + spec.routed_bytes
        if main.usd_per_hour is not None or main.memory_mb * MB < needed:
            continue
        if not accelerated(inputs, main):
            yield from (way for way in local if way.main == main)
            continue
        latency = latency_of(inputs, main)
        vcpus, useful = vcpus_of(latency, main)
        slower = hardware.main.saturation_vcpus / min(vcpus, useful)
        found = _whole(
            inputs,
            main,
            lambda n, slower=slower: nonexpert.seconds(n) * slower,  # type: ignore[misc]
            lambda n, latency=latency, vcpus=vcpus: latency.local_expert.seconds(n, vcpus),  # type: ignore[misc]
            assistant.times_on(inputs, hardware, hardware.main.saturation_vcpus, slower),
            by_use=True,
        )
        if found is None:
            continue
        cold_s = inputs.plan.workload.cold_share * _read_s(inputs)
        usd = cpu_usd_per_s(inputs, main) * busy_s(inputs, main, found, cold_s) + each_usd(inputs, main)
        yield Way(main, found.model_copy(update={"cost_usd_per_request": usd}), 1, _read_s(inputs))


def _format(inputs: VerifierInputs) -> str | None:
    stored = inputs.profile.record.spec.stored
    return None if stored is None else stored.format


def _quantised_on_cpu(inputs: VerifierInputs, weights: float) -> Iterator[Way]:
    """Price each spec that is paid by use and holds the quantised model."""
    side, hardware = inputs.catalog.main, read_hardware(inputs.catalog.reference.hardware)
    nonexpert, expert = as_stored(*whole_on_cpu(hardware, inputs.profile.record.spec), inputs.profile.record.spec)
    most = hardware.main.saturation_vcpus
    for main in side.menu if _format(inputs) in hardware.main.formats else ():
        held = weights + request_bytes(inputs, main) - inputs.profile.record.spec.nonexpert_bytes
        if main.usd_per_hour is not None or main.memory_mb * MB < side.runtime_memory_mb * MB + held:
            continue
        vcpus = most if main.vcpus is None else min(main.vcpus, most)
        found = _whole(
            inputs,
            main,
            lambda n, vcpus=vcpus: nonexpert.seconds(n) * (most / vcpus),  # type: ignore[misc]
            lambda n, vcpus=vcpus: expert.seconds(n, vcpus),  # type: ignore[misc]
            assistant.times_on(inputs, hardware, most, most / vcpus),
            by_use=True,
            quantised=True,
        )
        if found is not None:
            cold_s = inputs.plan.workload.cold_share * _read_s(inputs, True)
            usd = cpu_usd_per_s(inputs, main) * busy_s(inputs, main, found, cold_s) + each_usd(inputs, main)
            yield Way(main, found.model_copy(update={"cost_usd_per_request": usd}), 1, _read_s(inputs, True))


def _on_gpu(inputs: VerifierInputs, weights: float, cpu_bytes: float, *, quantised: bool = False) -> Iterator[Way]:
    """Price each GPU that holds so many bytes of weights, and GPU memory by the GB-second where it is sold.

    All arithmetic is on the GPU.
    """
    side, reference, spec = inputs.catalog.main, inputs.catalog.reference, inputs.profile.record.spec
    cpu_bytes += side.runtime_memory_mb * MB
    by_use = [MainSpec(name=GPU_BY_USE, memory_mb=1)] if side.usd_per_accelerator_gb_second > 0 else []
    for main in [*by_use, *reference.gpus]:
        gpu_bytes = weights + request_bytes(inputs, main) - spec.nonexpert_bytes
        if main not in by_use and (gpu_room_bytes(inputs, main) < gpu_bytes or main.memory_mb * MB < cpu_bytes):
            continue
        hardware = read_hardware(main.hardware or reference.hardware)
        if hardware.gpu is None or (quantised and _format(inputs) not in hardware.gpu.formats):
            continue
        nonexpert, expert = whole_on_gpu(hardware, spec)
        if quantised:
            nonexpert, expert = as_stored(nonexpert, expert, spec)
        instances = 1
        found = _whole(
            inputs,
            main,
            nonexpert.seconds,
            lambda n, expert=expert: expert.seconds(n, 1),  # type: ignore[misc]
            assistant.times_on(inputs, hardware, None),
            by_use=main in by_use,
            quantised=quantised,
        )
        if found is None:
            continue
        if main.usd_per_hour is None:
            usd_per_s = side.usd_per_accelerator_gb_second * gpu_bytes / GB + inputs.catalog.main_usd_per_gb_second * cpu_bytes / GB
            usd = usd_per_s * busy_s(inputs, main, found, inputs.plan.workload.cold_share * _read_s(inputs, quantised))
        elif inputs.plan.workload.requests_per_hour is None:
            usd = main.usd_per_hour
        else:
            instances = _instances(inputs, main, found, 0.0)
            usd = main.usd_per_hour * instances / inputs.plan.workload.requests_per_hour
        priced = main.usd_per_hour is None or inputs.plan.workload.requests_per_hour is not None
        cold_s = _read_s(inputs, quantised) if main in by_use else 0.0
        yield Way(main, found.model_copy(update={"cost_usd_per_request": usd}), instances, cold_s, priced)


def _whole(
    inputs: VerifierInputs,
    main: MainSpec,
    nonexpert_s: Seconds,
    expert_s: Seconds,
    helper: AssistantTimes | None,
    *,
    by_use: bool,
    quantised: bool = False,
) -> Outcome | None:
    """Compute TTFT and TPOT of one device that computes everything, one expert after another.

    One that is paid by use reads the whole model first, should it be cold. None where the platform ends the longest request.
    """
    uses, one = np.array([layer.use for layer in inputs.layers]), np.ones(1)

    def prefill_s(n_in: int) -> float:
        return float(nonexpert_s(one * n_in).sum() + expert_s(uses * n_in).sum()) + assistant.prompt_s(inputs, helper, n_in)

    ttft = sum(kind.share * prefill_s(kind.n_in) for kind in inputs.kinds)
    tpot = float(nonexpert_s(one).sum() + sum(layer.experts_per_token for layer in inputs.layers) * expert_s(one).sum())
    turn = 0.0
    served = at_once(inputs.catalog, inputs.plan.workload, main)
    if is_drawn(inputs, main):
        each_s = expert_s(np.arange(most_tokens(inputs, main) + 1.0))
        steps = (drawn(inputs, index, layer, served) for index, layer in enumerate(inputs.layers))
        step = mean_of_steps(inputs, main, lambda rows: float(nonexpert_s(one * rows).sum()))
        step += sum(float(each_s[rows].sum()) / len(rows) for rows in steps) + assistant.step_s(inputs, helper, served)
        tpot = inputs.passes[0] * step + (served - 1) * ttft / max(1.0, inputs.n_out)
        turn = step if served > 1 else 0.0
        ttft += turn
    side, start_s = inputs.catalog.main, _read_s(inputs, quantised) if by_use else 0.0
    ends_s = side.timeout_s if by_use else side.rented_timeout_s
    longest_s = max(prefill_s(n_in) + n_out * tpot for n_in, n_out in inputs.longest) + start_s + turn
    if ends_s is not None and longest_s > ends_s * (1 + TOLERANCE):
        return None
    at = inputs.plan.targets.ttft_at
    decided = None if at is None else prefill_s(at.n_in) + turn + (start_s if at.cold else 0.0)
    ttft += inputs.plan.workload.cold_share * start_s
    return Outcome(cost_usd_per_request=0.0, ttft_s=ttft, tpot_s=tpot, ttft_percentile_s=decided)


def _read_s(inputs: VerifierInputs, quantised: bool = False) -> float:
    """Compute how long a cold start takes that reads the whole model."""
    spec, side = inputs.profile.record.spec, inputs.catalog.main
    weights = spec.nonexpert_bytes + spec.routed_bytes
    if spec.stored is not None and (quantised or spec.stored.served):
        weights = spec.stored.nonexpert_bytes + spec.stored.expert_bytes * spec.experts
    return side.cold_start_s + (weights + assistant.weight_bytes(inputs)) / side.load_bytes_per_s
