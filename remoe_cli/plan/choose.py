"""Choose the best placement that a request allows and that holds for every request (`best_form`).

build.py tells what of it is called when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from remoe_cli.errors import InfeasibleError, OverBudgetError
from remoe_cli.plan.assess.baselines import Baselines, baselines
from remoe_cli.plan.cost.placement import Priced, evaluate
from remoe_cli.plan.cost.requests import first_broken, holding_too
from remoe_cli.plan.document import Method
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.drafting import Assisted, Depth
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, forms_of
from remoe_cli.plan.solve.candidates import ENUMERATED_EXPERTS, Sets, candidate_sets
from remoe_cli.plan.solve.columns import build_columns, weighed_functions
from remoe_cli.plan.solve.exact import GAP, Solution, solve
from remoe_cli.plan.solve.forced import forced_sets
from remoe_cli.plan.solve.given import broken_limits, read_placement
from remoe_cli.plan.solve.infeasible import diagnose
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan


@dataclass(frozen=True)
class Chosen:
    """A placement, the method that chose it, and the lower bound of the objective where there is one.

    gain        share of the solver's value that exchanging single experts saved
    speculate   the drafts that it is for
    is_beaten   whether this is only the plan in another form that was to be beaten, and was not
    """

    placement: Placement
    method: Method
    bound: float | None
    timed_out: bool
    gain: float = 0.0
    speculate: Depth = "off"
    is_beaten: bool = False


def best_placement(problem: Problem, request: PlanRequest) -> Priced:
    """Choose the placement of a problem as `make_plan` does, without judging it.

    Raises: InfeasibleError when no plan meets the limits.
    """
    problem, chosen, _ = best_form(problem, request)
    return Priced(chosen.placement, evaluate(problem, chosen.placement))


_Compare = Callable[[Depth], Baselines]


def best_form(whole: Problem, request: PlanRequest) -> tuple[Problem, Chosen, Baselines]:
    """Choose a placement for each form of experts, and keep the best.

    No plan in one form is better than the least bound.
    The exact solver looks for a plan in another form only below the value of the best so far. The time limit is for all forms.

    Raises: where no form has a plan, what `_holding` raises for the one that is nearest to its limits.
    """
    compare = cache(lambda speculate: baselines(whole.with_drafts(speculate), request.aim))
    best: tuple[Problem, Chosen, Baselines] | None = None
    failed: list[InfeasibleError | OverBudgetError] = []
    until_s = time.monotonic() + request.time_limit_s
    for form in forms_of(whole):
        try:
            if best is not None and best[1].method == "exact":
                known = request.aim.value(evaluate(best[0], best[1].placement))
                beat = Solution(best[1].placement.bought, best[1].placement.layers, known, 0.0, False)
                beaten = _exact(form, replace(request, time_limit_s=_left_s(until_s)), beat)
                if beaten.is_beaten:
                    best = best[0], _within(best[1], beaten), best[2]
                    continue
            one = _holding(form, replace(request, time_limit_s=_left_s(until_s)), compare)
        except (InfeasibleError, OverBudgetError) as error:
            failed.append(error)
            continue
        if best is not None:
            better, other = sorted((best, one), key=lambda found: _rank(found[0], found[1], request.aim))
            one = better[0], _within(better[1], other[1]), better[2]
        best = one
    if best is None:
        raise _nearest(failed)
    return best


def _left_s(until_s: float) -> float:
    """Tell the time that is left until then, by `time.monotonic()`; a second at least."""
    return max(1.0, until_s - time.monotonic())


def _rank(problem: Problem, chosen: Chosen, aim: Aim) -> tuple[bool, float]:
    """Order choices: first those that meet the targets, which a given placement need not do, then by value."""
    outcome = evaluate(problem, chosen.placement)
    return not meets(aim, outcome), aim.value(outcome)


def _within(chosen: Chosen, other: Chosen) -> Chosen:
    """Give a choice a bound that also holds for the search that made another one."""
    bounds = [bound for bound in (chosen.bound, other.bound) if bound is not None]
    return replace(chosen, bound=min(bounds, default=None), timed_out=chosen.timed_out or other.timed_out)


def _holding(problem: Problem, request: PlanRequest, compare: _Compare) -> tuple[Problem, Chosen, Baselines]:
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


def _choose(problem: Problem, request: PlanRequest) -> Chosen:
    if request.placement_file is not None:
        placement = read_placement(request.placement_file, problem)
        # An assistant takes memory that the placement may not have left.
        depths = problem.depths or (problem.speculate,)
        able = [one for one in depths if not isinstance(one, Assisted) or not broken_limits(problem.with_drafts(one), placement)]
        given = (Chosen(placement, "given", None, False, speculate=one) for one in able)
        return min(given, key=lambda one: _rank(problem.with_drafts(one.speculate), one, request.aim))
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


def _forced(problem: Problem, request: PlanRequest, remote_share: float) -> Chosen:
    until_s = time.monotonic() + request.time_limit_s

    def choose(part: Problem) -> Chosen:
        return _of(solve_or_diagnose(part, forced_sets(part, remote_share), request.aim, _left_s(until_s), None), "forced")

    return _best_part(problem, request.aim, choose)


def _best_part(problem: Problem, aim: Aim, choose: Callable[[Problem], Chosen]) -> Chosen:
    """Choose for each part of the problem, and keep the best: no plan is better than the least bound.

    Raises: where no part has a plan, what `choose` raises for the one that is nearest to its limits.
    """
    found: list[tuple[float, Chosen]] = []
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


def _exact(problem: Problem, request: PlanRequest, beat: Solution | None = None) -> Chosen:
    """Solve each part of the problem, with the best plan of all parts so far as the value to beat.

    No plan is better than the least bound of the parts. `beat` is a plan in another form, below whose value alone one is looked for.

    Raises: where no part has a plan, the error of the one that is nearest to its limits.
    """
    aim, until_s, failed = request.aim, time.monotonic() + request.time_limit_s, list[InfeasibleError | OverBudgetError]()
    parts, chosen = problem.parts, None
    best, owner = _start(parts, aim) if beat is None else (beat, None)
    bounds, timed_out = list[float](), False
    for part in parts:
        try:
            solution = solve_or_diagnose(part, candidate_sets(part), aim, _left_s(until_s), best)
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
    columns = build_columns(problem, candidates, functions=weighed_functions(problem, aim))
    solution = None if columns.empty_layers else solve(Task(problem, columns, aim), GAP, time_limit_s, start)
    if solution is None:
        raise diagnose(problem, candidates, aim, time_limit_s)
    return solution


def _of(solution: Solution, method: Method) -> Chosen:
    return Chosen(solution.placement, method, solution.lower_bound, solution.timed_out)


def _or_all_local(problem: Problem, aim: Aim, chosen: Chosen, others: Baselines) -> Chosen:
    """Keep all experts local where that is no worse than the chosen plan.

    Within its gap, a solver may miss even this plan.
    """
    local = others.all_local
    if chosen.method not in ("exact", "scan") or local is None or not meets(aim, local.outcome):
        return chosen
    if aim.value(local.outcome) > aim.value(evaluate(problem, chosen.placement)) * (1 + SLACK):
        return chosen
    return replace(chosen, placement=local.placement, gain=0.0)
