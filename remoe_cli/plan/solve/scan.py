"""The fast planner: a scan over few sizes of remote sets, few memory specs and few main functions.

A first pass looks at sizes far apart, the next ones closer around the best so far. At each main function, the relaxation says whether plans
are worth a look, and one is rounded from it. The plan meets the limits and is good, but nothing is proven; the exact solver starts from it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from remoe_cli.plan.cost import main_function
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import Sets, gpu_sizes, prefix_sets, with_gpu
from remoe_cli.plan.solve.columns import build_columns, weighed_functions
from remoe_cli.plan.solve.exact import NodeBound, Solution, bound_node
from remoe_cli.plan.solve.node import Task, holds_rest, mains, make_node
from remoe_cli.plan.solve.rounding import rounded

T = TypeVar("T")
SIZES, SPECS, MAINS = 17, 16, 24  # at most so many sizes of remote sets, memory specs and main functions in a pass
GPU_SIZES, BESIDE_GPU = 3, 5  # at most so many sizes of what is on the GPU, besides those of the best plan, beside so many remote sets
CLOSER, REACH = (4, 16), 5  # by how much the steps of the next passes are smaller, and how many steps they go from the best plan
FEW = 65  # sizes of the pass that follows where the first one finds nothing
_CLOSE = 1e-5  # relative distance to the relaxation's value at which a bound is good enough


@dataclass(frozen=True)
class _Grid:
    """Sizes of remote sets, memory specs, numbers of functions and replicas that a pass looks at.

    closer   by how much nearer to each other its main functions are than those of the first pass
    """

    sizes: tuple[int, ...]
    menu: tuple[int, ...]
    functions: Collection[int]
    replicas: tuple[int, ...]
    closer: int = 1


def scan(problem: Problem, aim: Aim, least: int = 0) -> Solution | None:
    """Find a good plan with at least `least` remote experts in every layer.

    None does not prove that there is no plan. Its lower bound is 0.
    """
    found = [one for part in problem.parts if (one := _scan(part, aim, least)) is not None]
    return min(found, key=lambda one: one.value, default=None)


def _scan(problem: Problem, aim: Aim, least: int) -> Solution | None:
    """Find such a plan where all main functions serve equally many requests at once."""
    if not any(holds_rest(problem, spec) for spec in problem.menu):
        return None  # no column needs to be priced to know
    best = _pass(problem, aim, _grid(problem, aim, least, None, 1), None) or _pass(problem, aim, _everything(problem, aim, least), None)
    for closer in CLOSER:
        if best is not None:
            best = _pass(problem, aim, _grid(problem, aim, least, best, closer), best)
    return best


def _grid(problem: Problem, aim: Aim, least: int, best: Solution | None, closer: int) -> _Grid:
    """Lay a grid far apart, or around what the best plan uses."""
    used, side, most = best.layers if best else (), problem.catalog.function, problem.spec.experts_per_layer
    sizes = {least, *_picked(range(least, most + 1), {len(layer.remote) for layer in used}, SIZES, closer), most}
    menu = _picked(side.memory_menu_mb, {layer.memory_mb for layer in used}, SPECS, closer)
    functions = _doubled(side.max_functions, {len(layer.parts) for layer in used}) if aim.is_for_tpot else ()
    return _Grid(tuple(sorted(sizes)), menu, functions, _doubled(side.max_replicas, {layer.replicas for layer in used}), closer)


def _doubled(most: int, used: set[int]) -> tuple[int, ...]:
    """List 1, 2, 4 .. up to `most`, or the numbers next to the `used` ones."""
    near = {number + more for number in used - {0} for more in (-1, 0, 1)}
    return tuple(n for n in range(1, most + 1) if (n in near if near else n & (n - 1) == 0))


def _everything(problem: Problem, aim: Aim, least: int) -> _Grid:
    sizes, side = range(least, problem.spec.experts_per_layer + 1), problem.catalog.function
    replicas = tuple(range(1, side.max_replicas + 1))
    return _Grid(_picked(sizes, set(), FEW, 1), side.memory_menu_mb, weighed_functions(problem, aim), replicas)


def _pass(problem: Problem, aim: Aim, grid: _Grid, best: Solution | None) -> Solution | None:
    """Find the best plan on the grid that is better than `best`, else return `best`.

    Main functions are those near that of `best`, if there is one.
    """
    sets = _sets(problem, grid, best)
    columns = build_columns(problem, sets, memory_menu_mb=grid.menu, functions=grid.functions, replicas=grid.replicas)
    here = Task(problem, columns, aim)
    cutoff = best.value if best else np.inf
    bound: NodeBound | None = None
    for main in _picked(mains(here, cutoff), {best.main} if best else set(), MAINS, grid.closer):
        node = make_node(here, (main,))
        if node is None:
            continue
        bound = bound_node(node, bound, cutoff, _CLOSE)
        if bound.lower >= min(cutoff, node.upper_bound):
            continue
        found = rounded(node, np.searchsorted(node.at, bound.pool))
        if found is not None and node.value(found) < cutoff:
            cutoff = node.value(found)
            best = Solution(main, columns.layer_plans(problem, node.at[found]), cutoff, 0.0, False)
    return best


def _sets(problem: Problem, grid: _Grid, best: Solution | None) -> tuple[Sets, ...]:
    """List the remote sets of a pass, and for a few of them those with experts on the GPU: as many as the best plan has, or others."""
    experts, most = problem.spec.experts_per_layer, main_function.most_gpu_experts(problem)
    sizes, used = (
        gpu_sizes(experts, len(problem.spec.moe_layers), most),
        sorted({len(layer.gpu) for layer in best.layers} - {0}) if best else [],
    )
    here = {*_picked(sizes, set(), GPU_SIZES, 1), *_picked(used, set(), GPU_SIZES, 1)}
    beside = _picked(grid.sizes, set(), BESIDE_GPU, 1)
    return with_gpu(problem, prefix_sets(problem.workload, grid.sizes), beside, tuple(sorted(here)))


def _picked(values: Sequence[T], used: set[T], most: int, closer: int) -> tuple[T, ...]:
    """Pick values: at most `most` of them evenly with both ends, or those near the `used` ones.

    Near means up to REACH steps; a step is `closer` times smaller than the even one.
    """
    near = [values.index(one) for one in used if one in values]
    step = max(1, round(len(values) / (most * closer)))
    far = {round(float(i)) for i in np.linspace(0, len(values) - 1, min(len(values), most))}
    places = {place + step * i for place in near for i in range(-REACH, REACH + 1)} if near else far
    return tuple(values[i] for i in sorted(places) if 0 <= i < len(values))
