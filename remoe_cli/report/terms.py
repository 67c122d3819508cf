"""The numbers of a plan's table for what-if questions, worked out with the planner's own functions.

A table that does not give the planner's own figures is refused.

Source: method.md, sections 3, 4, 10 and 11.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from remoe_cli.errors import ArtifactError
from remoe_cli.model.spec import ONE_AT_A_TIME
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.assess.baselines import baselines
from remoe_cli.plan.assess.unquantised import problem_of_copy
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import expert_functions, main_function, prices
from remoe_cli.plan.cost.placement import Placement
from remoe_cli.plan.cost.placement import evaluate as planned
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.cost.steps import own_step_s, step_times
from remoe_cli.plan.document import GPU_BY_USE, Baseline, BaselineName, LayerPlan, MainKind, MainSpec, Outcome, Plan, Unquantised
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES, beside, copy_title, unlike_baselines
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU, owner_of
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import request_of
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.plan.solve.given import broken_limits
from remoe_cli.plan.wording import bought
from remoe_cli.progress import Report, no_report
from remoe_cli.report.what_if import THIS_PLAN, Bill, Machine, Setting, Table, Wait, evaluate
from remoe_cli.simulate.ways import placed, with_instances

_EXACT = 1e-9  # relative difference that floating-point noise explains
_NOISE_DIGITS = 15  # of seconds
_SAME = 1e-6  # relative difference at which a figure of the table is not the planner's
_NUMBERS = (1, 2, 4, 8, 16, 32)  # requests at once that tables are for, beside the plan's own number
Figures = Outcome | Baseline | Unquantised


def table_of(plan: Plan, problem: Problem, catalog: Catalog, report: Report = no_report) -> Table:
    """Work out the tables of a plan, one for each number of requests at once.

    Each is held against the planner's own figures.

    Raises: ArtifactError where a table does not give them.
    """
    placement = placed(plan)
    table = _with_ways(plan, problem, catalog, placement, unlike_baselines(plan), plan.unquantised)
    own = Outcome(cost_usd_per_request=plan.cost_usd_per_request, ttft_s=plan.ttft_s, tpot_s=plan.tpot_s)
    _check(table, {THIS_PLAN: own, **beside(plan)})
    if problem.invocations == "per-expert" or plan.method == "paper" or problem.spec.family in ONE_AT_A_TIME:
        return table
    others, most = [table], ""
    for done, number in enumerate(_NUMBERS):
        report(done, len(_NUMBERS))
        if number == problem.concurrency:
            continue
        at = replace(problem, concurrency=number)
        placement = with_instances(at, placement)
        if number > problem.concurrency and (limits := broken_limits(at, placement)):
            most = f"The slider ends where {number} requests at once would break a limit: {limits[0]}."
            break
        others.append(_at_once(plan, at, catalog, placement))
    report(len(_NUMBERS), len(_NUMBERS))
    if all(machine.at_once == 1 for one in others for machine in (one.main, *one.baselines)):
        return table
    return table.model_copy(update={"others": tuple(others[1:]), "most": most})


def _at_once(plan: Plan, problem: Problem, catalog: Catalog, placement: Placement) -> Table:
    """Work out the table for another number of requests at once, without ways that cannot serve so many.

    A baseline is the best one of its kind for that number, as the planner finds it.
    """
    found = baselines(problem, request_of(plan).aim).priced
    known = {name: found[name] for name in unlike_baselines(plan) if name in found}
    copy, own = plan.unquantised, planned(problem, placement)
    stated: dict[str, Figures] = {THIS_PLAN: own} | {BASELINE_TITLES[name]: one for name, one in known.items()}
    if copy is not None:
        of_copy = problem_of_copy(problem)
        elsewhere = with_instances(of_copy, _placement_of(copy, catalog))
        stated[copy_title(copy)] = planned(of_copy, elsewhere)
        copy = None if broken_limits(of_copy, elsewhere) else copy
    table = _with_ways(plan, problem, catalog, placement, known, copy)
    _check(table, stated)
    return table


def _placement_of(copy: Unquantised, catalog: Catalog) -> Placement:
    return Placement(next(spec for spec in catalog.main.menu if spec.name == copy.spec), copy.layers, copy.instances)


def _with_ways(
    plan: Plan, problem: Problem, catalog: Catalog, placement: Placement, known: Mapping[BaselineName, Baseline], copy: Unquantised | None
) -> Table:
    """Work out the table of a plan's placement, of baselines, and of a copy's placement."""
    of_copy = None
    if copy is not None:
        of_copy = _table(plan, problem_of_copy(problem), catalog, _placement_of(copy, catalog), copy_title(copy))
    machines = tuple(_machine(plan, problem, BASELINE_TITLES[name], one) for name, one in known.items())
    table = _table(plan, problem, catalog, placement, THIS_PLAN)
    return table.model_copy(update={"baselines": machines, "unquantised": of_copy})


def _table(plan: Plan, problem: Problem, catalog: Catalog, placement: Placement, title: str) -> Table:
    """Work out the table of one placement under a plan's requests, without what is beside it."""
    concurrency, problem = problem.concurrency, problem.at_main(placement.main)
    side, warm, zero = catalog.function, expert_functions.warm(problem), catalog.zero
    implied = Traffic(plan.workload.lengths, plan.workload.requests_per_hour)
    waking = plan.workload.waking
    follows = math.isclose(implied.cold_share(side.idle_ttl_s), plan.workload.cold_share, rel_tol=_EXACT, abs_tol=_EXACT)
    wakes = zero is not None and waking is not None and implied.waking(zero.idle_s, zero.wake_s) == waking
    with_functions = [index for index, layer in enumerate(placement.layers) if layer.parts]
    always_on = replace(placement, main=placement.main.model_copy(update={"usd_per_hour": 1.0, "scales_to_zero": False}))
    return Table(
        concurrency=concurrency,
        n_out=plan.workload.n_out,
        overhead_s=warm.elapsed_s,
        billed_s=tuple(warm.billed_s.tolist()),
        granule_s=side.billing_granularity_ms / 1000,
        call_usd=side.usd_per_request,
        log_usd=prices.log_usd(catalog),
        per_hour=plan.workload.requests_per_hour,
        cold_share=plan.workload.cold_share,
        cold_after_s=side.idle_ttl_s if follows else None,
        waking=(waking.wake_share, waking.up_share) if waking else None,
        wake=(zero.idle_s, zero.wake_s) if zero is not None and (wakes or plan.workload.requests_per_hour is None) else None,
        ttft=_ttft(problem, placement),
        step=_step(problem, placement) if problem.is_one_token else _shared_step(problem, placement),
        passes=problem.drafting.passes,
        bill=_bill(problem, placement, with_functions),
        functions_wait_s=cold_wait_s(problem, always_on),
        main=_main(problem, placement, title),
    )


