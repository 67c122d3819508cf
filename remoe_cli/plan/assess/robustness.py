"""How far a plan can be trusted: what it costs where calls, prices, routing or prompts differ.

`scenarios`, `held_out` and `unpredicted` price the plan as it stands where something differs. `break_evens` says how much a figure has to
change until remote experts and all experts local cost the same; `break_even_traffic` says at which traffic a rented instance does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from remoe_cli.plan.arrays import Bools
from remoe_cli.plan.assess.baselines import all_local_on, baselines
from remoe_cli.plan.assess.kinds import best_of
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import Priced, evaluate
from remoe_cli.plan.document import (
    WIDEST_FACTOR,
    Baseline,
    BaselineName,
    BreakEven,
    BreakEvenTraffic,
    MainKind,
    Outcome,
    Scenario,
    ScenarioKind,
)
from remoe_cli.plan.problem.aim import Aim, meets
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.workload import Workload, from_profile
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.latency_record import Quantiles
from remoe_cli.profile.record import WITH_ANSWERS, WITH_ASSISTANT, Profile

STEP = 2.0  # by which circumstances are shifted, up and down
FLATTER = 0.5  # share of an evenly spread routing that is mixed in
_BY_PROMPT = ("prefill_counts", "decode_counts", "prompt_tokens", "decode_tokens", *WITH_ANSWERS, *WITH_ASSISTANT)


def slower_calls(problem: Problem, factor: float) -> Problem:
    """Multiply the warm overhead of an invocation (t_rem), billed or not, by `factor`."""
    side = problem.catalog.function
    update = {"warm_unbilled_s": side.warm_unbilled_s * factor, "warm_billed_s": side.warm_billed_s * factor}
    catalog = problem.catalog.model_copy(update={"function": side.model_copy(update=update)})
    measured = problem.latency.invocation
    if measured is None:
        return replace(problem, catalog=catalog)

    spreads = {
        name: Quantiles(p50=s.p50 * factor, p90=s.p90 * factor, p99=s.p99 * factor, tenths=tuple(t * factor for t in s.tenths))
        for name, s in (("unbilled_s", measured.unbilled_s), ("billed_s", measured.billed_s))
    }
    return replace(problem, catalog=catalog, latency=problem.latency.model_copy(update={"invocation": measured.model_copy(update=spreads)}))


def dearer_functions(problem: Problem, factor: float) -> Problem:
    """Multiply price and fee of expert functions by `factor`; the main function's stay."""
    side = problem.catalog.function
    prices = {name: usd * factor for name, usd in side.usd_per_gb_second.items()}
    by_one = {name: getattr(side, name) * factor for name in ("usd_per_request", "usd_per_storage_gb_second")}
    update = {"usd_per_gb_second": prices, **by_one}
    return replace(problem, catalog=problem.catalog.model_copy(update={"function": side.model_copy(update=update)}))


def flatter(problem: Problem, share: float) -> Problem:
    """Route a share of the tokens evenly: to k neighbouring ids, starting from every expert alike."""
    workload = problem.workload
    experts, k = workload.use.shape[1], workload.trace.shape[2]
    even = np.sort((np.arange(experts)[:, None] + np.arange(k)) % experts, axis=1)
    patterns = tuple(
        (np.concatenate([sets, even]), np.concatenate([counts * (1 - share), np.full(experts, counts.sum() * share / experts)]))
        for sets, counts in workload.patterns
    )
    use = (1 - share) * workload.use + share * k / experts
    consecutive = None if workload.consecutive is None else replace(workload.consecutive, even_share=share)
    return replace(problem, workload=replace(workload, use=use, patterns=patterns, consecutive=consecutive))


CHANGES: dict[ScenarioKind, Callable[[Problem, float], Problem]] = {
    ScenarioKind.CALL_OVERHEAD: slower_calls,
    ScenarioKind.FUNCTION_PRICE: dearer_functions,
    ScenarioKind.EVEN_ROUTING: flatter,
}
VALUES = {
    ScenarioKind.CALL_OVERHEAD: (1 / STEP, STEP),
    ScenarioKind.FUNCTION_PRICE: (1 / STEP, STEP),
    ScenarioKind.EVEN_ROUTING: (FLATTER,),
}


