"""The fast planner: few shares of remote experts, the least used ones, few memory specs and main functions, scanned by cost.

A first pass looks at some far apart, the next ones closer around the best so far. At each main function the relaxation says which plans
are worth a look, and one is rounded from it. The plan is feasible and good, but nothing is proven; the exact solver starts from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import prefix_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import NodeBound, Solution, bound_node
from remoe_cli.plan.solve.node import Task, mains, make_node
from remoe_cli.plan.solve.rounding import rounded

T = TypeVar("T")
SHARES, SPECS, MAINS = 17, 16, 24  # of the first pass, at most
CLOSER, REACH = (4, 16), 5  # how much smaller the steps of the next ones are, and how many of them they go from the best
FEW = 65  # sizes that are looked at one by one where the first pass finds nothing
_CLOSE = 1e-5  # how near a bound has to come to the relaxation's value


@dataclass(frozen=True)
class _Grid:
    """Sizes of remote sets, memory specs and replicas that a pass looks at; `closer` says how near each other main functions are."""

    sizes: tuple[int, ...]
    menu: tuple[int, ...]
    replicas: tuple[int, ...]
    closer: int = 1


def scan(problem: Problem, aim: Aim, least: int = 0) -> Solution | None:
    """The best plan found that sends at least `least` experts of every layer away, or None: then there may still be one.

    Its lower bound is 0.
    """
    best = _pass(problem, aim, _grid(problem, least, None, 1), None) or _pass(problem, aim, _everything(problem, least), None)
    for closer in CLOSER:
        if best is not None:
            best = _pass(problem, aim, _grid(problem, least, best, closer), best)
    return best


def _grid(problem: Problem, least: int, best: Solution | None, closer: int) -> _Grid:
    """Far apart, or around what the best plan uses."""
    used, side, most = best.layers if best else (), problem.catalog.function, problem.spec.experts_per_layer
    sizes = {least, *_some(range(least, most + 1), {len(layer.remote) for layer in used}, SHARES, closer), most}
    menu = _some(side.memory_menu_mb, {layer.memory_mb for layer in used}, SPECS, closer)
    near = {layer.replicas + more for layer in used if layer.replicas for more in (-1, 0, 1)}
    replicas = tuple(n for n in range(1, side.max_replicas + 1) if (n in near if near else n & (n - 1) == 0))
    return _Grid(tuple(sorted(sizes)), menu, replicas, closer)


def _everything(problem: Problem, least: int) -> _Grid:
    sizes, side = range(least, problem.spec.experts_per_layer + 1), problem.catalog.function
    return _Grid(_some(sizes, set(), FEW, 1), side.memory_menu_mb, tuple(range(1, side.max_replicas + 1)))


def _pass(problem: Problem, aim: Aim, grid: _Grid, best: Solution | None) -> Solution | None:
    """The best plan found on the grid, with main functions near that of `best` if there is one, and if it is better."""
    columns = build_columns(problem, prefix_sets(problem.workload, grid.sizes), memory_menu_mb=grid.menu, replicas=grid.replicas)
    here = Task(problem, columns, aim)
    cutoff = best.value if best else np.inf
    bound: NodeBound | None = None
    for main in _some(mains(here, cutoff), {best.main} if best else set(), MAINS, grid.closer):
        node = make_node(here, (main,))
        if node is None:
            continue
        bound = bound_node(node, bound, cutoff, _CLOSE)
        if bound.lower >= min(cutoff, node.upper_bound):
            continue
        found = rounded(node, bound.pool)
        if found is not None and node.value(found) < cutoff:
            cutoff = node.value(found)
            best = Solution(main, columns.layer_plans(problem, found), cutoff, 0.0, False)
    return best


def _some(values: Sequence[T], used: set[T], most: int, closer: int) -> tuple[T, ...]:
    """At most so many of the values, evenly, both ends among them; or those that lie up to REACH such steps, or steps that are `closer`
    times smaller, from what is used."""
    near = [values.index(one) for one in used if one in values]
    step = max(1, round(len(values) / (most * closer)))
    far = {round(float(i)) for i in np.linspace(0, len(values) - 1, min(len(values), most))}
    places = {place + step * i for place in near for i in range(-REACH, REACH + 1)} if near else far
    return tuple(values[i] for i in sorted(places) if 0 <= i < len(values))