def _check(table: Table, stated: Mapping[str, Figures]) -> None:
    for title, ours in evaluate(table, Setting(per_hour=table.per_hour)).items():
        theirs = stated[title]
        pairs = ((ours.usd, theirs.cost_usd_per_request), (ours.ttft_s, theirs.ttft_s), (ours.tpot_s, theirs.tpot_s))
        for one, other in pairs:
            if (one is None) != (other is None) or (other is not None and not math.isclose(other, one or 0.0, rel_tol=_SAME)):
                raise ArtifactError(
                    f"The formulas of the page give {one} for '{title}', and the plan states {other}.",
                    "Make the plan again with this version of remoe.",
                )


def _wait(constant_s: float, calls: Iterable[tuple[float, float, float, float]]) -> Wait:
    """Write the sum of weight * max(floor, base + slope * overhead) as a wait."""
    terms: dict[float, float] = defaultdict(float)
    for weight, floor_s, base_s, slope in calls:
        constant_s += weight * max(floor_s, base_s)
        terms[_merged(max(0.0, (floor_s - base_s) / slope))] += weight * slope
    return Wait(constant_s=constant_s, terms=tuple((weight, slack_s) for slack_s, weight in terms.items()))


def _ttft(problem: Problem, placement: Placement) -> Wait:
    """Write TTFT of a mean warm request as a wait."""
    calls = []
    constant_s = sum(kind.share * main_function.prefill_rest_s(problem, placement.main, kind.n_in) for kind in problem.workload.lengths)
    for index, layer in enumerate(placement.layers):
        owner = owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu)[0]
        for kind in problem.workload.lengths:
            tokens = problem.workload.use[index] * kind.n_in
            local_s = float(main_function.expert_prefill_s(problem, placement.main, tokens)[owner == ON_CPU].sum())
            if layer.gpu:
                local_s = max(local_s, float(main_function.gpu_expert_prefill_s(problem, placement.main, tokens)[owner == ON_GPU].sum()))
            inside_s, _ = _prompt_calls(problem, index, layer, kind.n_in)
            if len(inside_s):
                calls.append((kind.share, local_s, float(inside_s.max()), 1.0))
            else:
                constant_s += kind.share * local_s
    return _wait(constant_s, calls)