def scenarios(problem: Problem, aim: Aim, placement: Placement) -> list[Scenario]:
    """Price the placement as it stands under each change."""
    return [
        _scenario(kind, aim, evaluate(change(problem, value), placement), value=value)
        for kind, change in CHANGES.items()
        for value in VALUES[kind]
    ]


def _scenario(kind: ScenarioKind, aim: Aim, outcome: Outcome, **more: Any) -> Scenario:
    return Scenario(**outcome.model_dump(), kind=kind, meets=meets(aim, outcome), **more)


def held_out(problem: Problem, profile: Profile, aim: Aim) -> Scenario | None:
    """Plan on every other prompt of the profile, by the scan, and judge that plan on the rest.

    Returns None when there are too few prompts.
    """
    rows = np.arange(len(profile.arrays["prompt_tokens"]))
    halves = [_window(problem.workload, profile, rows % 2 == half) for half in (0, 1)]
    if halves[0] is None or halves[1] is None:
        return None
    planned, judged = (replace(problem, workload=half) for half in halves if half is not None)
    plan, best = scan(planned, aim), scan(judged, aim)
    if plan is None:
        return None
    outcome = evaluate(judged, plan.placement)
    known = best.value if best and aim.objective == "cost" else None
    counts = {"planned_prompts": int((rows % 2 == 0).sum()), "judged_prompts": int((rows % 2 == 1).sum())}
    return _scenario(ScenarioKind.HELD_OUT_PROMPTS, aim, outcome, best_usd=known, **counts)


def unpredicted(problem: Problem, profile: Profile, aim: Aim, placement: Placement) -> Scenario:
    """Price the plan where the prediction fails: requests route as all of the profile's prompts together."""
    mean = replace(problem, workload=_for_the_same(problem.workload, from_profile(profile, 1, 1)))
    return _scenario(ScenarioKind.PROFILE_ROUTING, aim, evaluate(mean, placement))


def _window(workload: Workload, profile: Profile, rows: Bools) -> Workload | None:
    arrays = dict(profile.arrays)
    tokens = rows[arrays["trace_prompt"]]
    if rows.sum() < 2 or not tokens.any():
        return None
    counts = profile.counts("prefill")[rows].sum(axis=0)
    if (counts.sum(axis=1) == 0).any():
        return None
    for name, array in profile.arrays.items():
        if name.startswith("trace_"):
            arrays[name] = array[tokens]
        elif name in _BY_PROMPT and len(array) == len(rows):
            arrays[name] = array[rows]
    return _for_the_same(workload, from_profile(replace(profile, arrays=arrays), 1, 1))


def _for_the_same(requests: Workload, routing: Workload) -> Workload:
    """Combine the requests of one workload with the routing of the other."""
    return replace(
        routing,
        traffic=requests.traffic,
        cold_share=requests.cold_share,
        waking=requests.waking,
        also_held=requests.also_held,
        also_priced=requests.also_priced,
    )


def break_evens(problem: Problem, aim: Aim, placement: Placement, local: Priced | None) -> list[BreakEven]:
    """Find by how much each figure has to change until remote experts and all experts local cost the same.

    The placement is compared as it stands; if it has no remote experts, the best known one that has some, by the scan. Empty where all
    experts local cannot be had.
    """
    if local is None:
        return []
    remote = placement
    if not any(layer.remote for layer in placement.layers):
        found = scan(problem, replace(aim, objective="cost"), least=1)
        if found is None:
            return []
        remote = found.placement
    local_usd = local.outcome.cost_usd_per_request

    def extra_usd(kind: ScenarioKind, value: float) -> float:
        return evaluate(CHANGES[kind](problem, value), remote).cost_usd_per_request - local_usd

    def at(kind: ScenarioKind) -> float | None:
        if kind == ScenarioKind.EVEN_ROUTING:
            return _crossing(partial(extra_usd, kind), 0.0, 1.0, float)
        return _crossing(lambda log: extra_usd(kind, math.exp(log)), -math.log(WIDEST_FACTOR), math.log(WIDEST_FACTOR), math.exp)

    return [BreakEven(parameter=kind, against=BaselineName.ALL_LOCAL, at=at(kind)) for kind in CHANGES]


