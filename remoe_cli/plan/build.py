"""From a profile and a catalog to a plan: choose a placement, compare it with what else there is, and say whether it is worth it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from remoe_cli.plan.arrays import Bools
from remoe_cli.plan.assess.baselines import baselines
from remoe_cli.plan.assess.robustness import break_even_traffic, break_evens, held_out, scenarios, unpredicted
from remoe_cli.plan.assess.verdict import judge, notes
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import evaluate, layer_outcomes
from remoe_cli.plan.document import Costs, Method, Outcome, Plan, PlannedModel, Source, Status, Targets, WorkloadRef
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import GAP, Solution, solve
from remoe_cli.plan.solve.forced import forced_sets
from remoe_cli.plan.solve.given import read_placement
from remoe_cli.plan.solve.infeasible import diagnose
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class _Chosen:
    """A placement, who chose it, and the bound of the objective where there is one."""

    placement: Placement
    method: Method
    bound: float | None
    timed_out: bool
    gain: float = 0.0


def make_plan(profile: Profile, catalog: Catalog, request: PlanRequest | None = None) -> Plan:
    """The plan that is request. Same input, same bytes, unless the time limit cuts the search short.

    Raises InfeasibleError when no plan meets the limits, and what `from_profile`, `forced_sets` and `read_placement` raise.
    """
    request = request or PlanRequest()
    problem, aim = make_problem(profile, catalog, request), request.aim
    chosen = _choose(problem, request)
    others = baselines(problem, aim)
    outcome = evaluate(problem, chosen.placement)
    value = aim.value(outcome)
    local = others.all_local
    if chosen.method in ("exact", "scan") and local and meets(aim, local.outcome) and aim.value(local.outcome) <= value * (1 + SLACK):
        # Within its gap, the solver may miss even this one.
        chosen, outcome, value = replace(chosen, placement=local.placement, gain=0.0), local.outcome, aim.value(local.outcome)
    bound = None if chosen.bound is None else min(chosen.bound, value)
    gap = None if bound is None else (value - bound) / value if value > 0 else 0.0
    judgement = judge(problem, aim, chosen.placement, outcome, others)
    examined = request.examine and problem.workload.trace.shape[0] > 0
    searched = None
    if examined:
        searched = unpredicted(problem, profile, aim, chosen.placement) if request.routing else held_out(problem, profile, aim)
    workload = problem.workload
    return Plan(
        profile=Source(path=str(profile.path), sha256=profile.sha256),
        catalog=catalog.file,
        prices_of=catalog.oldest_price.isoformat(),
        model=PlannedModel(
            name=profile.record.model.path,
            revision=profile.record.model.revision,
            experts_per_layer=problem.spec.experts_per_layer,
            expert_bytes=problem.spec.expert_bytes,
            nonexpert_bytes=problem.spec.nonexpert_bytes,
        ),
        workload=WorkloadRef(
            n_in=workload.n_in,
            n_out=workload.n_out,
            kinds=workload.lengths if len(workload.lengths) > 1 else (),
            requests_per_hour=workload.requests_per_hour,
            cold_share=workload.cold_share,
            routing=request.routing,
        ),
        invocations=problem.invocations,
        targets=Targets(ttft_s=aim.ttft_s, tpot_s=aim.tpot_s, budget_usd=aim.budget_usd),
        objective=aim.objective,
        method=chosen.method,
        **outcome.model_dump(),
        lower_bound_usd=bound if aim.objective == "cost" else None,
        lower_bound_s=bound if aim.objective != "cost" else None,
        gap=gap,
        status=_status(chosen, gap),
        verdict=judgement.verdict,
        basis=judgement.basis,
        reason=judgement.reason,
        notes=tuple([*notes(problem, chosen.placement, chosen.method, chosen.gain), *_bound_note(profile, chosen)]),
        main=chosen.placement.main,
        instances=chosen.placement.instances,
        layers=chosen.placement.layers,
        costs=_costs(problem, chosen.placement, outcome),
        baselines=others.priced,
        missing=others.missing,
        scenarios=tuple([*scenarios(problem, aim, chosen.placement), *([searched] if searched else [])]) if examined else (),
        break_evens=tuple(break_evens(problem, aim, chosen.placement, local)) if examined else (),
        break_even_traffic=break_even_traffic(problem, aim) if examined else None,
    )


def _choose(problem: Problem, request: PlanRequest) -> _Chosen:
    aim = request.aim
    if request.placement_file is not None:
        return _Chosen(read_placement(request.placement_file, problem), "given", None, False)
    if request.remote_share is not None:
        forced = _solved(problem, forced_sets(problem.workload, request.remote_share), aim, request.time_limit_s, None)
        exact = _exact(problem, request)
        return replace(_of(forced, "forced"), bound=exact.bound)
    match request.solver:
        case "exact":
            return _exact(problem, request)
        case "paper":
            from remoe_cli.plan.paper.heuristic import paper_plan

            found = paper_plan(problem, aim)
        case _:
            found = scan(problem, aim)
    if found is None:
        # A heuristic finds no plan: say what is impossible, or leave it to the solver that finds all.
        exact = _exact(problem, request)
        return exact if request.solver == "scan" else _none(request)
    return replace(_of(found, request.solver), bound=None)


def _bound_note(profile: Profile, chosen: _Chosen) -> list[str]:
    """The paper's heuristic rests on a bound, whose coverage belongs beside what it chose."""
    if chosen.method != "paper":
        return []
    from remoe_cli.plan.paper.bound import measured_note

    remote = max(len(layer.remote) for layer in chosen.placement.layers)
    note = measured_note(profile.counts("prefill"), profile.arrays["prompt_tokens"], profile.record.spec.top_k, remote)
    return [note] if note else []


def _none(request: PlanRequest) -> _Chosen:
    from remoe_cli.errors import InfeasibleError

    raise InfeasibleError(
        f"The {request.solver} solver finds no plan that meets the targets, though there are some.",
        "Use --solver exact, or looser targets.",
    )


def _exact(problem: Problem, request: PlanRequest) -> _Chosen:
    candidates = candidate_sets(problem.workload)
    solution = _solved(problem, candidates, request.aim, request.time_limit_s, scan(problem, request.aim))
    better = improve(problem, request.aim, solution) if len(candidates[0]) == problem.spec.experts_per_layer + 1 else solution
    return replace(_of(better, "exact"), bound=solution.lower_bound, gain=1 - better.value / solution.value if solution.value else 0.0)


def _solved(problem: Problem, candidates: tuple[Bools, ...], aim: Aim, time_limit_s: float, start: Solution | None) -> Solution:
    columns = build_columns(problem, candidates)
    solution = None if columns.empty_layers else solve(Task(problem, columns, aim), GAP, time_limit_s, start)
    if solution is None:
        raise diagnose(problem, candidates, aim, time_limit_s)
    return solution


def _of(solution: Solution, method: Method) -> _Chosen:
    return _Chosen(solution.placement, method, solution.lower_bound, solution.timed_out)


def _costs(problem: Problem, placement: Placement, outcome: Outcome) -> Costs:
    layers_usd = tuple(layer.usd for layer in layer_outcomes(problem, placement))
    return Costs(main_usd=outcome.cost_usd_per_request - sum(layers_usd), layers_usd=layers_usd)


def _status(chosen: _Chosen, gap: float | None) -> Status:
    if chosen.method == "forced" or chosen.method == "given":
        return chosen.method
    if gap is None:
        return "heuristic"
    return "time-limit" if chosen.timed_out else "optimal" if gap <= SLACK else "within-gap"