def _prompt_calls(problem: Problem, index: int, layer: LayerPlan, n_in: int) -> tuple[Floats, Floats]:
    """Compute the seconds inside the function, and the rows, of each call that a prompt makes in one layer."""
    if not layer.parts:
        return np.zeros(0), np.zeros(0)
    tokens = problem.workload.use[index] * n_in
    owner = np.maximum(owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu), ON_CPU)
    at = expert_functions.shared_out(problem, owner, tokens, layer.replicas)
    memory = np.array([float(layer.memory_mb)])
    work_s = expert_functions.expert_work_s(problem, memory[:, None], tokens).T
    work, rows = expert_functions.loads(tokens, work_s, at, max(len(layer.parts), layer.replicas))
    inside_s = expert_functions.inside_s(problem, memory, work, rows[..., None])[:, 0, 0]
    return inside_s[rows[:, 0] > 0], rows[rows[:, 0] > 0, 0]


def _step(problem: Problem, placement: Placement) -> Wait:
    """Write the decode step of one request as a wait: each pair of what a token hits is a call."""
    calls = []
    step_s = main_function.expert_step_s(problem, placement.main)
    constant_s = main_function.decode_rest_s(problem, placement.main)
    for index, layer in enumerate(placement.layers):
        if not layer.parts and not layer.gpu:
            constant_s += float(problem.workload.decode_hits[index].sum()) * step_s
            continue
        hits = problem.workload.hits.of_parts(index, layer.parts, layer.gpu)
        floor_s = hits.local * step_s
        if hits.gpu is not None:
            floor_s = np.maximum(floor_s, hits.gpu * main_function.gpu_expert_step_s(problem, placement.main))
        one_by_one = problem.invocations == "per-expert"
        for share, least_s, remote in zip(hits.shares[0].tolist(), floor_s.tolist(), hits.busiest.tolist(), strict=True):
            if not remote:
                constant_s += share * least_s
                continue
            inside_s, number = float(expert_functions.decode_inside_s(problem, layer.memory_mb, 1 if one_by_one else remote)), 1.0
            if one_by_one:
                inside_s, number = inside_s * remote, float(remote)
            calls.append((share, least_s, inside_s, number))
    return _wait(constant_s, calls)


def _shared_step(problem: Problem, placement: Placement) -> Wait:
    """Write the decode step of several rows as a wait: each drawn step of a layer is a call."""
    calls = []
    constant_s = main_function.decode_rest_s(problem, placement.main)
    times = step_times(problem, placement.main)
    for index, layer in enumerate(placement.layers):
        own_s = own_step_s(_owner(problem, layer), problem.step_rows(index), times)[0]
        if not layer.parts:
            constant_s += float(own_s.mean())
            continue
        slowest_s = np.max(_step_calls(problem, index, layer), axis=0)
        for least_s, inside_s in zip(own_s.tolist(), slowest_s.tolist(), strict=True):
            if inside_s < 0:
                constant_s += least_s / len(own_s)
            else:
                calls.append((1 / len(own_s), least_s, inside_s, 1.0))
    return _wait(constant_s, calls)


def _step_calls(problem: Problem, index: int, layer: LayerPlan) -> Floats:
    """Compute the seconds inside each function in each drawn step of one layer; negative where it is not called.

    Shapes: [functions, M].
    """
    owner, rows = _owner(problem, layer)[0], problem.step_rows(index)
    here = np.array([owner == function for function in range(len(layer.parts))], dtype=np.float64)
    work_s = here @ expert_functions.expert_work_s(problem, layer.memory_mb, np.arange(problem.step_tokens + 1))[rows]
    sent = here @ rows
    return np.where(sent > 0, expert_functions.inside_s(problem, layer.memory_mb, work_s, sent), -1.0)


def _owner(problem: Problem, layer: LayerPlan) -> Ints:
    return owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu)


def _merged(seconds: float) -> float:
    """Round away floating-point noise, so that terms that are alike become one."""
    return round(seconds, _NOISE_DIGITS)


