"""The deployed placement beside the best plan, for other times or another routing."""

from __future__ import annotations

from remoe_cli.artifacts import Part
from remoe_cli.plan.choose import best_placement
from remoe_cli.plan.cost.placement import Priced, evaluate
from remoe_cli.plan.document import Objective, Outcome, Plan
from remoe_cli.plan.problem.aim import meets
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import request_of
from remoe_cli.plan.wording import HOURS_PER_MONTH

GIVEN = "--placement"  # what `Again.forced` says of a placement that was given in a file
WORTH = 0.01  # share of the cost, or of the objective, that makes another plan worth its work


class Again(Part):
    """What planning again would save.

    objective  what the plan has least of
    planned    what the plan said
    deployed   the same placement in the problem as it is now
    best       the best known placement there, which keeps what the user forced
    forced     the options that said which experts are remote, which `best` keeps; empty where the planner chose
    moved      experts that the best placement has elsewhere
    meets      whether the deployed placement keeps its targets now
    saved      share of the objective that the best placement saves
    saved_usd_per_month   at the plan's traffic; None where that is unknown
    worth      whether to plan again: the targets are missed, or at least a hundredth is saved
    """

    objective: Objective
    forced: str
    planned: Outcome
    deployed: Outcome
    best: Outcome
    moved: int
    meets: bool
    saved: float
    saved_usd_per_month: float | None
    worth: bool


def again(plan: Plan, problem: Problem, whole: Problem) -> Again:
    """Compare the deployed placement with the best one.

    `problem` is that of the plan's own form of experts and drafts; `whole` leaves open what the plan was asked to choose.

    Raises: InfeasibleError where no placement meets the plan's targets any more.
    """
    request = request_of(plan)
    placement = Placement(plan.main, plan.layers, plan.instances)
    deployed = evaluate(problem, placement)
    best = Priced(placement, deployed) if plan.method == "given" else best_placement(whole, request)
    now, then = request.aim.value(deployed), request.aim.value(best.outcome)
    kept, better = meets(request.aim, deployed), then < now
    saved_usd = deployed.cost_usd_per_request - best.outcome.cost_usd_per_request
    per_hour = plan.workload.requests_per_hour
    changes = better or not kept
    return Again(
        objective=plan.objective,
        forced=_forced(plan, request.remote_share),
        planned=plan.outcome,
        deployed=deployed,
        best=best.outcome if changes else deployed,
        moved=_moved(placement, best.placement) if changes else 0,
        meets=kept,
        saved=(now - then) / now if changes and now > 0 else 0.0,
        saved_usd_per_month=None if per_hour is None else saved_usd * per_hour * HOURS_PER_MONTH if changes else 0.0,
        worth=not kept or (now - then > WORTH * now),
    )


def _forced(plan: Plan, remote_share: float | None) -> str:
    if plan.method == "given":
        return GIVEN
    return "" if remote_share is None else f"--remote-share {remote_share:g}"


def _moved(one: Placement, other: Placement) -> int:
    """Count the experts that are not in the same place: on the CPU, on the GPU, or in a function."""
    places = []
    for placement in (one, other):
        remote = {("remote", layer.layer, expert) for layer in placement.layers for expert in layer.remote}
        places.append(remote | {("gpu", layer.layer, expert) for layer in placement.layers for expert in layer.gpu})
    return len({(layer, expert) for _, layer, expert in places[0] ^ places[1]})
