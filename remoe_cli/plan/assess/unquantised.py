"""The best known plan for a copy that is not quantised, beside that for a quantised checkpoint.

It has the same requests, catalog and targets. The scan finds it (solve/scan.py): a second proof of the bound would double the time of
planning a large model. The exact plan may cost a little less (docs/explanation/planning.md says how much).
"""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.cost.requests import first_broken, holding_too, with_timeouts
from remoe_cli.plan.document import Unquantised
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.hardware import dequantised_times


def unquantised(problem: Problem, aim: Aim) -> Unquantised | None:
    """Find the best known plan for such a copy.

    None where the checkpoint is not quantised, or not served as it is stored, and where the scan finds no plan that keeps all limits.
    """
    if not problem.spec.is_served_quantised:
        return None
    problem = problem_of_copy(problem)
    placement = scanned(problem, aim)
    if placement is None:
        return None
    return Unquantised(
        **evaluate(problem, placement).model_dump(),
        dtype=problem.spec.dtype,
        spec=placement.main.name,
        instances=placement.instances,
        layers=with_timeouts(problem, placement.layers, placement.main),
        cold_start_s=cold_wait_s(problem, placement),
    )


def problem_of_copy(problem: Problem) -> Problem:
    """Pose the same problem for a copy of a quantised checkpoint that is not quantised."""
    spec, latency = problem.spec.model_copy(update={"stored": None}), dequantised_times(problem.latency, problem.spec)
    return replace(problem, spec=spec, latency=latency)


def scanned(problem: Problem, aim: Aim) -> Placement | None:
    """Scan for a plan whose limits hold for every request, as `make_plan` does."""
    asked: Problem | None = problem
    while asked is not None and (found := scan(asked, aim)) is not None:
        broken = first_broken(asked, found.placement)
        if broken is None:
            return found.placement
        asked = holding_too(asked, broken.size)
    return None
