"""Local search around a plan whose remote sets are prefixes of the order of utility.

Such a plan need not be the best. With one call per layer, it pays to keep experts together that tokens use together; and prefill and
decode rank experts differently. So exchanging experts near the border may pay. The main function stays as it is.

Source: planning.md, section 'Prefixes of the order of use'.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from remoe_cli.plan.arrays import Bools, Ints
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import Solution
from remoe_cli.plan.solve.node import Task, make_node
from remoe_cli.plan.solve.rounding import polished

BORDER = 3  # experts on each side of the border that are tried


def improve(problem: Problem, aim: Aim, solution: Solution) -> Solution:
    """Exchange single experts of each layer once, layer after layer, where that lowers the objective.

    The layers keep the plan's memory specs; replicas are chosen again. Returns the same solution when no exchange pays.
    """
    sets = tuple(_exchanges(rank, layer) for rank, layer in zip(problem.workload.ranks, solution.layers, strict=True))
    menu = tuple(sorted({layer.memory_mb for layer in solution.layers} - {0}))
    columns = build_columns(problem, sets, memory_menu_mb=menu)
    node = make_node(Task(problem, columns, aim), (solution.main,))
    first = np.searchsorted(columns.set_layer, columns.layer)
    memory_mb, replicas = np.array([(layer.memory_mb, layer.replicas) for layer in solution.layers]).T[:, columns.layer]
    # Columns leave out replicas that shorten nothing, which only the scan may have: then take the next fewer.
    alike = np.flatnonzero((columns.at_set == first) & (columns.memory_mb == memory_mb) & (columns.replicas <= replicas))
    now = alike[np.diff(columns.layer[alike], append=len(sets)) > 0]
    assert node is not None and len(now) == len(sets)
    better = polished(node, now)
    if not node.meets(better) or node.value(better) >= solution.value * (1 - SLACK):
        return solution
    return replace(solution, layers=columns.layer_plans(problem, better), value=node.value(better))


def _exchanges(rank: Ints, layer: LayerPlan) -> Bools:
    """List the remote set, and every set that exchanges one of its experts near the border.

    One of its most used experts is exchanged for one of the least used local ones.

    Shapes: bool [S, E].
    """
    remote = np.isin(np.arange(len(rank)), layer.remote)
    by_use = np.argsort(rank)
    leaving, coming = by_use[remote[by_use]][-BORDER:], by_use[~remote[by_use]][:BORDER]
    sets = np.tile(remote, (1 + len(leaving) * len(coming), 1))
    exchanged = np.arange(1, len(sets))
    sets[exchanged, np.repeat(leaving, len(coming))] = False
    sets[exchanged, np.tile(coming, len(leaving))] = True
    return sets