def _bill(problem: Problem, placement: Placement, layers: list[int]) -> Bill:
    terms: dict[float, float] = defaultdict(float)
    calls = cold_usd = all_cold_usd = 0.0
    all_cold = replace(problem, workload=replace(problem.workload, cold_share=1.0))
    for index in layers:
        layer = placement.layers[index]
        biggest, memory = np.array([max(map(len, layer.parts))]), [layer.memory_mb]
        usd_per_s = float(expert_functions.function_usd_per_s(problem, memory, biggest)[0, 0])
        for kind in problem.workload.lengths:
            for inside_s in _prompt_calls(problem, index, layer, kind.n_in)[0].tolist():
                terms[inside_s] += kind.share * usd_per_s
                calls += kind.share
        passes = problem.workload.n_out * problem.drafting.passes
        for inside_s, number in _decode_calls(problem, index, layer):
            terms[inside_s] += passes * number * usd_per_s
            calls += passes * number
        instances = len(layer.parts) * layer.replicas
        cold_usd += instances * float(expert_functions.cold_s(problem, biggest)[0]) * usd_per_s
        all_cold_usd += float(expert_functions.cold_usd(all_cold, memory, biggest, instances)[0, 0])
    found = tuple((usd, inside_s) for inside_s, usd in terms.items() if usd)
    return Bill(terms=found, calls=calls, cold_usd=cold_usd, reads_usd=all_cold_usd - cold_usd)


def _decode_calls(problem: Problem, index: int, layer: LayerPlan) -> Iterator[tuple[float, float]]:
    """Yield the seconds inside the function of the calls of a decode step, and how many of them a request has."""
    if not problem.is_one_token:
        inside = _step_calls(problem, index, layer)
        yield from ((_merged(one), 1 / (inside.shape[1] * problem.concurrency)) for one in inside[inside >= 0].tolist())
        return
    each, one_by_one = problem.workload.hits.of_parts(index, layer.parts, layer.gpu).calls[0], problem.invocations == "per-expert"
    for hit in range(1, len(each)):
        inside_s = float(expert_functions.decode_inside_s(problem, layer.memory_mb, 1 if one_by_one else hit))
        yield inside_s, float(each[hit]) * (hit if one_by_one else 1)


def _main(problem: Problem, placement: Placement, title: str) -> Machine:
    spec, found = placement.main, main_function.prices_of(problem, placement.bought)
    return Machine(
        title=title,
        spec=spec.name,
        kind=spec.kind,
        usd_per_s=found.usd_per_s,
        usd_per_hour=spec.usd_per_hour or 0.0,
        fee_usd=found.usd_per_request,
        reads_usd=prices.main_reads(problem.catalog, spec) * found.usd_per_read,
        start_s=cold_wait_s(problem, placement) if spec.starts else 0.0,
        at_once=problem.concurrency,
    )


def _machine(plan: Plan, problem: Problem, title: str, baseline: Baseline) -> Machine:
    """Read the machine of a baseline from its figures in the plan; fees are those of the catalog."""
    catalog = problem.catalog
    spec = next((one for one in (*catalog.main.menu, *catalog.reference.gpus) if one.name == baseline.spec), None)
    kind = MainKind.BY_USE if baseline.usd_per_hour is None else spec.kind if spec is not None else MainKind.ALWAYS_ON
    found = prices.main_prices(catalog, spec) if spec is not None and kind != MainKind.ALWAYS_ON else None
    fee_usd = found.usd_per_request if found else 0.0
    reads_usd = prices.main_reads(catalog, spec) * found.usd_per_read if found and spec else 0.0
    cold = _planned_cold(plan, kind)
    at_once = problem.at_main(spec or MainSpec(name=GPU_BY_USE, memory_mb=1)).concurrency
    cold_s = cold * baseline.cold_start_s
    own_s = (baseline.ttft_s - cold_s + plan.workload.n_out * baseline.tpot_s) / at_once + cold_s
    by_use_usd = (baseline.cost_usd_per_request or 0.0) - fee_usd - cold * reads_usd
    return Machine(
        title=title,
        spec=bought(baseline.spec),
        kind=kind,
        ideal=baseline.ideal,
        ttft_s=baseline.ttft_s - cold_s,
        tpot_s=baseline.tpot_s,
        usd_per_s=by_use_usd / own_s if kind == MainKind.BY_USE else (baseline.usd_per_hour or 0.0) / 3600,
        usd_per_hour=baseline.usd_per_hour or 0.0,
        fee_usd=fee_usd,
        reads_usd=reads_usd,
        start_s=baseline.cold_start_s,
        at_once=at_once,
    )


def _planned_cold(plan: Plan, kind: MainKind) -> float:
    match kind:
        case MainKind.BY_USE:
            return plan.workload.cold_share
        case MainKind.TO_ZERO:
            return plan.workload.waking.wake_share if plan.workload.waking else 0.0
        case MainKind.ALWAYS_ON:
            return 0.0
