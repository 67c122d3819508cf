"""The best plan with each kind of main function, so that they can be compared at the user's traffic."""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.plan.cost.placement import Priced, evaluate
from remoe_cli.plan.cost.prompts import cold_wait_s
from remoe_cli.plan.document import KindOutcome, MainKind
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.solve.scan import scan


def by_kind(problem: Problem, aim: Aim, chosen: Placement) -> tuple[KindOutcome, ...]:
    """Find the best plan of each kind of main function by the scan; of its own kind, the chosen one.

    A kind is missing where the scan finds no plan that meets the targets. There are none without an instance that scales to zero, nor where
    the traffic is unknown.
    """
    if problem.workload.waking is None:
        return ()
    found = {kind: best_of(problem, aim, kind) for kind in MainKind if kind != chosen.main.kind}
    placements = {chosen.main.kind: chosen} | {kind: one.placement for kind, one in found.items() if one is not None}
    return tuple(_outcome(problem, kind, placements[kind]) for kind in MainKind if kind in placements)


def best_of(problem: Problem, aim: Aim, kind: MainKind) -> Priced | None:
    """Find the best plan with main functions of one kind, by the scan."""
    menu = tuple(spec for spec in problem.catalog.main.menu if spec.kind == kind)
    if not menu:
        return None
    catalog = problem.catalog.model_copy(update={"main": problem.catalog.main.model_copy(update={"menu": menu})})
    found = scan(replace(problem, catalog=catalog), aim)
    return Priced(found.placement, evaluate(problem, found.placement)) if found else None


def _outcome(problem: Problem, kind: MainKind, placement: Placement) -> KindOutcome:
    return KindOutcome(
        **evaluate(problem, placement).model_dump(),
        kind=kind,
        spec=placement.main.name,
        instances=placement.instances,
        remote_experts=sum(len(layer.remote) for layer in placement.layers),
        cold_start_s=cold_wait_s(problem, placement),
    )
