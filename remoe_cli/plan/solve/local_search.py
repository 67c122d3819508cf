"""Local search around a plan whose remote sets are prefixes of the order of utility.

Such a plan need not be the best. With one call per layer, it pays to keep experts together that tokens use together; and prefill and
decode rank experts differently. So exchanging experts near the border may pay. The main function stays as it is.

With experts on the GPU there is a second border, and sizes were chosen in steps: then single experts near either border change sides too.

Source: planning.md, section 'Prefixes of the order of use'.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from remoe_cli.plan.arrays import Ints
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import ON_CPU, ON_GPU, REMOTE, Sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import Solution
from remoe_cli.plan.solve.node import Task, make_node
from remoe_cli.plan.solve.rounding import polished

BORDER = 3  # experts on each side of the border that are tried
ROUNDS, WORTH = 12, 1e-5  # at most so often, and only while so large a share is gained


def improve(problem: Problem, aim: Aim, solution: Solution) -> Solution:
    """Exchange single experts of each layer once, layer after layer, where that lowers the objective.

    The layers keep the plan's memory specs and numbers of functions; replicas are chosen again. Returns the same solution when no exchange
    pays. With experts on the GPU, whose numbers were chosen in steps, this is repeated while it pays.
    """
    for _ in range(ROUNDS):
        better = _improved(problem, aim, solution)
        gained, solution = solution.value - better.value, better
        if gained <= WORTH * abs(solution.value) or not any(layer.gpu for layer in solution.layers):
            break
    return solution


def _improved(problem: Problem, aim: Aim, solution: Solution) -> Solution:
    sets = tuple(_exchanges(rank, layer) for rank, layer in zip(problem.workload.ranks, solution.layers, strict=True))
    menu = tuple(sorted({layer.memory_mb for layer in solution.layers} - {0}))
    parts = [len(layer.parts) for layer in solution.layers]
    columns = build_columns(problem, sets, memory_menu_mb=menu, functions=set(parts) if aim.is_for_tpot else ())
    node = make_node(Task(problem, columns, aim), (solution.main,))
    first = np.searchsorted(columns.set_layer, columns.layer)  # the layer as it is
    memory_mb, replicas = np.array([(layer.memory_mb, layer.replicas) for layer in solution.layers]).T[:, columns.layer]
    here = (columns.at_set == first) & (columns.memory_mb == memory_mb) & (columns.functions == np.array(parts)[columns.layer])
    # Columns leave out replicas that shorten nothing, which only the scan may have: then take the next fewer.
    alike = np.flatnonzero(here & (columns.replicas <= replicas))
    now = alike[np.diff(columns.layer[alike], append=len(sets)) > 0]
    assert node is not None and len(now) == len(sets)
    better = polished(node, now)
    if not node.meets(better) or node.value(better) >= solution.value * (1 - SLACK):
        return solution
    return replace(solution, layers=columns.layer_plans(problem, better), value=node.value(better))


def _exchanges(rank: Ints, layer: LayerPlan) -> Sets:
    """List the layer's set, and every set that exchanges two experts near a border, or lets some change sides.

    One of the most used remote experts is exchanged for one of the least used local ones, and one of the most used in CPU memory for one of
    the least used on the GPU.

    Shapes: [S, E].
    """
    experts, by_use = np.arange(len(rank)), np.argsort(rank)
    remote, gpu = np.isin(experts, layer.remote), np.isin(experts, layer.gpu)
    sets = [remote if not layer.gpu else np.where(gpu, ON_GPU, remote).astype(np.int8)]
    sides = [(remote, ~remote)] + ([(~remote & ~gpu, gpu)] if layer.gpu else [])
    for below, above in sides:
        leaving, coming = by_use[below[by_use]][-BORDER:], by_use[above[by_use]][:BORDER]
        for one, other in product(leaving.tolist(), coming.tolist()):
            sets.append(sets[0].copy())
            sets[-1][[one, other]] = sets[0][[other, one]]
    if layer.gpu:
        sets += _moved(sets[0], by_use)
    return np.array(sets)


def _moved(now: Sets, by_use: Ints) -> list[Sets]:
    """List the sets that move up to BORDER experts from one place to the next, in the order of use: remote, CPU, GPU."""
    moved = []
    for low, high in ((REMOTE, ON_CPU), (ON_CPU, ON_GPU), (REMOTE, ON_GPU)):
        up, down = by_use[now[by_use] == low][::-1], by_use[now[by_use] == high]
        for experts, there in ((up, high), (down, low)):
            for some in range(1, min(BORDER, len(experts)) + 1):
                moved.append(now.copy())
                moved[-1][experts[:some]] = there
    return moved
