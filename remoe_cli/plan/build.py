"""From a profile and a catalog to a plan: solve, compare with all experts local, and say whether it is worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from remoe_cli.plan import cost
from remoe_cli.plan.catalog import Catalog
from remoe_cli.plan.columns import Columns, build_columns
from remoe_cli.plan.document import LayerPlan, Outcome, Plan, Source, Targets, WorkloadRef
from remoe_cli.plan.exact import SLACK, Solution, Task, solve
from remoe_cli.plan.explain import per_million
from remoe_cli.plan.forced import forced_sets
from remoe_cli.plan.infeasible import diagnose
from remoe_cli.plan.workload import ENUMERATED_EXPERTS, Bools, candidate_sets, from_profile
from remoe_cli.profile.record import Profile

GAP = 1e-3
Verdict = Literal["recommended", "not recommended", "insufficient evidence"]
MIN_TRACE_TOKENS = 200  # below, a hit probability of 1% rests on fewer than two tokens
ALL_LOCAL = "all-local"


@dataclass(frozen=True)
class _Baseline:
    """All experts local (MIX*): at the best main spec that meets the targets, else at the cheapest that holds them."""

    placement: cost.Placement
    outcome: Outcome
    meets: bool


def make_plan(
    profile: Profile,
    catalog: Catalog,
    *,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    n_in: int | None = None,
    n_out: int | None = None,
    remote_share: float | None = None,
    time_limit_s: float = 120.0,
) -> Plan:
    """The cheapest plan under the targets, or with `remote_share` the cheapest around that forced placement.

    Same input, same bytes, unless the time limit cuts the search short. Costs are of warm, sequential requests: cold starts
    are not billed. Raises InfeasibleError when no plan meets the limits, and what `from_profile` and `forced_sets` raise.
    """
    workload = from_profile(profile, n_in, n_out)
    problem = cost.Problem(profile.record.spec, profile.record.latency, catalog, workload)
    targets = Targets(ttft_s=ttft_s, tpot_s=tpot_s)
    forced = None if remote_share is None else forced_sets(workload, remote_share)
    exact_columns, exact = _solve(problem, candidate_sets(workload), targets, time_limit_s)
    columns, solution = (exact_columns, exact) if forced is None else _solve(problem, forced, targets, time_limit_s)
    placement = cost.Placement(solution.main, columns.layer_plans(problem, solution.chosen))
    outcome = cost.evaluate(problem, placement)
    baseline = _all_local(problem, targets)
    if forced is None and baseline and baseline.meets and _no_dearer(baseline.outcome, outcome.cost_usd_per_request):
        placement, outcome = baseline.placement, baseline.outcome  # within its gap, the solver may miss even this one
    lower = min(exact.lower_bound, outcome.cost_usd_per_request)
    gap = (outcome.cost_usd_per_request - lower) / outcome.cost_usd_per_request if outcome.cost_usd_per_request > 0 else 0.0
    verdict, reason = _verdict(problem, placement, outcome, baseline)
    return Plan(
        profile=Source(path=str(profile.path), sha256=profile.sha256),
        catalog=catalog.file,
        workload=WorkloadRef(n_in=workload.n_in, n_out=workload.n_out),
        targets=targets,
        objective="cost",
        placement="exact" if forced is None else "forced",
        **outcome.model_dump(),
        lower_bound_usd=lower,
        gap=gap,
        status="forced" if forced is not None else "time-limit" if solution.timed_out else "optimal" if gap <= SLACK else "within-gap",
        verdict=verdict,
        reason=" ".join([reason, *_caveats(problem)]),
        main=placement.main,
        layers=placement.layers,
        baselines={ALL_LOCAL: baseline.outcome} if baseline else {},
    )


def _solve(problem: cost.Problem, candidates: tuple[Bools, ...], targets: Targets, time_limit_s: float) -> tuple[Columns, Solution]:
    columns = build_columns(problem, candidates)
    if any(layer not in columns.layer for layer in range(len(candidates))):
        raise diagnose(problem, candidates, targets.ttft_s, targets.tpot_s, time_limit_s)
    solution = solve(Task(problem, columns, "cost", targets.ttft_s, targets.tpot_s), GAP, time_limit_s)
    if solution is None:
        raise diagnose(problem, candidates, targets.ttft_s, targets.tpot_s, time_limit_s)
    return columns, solution


def _all_local(problem: cost.Problem, targets: Targets) -> _Baseline | None:
    layers = tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in problem.spec.moe_layers)
    experts = problem.spec.experts_per_layer * len(layers)
    found = []
    for main in problem.catalog.main.menu:
        if cost.local_capacity(problem, main) >= experts:
            placement = cost.Placement(main, layers)
            outcome = cost.evaluate(problem, placement)
            found.append(_Baseline(placement, outcome, _meets(outcome, targets)))
    meeting = [b for b in found if b.meets] or found
    least = min((b.outcome.cost_usd_per_request for b in meeting), default=0.0)
    # Below the vCPUs measured, time x memory is the same for all specs: of equally dear ones the fastest counts.
    return min((b for b in meeting if _no_dearer(b.outcome, least)), key=lambda b: b.outcome.ttft_s, default=None)


def _no_dearer(outcome: Outcome, usd: float) -> bool:
    return outcome.cost_usd_per_request <= usd * (1 + SLACK)


def _meets(outcome: Outcome, targets: Targets) -> bool:
    pairs = ((outcome.ttft_s, targets.ttft_s), (outcome.tpot_s, targets.tpot_s))
    return all(target is None or value <= target * (1 + SLACK) for value, target in pairs)


def _verdict(problem: cost.Problem, placement: cost.Placement, outcome: Outcome, baseline: _Baseline | None) -> tuple[Verdict, str]:
    tokens = len(problem.workload.trace)
    if tokens < MIN_TRACE_TOKENS:
        return "insufficient evidence", (
            f"The profile traced {tokens} decode tokens; at least {MIN_TRACE_TOKENS} are needed to tell how often experts are used."
        )
    usd = outcome.cost_usd_per_request
    if baseline is None:
        need = int(np.ceil(cost.main_memory_bytes(problem, problem.spec.experts_per_layer * len(placement.layers)) / cost.MB))
        largest = problem.catalog.main.menu[-1].memory_mb
        return "recommended", (
            f"All experts local need a main function of {need} MB, and the largest has {largest} MB; "
            f"this plan costs {per_million(usd)} requests, warm."
        )
    if not baseline.meets:
        local = baseline.outcome
        return "recommended", (
            f"With all experts local no main spec meets the targets (on {baseline.placement.main.name}: TTFT {local.ttft_s:.4g} s, "
            f"TPOT {local.tpot_s:.4g} s); this plan costs {per_million(usd)} requests, warm."
        )
    local_usd = baseline.outcome.cost_usd_per_request
    change = usd / local_usd - 1 if local_usd > 0 else 0.0
    if usd < local_usd * (1 - GAP):
        return "recommended", (
            f"It costs {per_million(usd)} requests, warm: {-change:.1%} less than all experts local "
            f"on {baseline.placement.main.name} ({per_million(local_usd)})."
        )
    remote = sum(len(layer.remote) for layer in placement.layers)
    if remote:
        start = (
            f"With {remote} experts remote it costs {per_million(usd)} requests, warm, "
            f"against {per_million(local_usd)} with all experts local on {baseline.placement.main.name} ({change:+.1%})."
        )
    else:
        start = f"Keeping all experts local, on {placement.main.name}, is the cheapest plan: {per_million(usd)} requests, warm."
    return "not recommended", f"{start} {_break_even(problem, baseline)}"


def _caveats(problem: cost.Problem) -> list[str]:
    """What the numbers leave out, in whole sentences."""
    prefix = problem.spec.experts_per_layer > ENUMERATED_EXPERTS
    among = ["The bound is for plans that send each layer's least used experts away."] if prefix else []
    return [*among, *problem.workload.assumptions, "Cold starts are not billed."]


def _break_even(problem: cost.Problem, baseline: _Baseline) -> str:
    """The best single expert to send away: what its memory costs in the main function against what its invocations cost."""
    seconds = baseline.outcome.ttft_s + problem.workload.n_out * baseline.outcome.tpot_s
    saved = seconds * problem.catalog.main.usd_per_gb_second * problem.spec.expert_bytes / (cost.GB_MB * cost.MB)
    experts = problem.spec.experts_per_layer
    columns = build_columns(problem, (np.eye(experts, dtype=bool),) * len(problem.spec.moe_layers))
    if not len(columns.count):
        return "No expert fits an expert function."
    best = int(columns.bill_usd.argmin())
    share = float(columns.shares[:, best] @ (columns.call_s[:, best] > 0))
    layer = problem.spec.moe_layers[columns.layer[best]]
    return (
        f"A remote expert saves {per_million(saved)} requests in main memory; the cheapest to send away (layer {layer}, "
        f"hit by {share:.1%} of decode tokens) would cost {per_million(float(columns.bill_usd[best]))} in invocations, "
        f"before what waiting for it adds."
    )
