"""The way of `remoe plan` through the code, stage by stage. `make_plan` is the pipeline.

1. **Ask.** `PlanRequest` (problem/request.py) holds what the command line asks for. `make_problem` turns it, a profile and a catalog into
   a `Problem`: the model's sizes, its measured or described times, prices, and the `Workload` (`from_profile`), which says how often
   requests come, how long they are, and how often experts are used. `Aim` says what shall be least, and under which targets.
2. **Choose.** `_choose` takes the placement from a file (`read_placement`), from the paper's heuristic (`paper_plan`), or from the planner:
   `candidate_sets` lists the remote sets of each layer that are weighed, or `forced_sets` fixes them for --remote-share;
   `build_columns` prices every set at every memory size, number of functions and number of replicas;
   `scan` finds a good plan quickly, `solve` searches all main functions for the best one and proves a lower bound,
   and `improve` exchanges single experts. `_best_form` does so for both forms where functions may compute experts in either. Where no
   plan meets the targets, `diagnose` says which limit fails and what would do.
   `_or_all_local` keeps all experts local where that is no worse. Where the planner also chooses how many draft tokens a pass may have,
   each number is a part of the problem (`Problem.parts`), with a bound of its own.
3. **Compare.** `baselines` (assess/baselines.py) prices the other ways to run the model, with drafts of the same length.
4. **Judge.** `break_even_traffic` (assess/robustness.py) finds the traffic above which an always-on instance is cheaper, and `judge`
   (assess/verdict.py) says whether the plan is worth it, and why; `notes` says what was assumed.
5. **Doubt.** `by_kind` (assess/kinds.py) finds the best plan with each kind of main function.
   `unquantised` (assess/unquantised.py) does so for a copy that is not quantised, where the checkpoint is.
   `scenarios`, `held_out`, `unpredicted` and `break_evens` (assess/robustness.py) price the plan where calls, prices or routing
   differ.
6. **Write down.** `Plan` (document.py) takes it all. The command line then has `verify` (verify/check.py) work out every figure again
   with code of its own, writes the file, and shows the rows of explain/rows.py.

Stages 2 to 5 share one cost model: `evaluate` (cost/placement.py) over cost/main_function.py and cost/expert_functions.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from remoe_cli.errors import InfeasibleError, OverBudgetError, UsageError
from remoe_cli.model.draft import Speculate
from remoe_cli.plan.assess.baselines import Baselines, baselines
from remoe_cli.plan.assess.kinds import by_kind
from remoe_cli.plan.assess.robustness import break_even_traffic, break_evens, held_out, scenarios, unpredicted
from remoe_cli.plan.assess.unquantised import unquantised
from remoe_cli.plan.assess.verdict import judge, notes
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import Priced, evaluate, layer_outcomes
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.cost.requests import first_broken, holding_too, spread, with_timeouts
from remoe_cli.plan.document import Costs, Method, Outcome, Plan, PlannedModel, Source, Status, Targets, WorkloadRef
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, forms_of, make_problem
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.plan.solve.candidates import ENUMERATED_EXPERTS, Sets, candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import GAP, Solution, solve
from remoe_cli.plan.solve.forced import forced_sets
from remoe_cli.plan.solve.given import read_placement
from remoe_cli.plan.solve.infeasible import diagnose
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.loss_record import loss_warning
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class _Chosen:
    """A placement, the method that chose it, and the lower bound of the objective where there is one.

    gain        share of the solver's value that exchanging single experts saved
    speculate   the length of drafts that it is for
    is_beaten   whether this is only the plan in another form that was to be beaten, and was not
    """

    placement: Placement
    method: Method
    bound: float | None
    timed_out: bool
    gain: float = 0.0
    speculate: Speculate = "off"
    is_beaten: bool = False


def make_plan(profile: Profile, catalog: Catalog, request: PlanRequest | None = None) -> Plan:
    """Make the plan that is asked for.

    The same input gives the same bytes, unless the time limit ends the search.

    Raises: InfeasibleError when no plan meets the limits, and what `from_profile`, `forced_sets` and `read_placement` raise.
    """
    request = request or PlanRequest()
    problem, aim = make_problem(profile, catalog, request), request.aim
    _refuse_hours_without_traffic(problem)
    problem, chosen, others = _best_form(problem, request)
    outcome = evaluate(problem, chosen.placement)
    value = aim.value(outcome)
    bound = None if chosen.bound is None else min(chosen.bound, value)
    gap = None if bound is None else (value - bound) / value if value > 0 else 0.0
    examined = request.examine and len(problem.workload.trace) > 0
    traffic = None
    if examined or problem.workload.requests_per_hour is None:
        traffic = break_even_traffic(problem, aim, chosen.placement, others.priced)
    asked = request.remote_share is not None or request.placement_file is not None
    judgement = judge(problem, aim, chosen.placement, outcome, others, traffic, asked=asked)
    plan = Plan(
        profile=Source(path=str(profile.path), sha256=profile.sha256),
        catalog=catalog.file,
        prices_of=catalog.oldest_price.isoformat(),
        model=PlannedModel(
            name=profile.record.model.path,
            revision=profile.record.model.revision,
            experts_per_layer=problem.spec.experts_per_layer,
            expert_bytes=problem.spec.expert_bytes,
            nonexpert_bytes=problem.spec.nonexpert_bytes,
            read_expert_bytes=problem.spec.read_expert_bytes if problem.spec.is_served_quantised else None,
            read_nonexpert_bytes=problem.spec.read_nonexpert_bytes if problem.spec.is_served_quantised else None,
            packed=problem.spec.is_packed,
            experts=None if (remote := problem.spec.remote) is None else remote.form,
            fetched_bytes=None if remote is None else remote.expert_bytes,
        ),
        workload=_workload_ref(problem.workload, request),
        invocations=problem.invocations,
        targets=Targets(
            ttft_s=aim.ttft_s,
            tpot_s=aim.tpot_s,
            budget_usd=aim.budget_usd,
            ttft_percentile=aim.ttft_percentile,
            ttft_at=problem.ttft_at,
        ),
        objective=aim.objective,
        method=chosen.method,
        **outcome.model_dump(),
        spread=spread(problem, chosen.placement, outcome.tpot_s),
        cold_start_s=cold_wait_s(problem, chosen.placement),
        lower_bound_usd=bound if aim.objective == "cost" else None,
        lower_bound_s=bound if aim.objective != "cost" else None,
        gap=gap,
        status=_status(chosen, gap),
        verdict=judgement.verdict,
        basis=judgement.basis,
        reason=judgement.reason,
        notes=tuple([*notes(problem, chosen.placement, chosen.method, chosen.gain), *_bound_note(profile, chosen), *_loss_note(profile)]),
        main=chosen.placement.main,
        instances=chosen.placement.instances,
        concurrency=problem.at_main(chosen.placement.main).concurrency,
        speculate=problem.speculate,
        layers=with_timeouts(problem, chosen.placement.layers, chosen.placement.main),
        costs=_costs(problem, chosen.placement, outcome),
        baselines=others.priced,
        missing=others.missing,
        break_even_traffic=traffic,
    )
    if not examined:
        return plan
    searched = unpredicted(problem, profile, aim, chosen.placement) if request.routing else held_out(problem, profile, aim)
    doubts: dict[str, object] = {
        "unquantised": unquantised(problem, aim) if chosen.method in ("exact", "scan") else None,
        "scenarios": tuple([*scenarios(problem, aim, chosen.placement), *([searched] if searched else [])]),
        "kinds": by_kind(problem, aim, chosen.placement),
        "break_evens": tuple(break_evens(problem, aim, chosen.placement, others.all_local)),
    }
    return plan.model_copy(update=doubts)


def best_placement(problem: Problem, request: PlanRequest) -> Priced:
    """Choose the placement of a problem as `make_plan` does, without judging it.

    Raises: InfeasibleError when no plan meets the limits.
    """
    problem, chosen, _ = _holding(problem, request, lambda speculate: baselines(problem.with_drafts(speculate), request.aim))
    return Priced(chosen.placement, evaluate(problem, chosen.placement))


def _refuse_hours_without_traffic(problem: Problem) -> None:
    """Raise UsageError where every main function is rented by the hour and the traffic is unknown: then no request has a price."""
    if problem.workload.requests_per_hour is None and problem.menu[0].usd_per_hour is not None:
        raise UsageError(
            f"Every main function of the catalog {problem.catalog.name} is rented by the hour, so a request has no price without traffic.",
            "Give --requests-per-hour N.",
        )


_Compare = Callable[[Speculate], Baselines]


def _best_form(whole: Problem, request: PlanRequest) -> tuple[Problem, _Chosen, Baselines]:
    """Choose a placement for each form of experts, and keep the best.

    No plan in one form is better than the least bound.
    The exact solver looks for a plan in another form only below the value of the best so far.

    Raises: where no form has a plan, what `_holding` raises for the first.
    """
    compare = cache(lambda speculate: baselines(whole.with_drafts(speculate), request.aim))
    best: tuple[Problem, _Chosen, Baselines] | None = None
    first: InfeasibleError | OverBudgetError | None = None
    for form in forms_of(whole):
        try:
            if best is not None and best[1].method == "exact":
                known = request.aim.value(evaluate(best[0], best[1].placement))
                beat = Solution(best[1].placement.bought, best[1].placement.layers, known, 0.0, False)
                beaten = _exact(form, request, beat)
                if beaten.is_beaten:
                    best = best[0], _within(best[1], beaten), best[2]
                    continue
            one = _holding(form, request, compare)
        except (InfeasibleError, OverBudgetError) as error:
            first = first or error
            continue
        if best is not None:
            better, other = sorted((best, one), key=lambda found: request.aim.value(evaluate(found[0], found[1].placement)))
            one = better[0], _within(better[1], other[1]), better[2]
        best = one
    if best is None:
        raise first or RuntimeError("a problem has no form")
    return best


def _within(chosen: _Chosen, other: _Chosen) -> _Chosen:
    """Give a choice a bound that also holds for the search that made another one."""
    bounds = [bound for bound in (chosen.bound, other.bound) if bound is not None]
    return replace(chosen, bound=min(bounds, default=None), timed_out=chosen.timed_out or other.timed_out)


def _holding(problem: Problem, request: PlanRequest, compare: _Compare) -> tuple[Problem, _Chosen, Baselines]:
    """Choose a placement whose limits hold for every request.

    Solvers look at the longest ones. Should a shorter one break a limit, as it may where replicas share its experts in another way, they
    choose again and look at that one too. Also returns the problem with drafts of the length that was chosen, and the baselines with such.

    Raises: what `_choose` raises.
    """
    while True:
        found = _choose(problem, request)
        here, others = problem.with_drafts(found.speculate), compare(found.speculate)
        chosen = _or_all_local(here, request.aim, found, others)
        broken = first_broken(here, chosen.placement)
        if broken is None:
            return here, chosen, others
        if (stricter := holding_too(problem, broken.size)) is None:
            raise InfeasibleError(f"The plan that was found does not hold: {broken.text}.", "Plan with other lengths, or with --cover.")
        problem = stricter


def _choose(problem: Problem, request: PlanRequest) -> _Chosen:
    if request.placement_file is not None:
        placement = read_placement(request.placement_file, problem)
        return min(
            (_Chosen(placement, "given", None, False, speculate=each) for each in problem.depths or (problem.speculate,)),
            key=lambda one: request.aim.value(evaluate(problem.with_drafts(one.speculate), placement)),
        )
    if request.remote_share is not None:
        return replace(_forced(problem, request, request.remote_share), bound=_exact(problem, request).bound)
    if request.solver == "exact":
        return _exact(problem, request)
    if request.solver == "paper":
        from remoe_cli.plan.paper.heuristic import paper_plan

        found = paper_plan(problem, request.aim)
        each = [] if found is None else [(problem, found)]
    else:
        each = [(part, one) for part in problem.parts if (one := scan(part, request.aim)) is not None]
    if each:
        part, found = min(each, key=lambda pair: pair[1].value)
        return replace(_of(found, request.solver), bound=None, speculate=part.speculate)
    exact = _exact(problem, request)  # raises the error that says what is impossible, where no plan meets the targets
    if request.solver == "scan":
        return exact
    raise InfeasibleError(
        f"The {request.solver} solver finds no plan that meets the targets, but there are such plans.",
        "Use --solver exact, or looser targets.",
    )


def _forced(problem: Problem, request: PlanRequest, remote_share: float) -> _Chosen:
    def choose(part: Problem) -> _Chosen:
        return _of(solve_or_diagnose(part, forced_sets(part, remote_share), request.aim, request.time_limit_s, None), "forced")

    return _best_part(problem, request.aim, choose)


def _best_part(problem: Problem, aim: Aim, choose: Callable[[Problem], _Chosen]) -> _Chosen:
    """Choose for each part of the problem, and keep the best: no plan is better than the least bound.

    Raises: where no part has a plan, what `choose` raises for the one that is nearest to its limits.
    """
    found: list[tuple[float, _Chosen]] = []
    failed: list[InfeasibleError | OverBudgetError] = []
    for part in problem.parts:
        try:
            chosen = replace(choose(part), speculate=part.speculate)
        except (InfeasibleError, OverBudgetError) as error:
            failed.append(error)
            continue
        found.append((aim.value(evaluate(part, chosen.placement)), chosen))
    if not found:
        raise _nearest(failed)
    best = min(found, key=lambda pair: pair[0])[1]
    bounds = [one.bound for _, one in found if one.bound is not None]
    return replace(best, bound=min(bounds, default=None), timed_out=any(one.timed_out for _, one in found))


def _exact(problem: Problem, request: PlanRequest, beat: Solution | None = None) -> _Chosen:
    """Solve each part of the problem, with the best plan of all parts so far as the value to beat.

    No plan is better than the least bound of the parts. `beat` is a plan in another form, below whose value alone one is looked for.

    Raises: where no part has a plan, the error of the one that is nearest to its limits.
    """
    aim, until_s, failed = request.aim, time.monotonic() + request.time_limit_s, list[InfeasibleError | OverBudgetError]()
    parts, chosen = problem.parts, None
    best, owner = _start(parts, aim) if beat is None else (beat, None)
    bounds, timed_out = list[float](), False
    for part in parts:
        left_s = max(1.0, until_s - time.monotonic())
        try:
            solution = solve_or_diagnose(part, candidate_sets(part), aim, left_s, best)
        except (InfeasibleError, OverBudgetError) as error:
            failed.append(error)
            continue
        bounds, timed_out = [*bounds, solution.lower_bound], timed_out or solution.timed_out
        if best is not None and solution.value >= best.value and owner is not part:
            continue  # nothing in this part is better
        better = solution if problem.spec.experts_per_layer <= ENUMERATED_EXPERTS else improve(part, aim, solution)
        gain = 1 - better.value / solution.value if solution.value else 0.0
        chosen, best, owner = replace(_of(better, "exact"), gain=gain, speculate=part.speculate), better, part
    if chosen is None and beat is not None and bounds:
        chosen = replace(_of(beat, "exact"), is_beaten=True)
    if chosen is None:
        raise _nearest(failed)
    return replace(chosen, bound=min(bounds), timed_out=timed_out)


def _start(parts: tuple[Problem, ...], aim: Aim) -> tuple[Solution | None, Problem | None]:
    """Find a good plan by the scan, and its part: with drafts of the first length, and of the length with which such a plan is best."""
    found = [(one, part) for part in parts if part.speculate == parts[0].speculate and (one := scan(part, aim)) is not None]
    others = [part for part in parts if part.speculate != parts[0].speculate]
    if others:
        rest = min(others, key=lambda part: min((aim.value(evaluate(part, one.placement)) for one, _ in found), default=0.0))
        found += [(one, part) for part in others if part.speculate == rest.speculate and (one := scan(part, aim)) is not None]
    return min(found, key=lambda pair: pair[0].value, default=(None, None))


def _nearest(failed: list[InfeasibleError | OverBudgetError]) -> InfeasibleError | OverBudgetError:
    """Choose the error of the part that is nearest to its limits."""
    return min(reversed(failed), key=lambda error: (isinstance(error, InfeasibleError), error.shortfall))


def solve_or_diagnose(problem: Problem, candidates: tuple[Sets, ...], aim: Aim, time_limit_s: float, start: Solution | None) -> Solution:
    """Solve over the candidate sets, or raise the error that says which limit fails and what would do."""
    columns = build_columns(problem, candidates)
    solution = None if columns.empty_layers else solve(Task(problem, columns, aim), GAP, time_limit_s, start)
    if solution is None:
        raise diagnose(problem, candidates, aim, time_limit_s)
    return solution


def _of(solution: Solution, method: Method) -> _Chosen:
    return _Chosen(solution.placement, method, solution.lower_bound, solution.timed_out)


def _or_all_local(problem: Problem, aim: Aim, chosen: _Chosen, others: Baselines) -> _Chosen:
    """Keep all experts local where that is no worse than the chosen plan.

    Within its gap, a solver may miss even this plan.
    """
    local = others.all_local
    if chosen.method not in ("exact", "scan") or local is None or not meets(aim, local.outcome):
        return chosen
    if aim.value(local.outcome) > aim.value(evaluate(problem, chosen.placement)) * (1 + SLACK):
        return chosen
    return replace(chosen, placement=local.placement, gain=0.0)


def _workload_ref(workload: Workload, request: PlanRequest) -> WorkloadRef:
    return WorkloadRef(
        n_in=workload.n_in,
        n_out=workload.n_out,
        kinds=workload.lengths if len(workload.lengths) > 1 else (),
        longest=workload.front if workload.traffic.requests is not None or len(workload.lengths) > 1 else (),
        served=workload.traffic.served,
        requests_per_hour=workload.requests_per_hour,
        cold_share=workload.cold_share,
        routing=request.routing,
        waking=workload.waking,
        concurrency=request.concurrency,
        speculate=request.speculate,
    )


def _loss_note(profile: Profile) -> list[str]:
    """Say which loss of experts that are quantised on request a deployment refuses."""
    warning = None if profile.record.spec.remote is None else loss_warning(profile.record.loss)
    return [] if warning is None else [warning]


def _bound_note(profile: Profile, chosen: _Chosen) -> list[str]:
    """Say how often the bound that the paper's heuristic rests on holds."""
    if chosen.method != "paper":
        return []
    from remoe_cli.plan.paper.bound import measured_note

    remote = max(len(layer.remote) for layer in chosen.placement.layers)
    note = measured_note(profile.counts("prefill"), profile.arrays["prompt_tokens"], profile.record.spec.top_k, remote)
    return [note] if note else []


def _costs(problem: Problem, placement: Placement, outcome: Outcome) -> Costs:
    layers_usd = tuple(layer.usd for layer in layer_outcomes(problem, placement))
    return Costs(main_usd=outcome.cost_usd_per_request - sum(layers_usd), layers_usd=layers_usd)


def _status(chosen: _Chosen, gap: float | None) -> Status:
    if chosen.method == "forced" or chosen.method == "given":
        return chosen.method
    if gap is None:
        return "heuristic"
    return "time-limit" if chosen.timed_out else "optimal" if gap <= SLACK else "within-gap"