def _crossing(rising: Callable[[float], float], low: float, high: float, shown: Callable[[float], float]) -> float | None:
    """Find where a rising function is 0, by bisection, to three digits; None when not between the ends."""
    if rising(low) > 0 or rising(high) < 0:
        return None
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return float(f"{shown((low + high) / 2):.3g}")


def break_even_traffic(problem: Problem, aim: Aim, by_use: Placement, whole: Mapping[BaselineName, Baseline]) -> BreakEvenTraffic | None:
    """Find the traffic above which an always-on instance is cheaper than a placement paid by use.

    Where the traffic is known, the placement paid by use is the best one, by the scan; else `by_use`. The instance holds all experts, or is
    one of `whole` that runs the whole model on a GPU; where none does, it has remote experts as the scan finds them. Cold starts, which
    make paying by use dearer when requests are rare, are left out.

    Returns None where the catalog lacks one of both kinds, or one of them is never the cheaper.
    """
    unknown = replace(problem.workload.traffic, per_hour=None, gaps_s=())
    idle_free = replace(problem, workload=replace(problem.workload, traffic=unknown, cold_share=0.0, waking=None))
    if problem.workload.requests_per_hour is None and by_use.main.usd_per_hour is None:
        used: Priced | None = Priced(by_use, evaluate(idle_free, by_use))
    else:
        used = best_of(idle_free, replace(aim, objective="cost", budget_usd=None), MainKind.BY_USE)
    if used is None or (rented := _cheapest_hour(idle_free, aim, whole)) is None:
        return None
    busy_s = main_function.busy_s(idle_free, rented.ttft_s, rented.tpot_s, 0.0)
    spare_usd = used.outcome.cost_usd_per_request - rented.functions_usd
    per_hour = rented.usd_per_hour / spare_usd if spare_usd > 0 else math.inf
    if per_hour > 3600 / busy_s:  # an instance that works all the time is still dearer
        return None
    alone_per_hour: float | None = None
    if problem.concurrency > 1:
        one = replace(problem, concurrency=1)
        alone = break_even_traffic(one, aim, by_use, baselines(one, aim).priced)
        alone_per_hour = None if alone is None else alone.requests_per_hour
    return BreakEvenTraffic(
        by_use=used.placement.main.name,
        instance=rented.instance,
        against=rented.runs,
        usd_per_hour=rented.usd_per_hour,
        ttft_s=rented.ttft_s,
        tpot_s=rented.tpot_s,
        requests_per_hour=float(f"{per_hour:.4g}"),
        alone_per_hour=alone_per_hour,
    )


class _Rented(NamedTuple):
    """An instance, what runs on it (None: with remote experts), and what its remote experts cost for a request."""

    usd_per_hour: float
    ttft_s: float
    tpot_s: float
    instance: str
    runs: BaselineName | None
    functions_usd: float = 0.0


def _cheapest_hour(problem: Problem, aim: Aim, whole: Mapping[BaselineName, Baseline]) -> _Rented | None:
    """Find the instance with the least price per hour that meets the targets; of equals, the fastest."""
    aim = replace(aim, budget_usd=None)
    found = [
        _Rented(spec.usd_per_hour, one.outcome.ttft_s, one.outcome.tpot_s, spec.name, BaselineName.ALL_LOCAL)
        for spec in problem.catalog.main.menu
        if spec.usd_per_hour is not None
        and not spec.scales_to_zero
        and (one := all_local_on(problem, spec)) is not None
        and meets(aim, one.outcome)
    ]
    for name in (BaselineName.GPU, BaselineName.STORED_GPU):
        if (gpu := whole.get(name)) is not None and gpu.usd_per_hour is not None and gpu.meets:
            found.append(_Rented(gpu.usd_per_hour, gpu.ttft_s, gpu.tpot_s, gpu.spec, name))
    if not found and (best := best_of(problem, replace(aim, objective="cost"), MainKind.ALWAYS_ON)) is not None:
        outcome, main = best.outcome, best.placement.main
        own_usd = main_function.usd_per_s(problem, main) * main_function.busy_s(problem, outcome.ttft_s, outcome.tpot_s, 0.0)
        functions_usd = outcome.cost_usd_per_request - own_usd
        return _Rented(main.usd_per_hour or 0.0, outcome.ttft_s, outcome.tpot_s, main.name, None, functions_usd)
    return min(found, default=None)
