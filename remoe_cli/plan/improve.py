"""Local search around a plan whose remote sets are prefixes of the utility order: such a plan need not be the best.

One call a layer makes co-activated experts belong together, and prefill and decode rank experts differently (planning study, section 1),
so exchanging experts near the border may pay. Memory, replicas and main function stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from remoe_cli.plan.cost import LayerOutcome, layer_outcome, total
from remoe_cli.plan.document import LayerPlan, Outcome
from remoe_cli.plan.exact import Solution
from remoe_cli.plan.node import SLACK, Aim
from remoe_cli.plan.problem import MB, Placement, Problem
from remoe_cli.plan.workload import Ints

BORDER = 3  # experts on each side of the border that are tried
_FIELD = {"cost": "cost_usd_per_request", "ttft": "ttft_s", "tpot": "tpot_s"}


def meets(aim: Aim, outcome: Outcome) -> bool:
    pairs = ((outcome.ttft_s, aim.ttft_s), (outcome.tpot_s, aim.tpot_s), (outcome.cost_usd_per_request, aim.budget_usd))
    return all(limit is None or value <= limit * (1 + SLACK) for value, limit in pairs)


def improve(problem: Problem, aim: Aim, solution: Solution) -> Solution:
    """Each layer's best exchange, layer after layer, once; the same solution when none pays."""
    placement = Placement(solution.main.spec, solution.layers, solution.main.instances)
    parts = [layer_outcome(problem, placement, index) for index in range(len(placement.layers))]
    value = solution.value
    for index, layer in enumerate(placement.layers):
        if not layer.remote or layer.functions:
            continue
        for remote in _exchanges(problem.workload.ranks[index], layer.remote):
            tried = _with(placement, index, replace_remote(layer, remote))
            part = layer_outcome(problem, tried, index)
            if not _fits(problem, tried.layers[index], part):
                continue
            outcome = total(problem, tried, [*parts[:index], part, *parts[index + 1 :]])
            found = getattr(outcome, _FIELD[aim.objective])
            if found < value * (1 - SLACK) and meets(aim, outcome):
                value, placement = found, tried
                parts = [*parts[:index], part, *parts[index + 1 :]]
    return replace(solution, layers=placement.layers, value=value)


def replace_remote(layer: LayerPlan, remote: tuple[int, ...]) -> LayerPlan:
    return layer.model_copy(update={"remote": remote})


def _with(placement: Placement, index: int, layer: LayerPlan) -> Placement:
    return replace(placement, layers=(*placement.layers[:index], layer, *placement.layers[index + 1 :]))


def _fits(problem: Problem, layer: LayerPlan, part: LayerOutcome) -> bool:
    side = problem.catalog.function
    return part.function_bytes <= layer.memory_mb * MB and part.largest_payload_bytes <= side.payload_limit_bytes


def _exchanges(rank: Ints, remote: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The remote set with one of its most used experts in place of one of the least used local ones."""
    by_use = sorted(range(len(rank)), key=lambda expert: int(rank[expert]))
    away = set(remote)
    for leaving in [e for e in by_use if e in away][-BORDER:]:
        for coming in [e for e in by_use if e not in away][:BORDER]:
            yield tuple(sorted((away - {leaving}) | {coming}))
