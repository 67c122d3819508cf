"""The frontier: the least cost of each TPOT that a placement can have, from fastest to cheapest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from remoe_cli.blas import one_thread
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.drafting import Depth
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import GAP, Solution, solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.profile.record import Profile

POINTS = 9
SCANNED = 7  # of a frontier that nobody waits for


class Point(NamedTuple):
    """One plan of the frontier.

    bound_usd   no plan with this TPOT costs less
    remote      remote experts
    main        name of the main spec
    """

    tpot_s: float
    ttft_s: float
    cost_usd: float
    bound_usd: float
    remote: int
    main: str


@one_thread()
def frontier(
    profile: Profile, catalog: Catalog, request: PlanRequest, progress: Callable[[int, int], None], speculate: Depth = "off"
) -> list[Point]:
    """Plan for TPOT targets between the least TPOT and that of the cheapest plan, under the other targets.

    All plans have drafts of one length. Plans that another one beats are left out. The frontier is empty when no plan meets the targets.
    """
    problem = make_problem(profile, catalog, request).with_drafts(speculate)
    parts = [(part, build_columns(part, candidate_sets(part))) for part in problem.parts]
    limits = replace(request.aim, objective="cost")

    def at(aim: Aim) -> Solution | None:
        each = [
            solve(Task(part, columns, aim), GAP, request.time_limit_s / POINTS / len(parts), scan(part, aim)) for part, columns in parts
        ]
        found = [one for one in each if one is not None]
        if not found:
            return None
        return replace(min(found, key=lambda one: one.value), lower_bound=min(one.lower_bound for one in found))

    fastest, cheapest = at(replace(limits, objective="tpot")), at(limits)
    if fastest is None or cheapest is None:
        return []
    points: list[Point] = []
    slowest_s = evaluate(problem, cheapest.placement).tpot_s
    targets = np.geomspace(fastest.value * (1 + 1e-6), max(slowest_s, fastest.value) * (1 + 1e-6), POINTS)
    for done, target in enumerate(targets.tolist(), 1):
        found = at(replace(limits, tpot_s=target)) if done < POINTS else cheapest
        if found is not None:
            points.append(_point(problem, found, found.lower_bound))
        progress(done, POINTS)
    return unbeaten(points)


@one_thread()
def scanned_frontier(problem: Problem, limits: Aim, progress: Callable[[int, int], None]) -> list[Point]:
    """Do the same by the scan, in a few seconds.

    Its plans are good, and nothing is proven about them (`bound_usd` is 0).
    """
    fastest, cheapest = (scan(problem, replace(limits, objective=objective)) for objective in ("tpot", "cost"))
    if fastest is None or cheapest is None:
        return []
    slowest_s = evaluate(problem, cheapest.placement).tpot_s
    found = [fastest, cheapest]
    targets = np.geomspace(fastest.value * (1 + 1e-6), max(slowest_s, fastest.value) * (1 + 1e-6), SCANNED).tolist()[:-1]
    for done, target in enumerate(targets, 1):
        one = scan(problem, replace(limits, objective="cost", tpot_s=target))
        found += [] if one is None else [one]
        progress(done, len(targets))
    return unbeaten([_point(problem, one, 0.0) for one in found])


def _point(problem: Problem, found: Solution, bound_usd: float) -> Point:
    outcome, remote = evaluate(problem, found.placement), sum(len(layer.remote) for layer in found.layers)
    return Point(outcome.tpot_s, outcome.ttft_s, outcome.cost_usd_per_request, bound_usd, remote, found.main.spec.name)


def unbeaten(points: list[Point]) -> list[Point]:
    """Leave out plans that another one beats, and those that are there twice.

    Many targets may have one plan: then its bound is that of the tightest. Within its gap, the solver may also find a faster plan for a
    looser target.
    """
    unlike = {(point.tpot_s, point.cost_usd): point for point in reversed(points)}.values()
    return sorted(point for point in unlike if not any(_better(other, point) for other in unlike))


def _better(other: Point, point: Point) -> bool:
    no_worse = other.tpot_s <= point.tpot_s and other.cost_usd <= point.cost_usd
    return no_worse and (other.tpot_s, other.cost_usd) != (point.tpot_s, point.cost_usd)
