"""The fast planner: one share of remote experts for all layers, the least used ones, scanned by cost.

For every share and main spec the memory and replicas of each layer are the cheapest, or, where a limit then fails, the cheapest under
the least multiplier that meets it; then each layer may also take the share that is cheapest for it under the relaxation's multipliers. A
first pass looks at few shares and memory specs, a second around the best of the first. The plan is feasible and good, but nothing is
proven; the exact solver starts from it.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.plan.columns import build_columns
from remoe_cli.plan.exact import Solution, bound_of
from remoe_cli.plan.node import Aim, Node, Task, mains, make_node
from remoe_cli.plan.problem import Problem
from remoe_cli.plan.rounding import rounded
from remoe_cli.plan.workload import Ints, prefix_sets

SHARES, SPECS, MAINS = 17, 16, 24  # of the first pass, at most
_FINE_SHARES, _FINE_MAINS = 9, 9
_CLOSE = 1e-5  # how near a bound has to come to the relaxation's value
_MULTIPLIERS = np.concatenate([[0.0], np.geomspace(1e-4, 1e3, 15)])


def scan(problem: Problem, aim: Aim, least: int = 0) -> Solution | None:
    """The best plan found that sends at least `least` experts of every layer away, or None: then there may still be one.

    Its lower bound is 0.
    """
    experts, menu = problem.spec.experts_per_layer, problem.catalog.function.memory_menu_mb
    sizes = tuple(max(least, size) for size in _spread(experts + 1, SHARES))
    sizes = tuple(sorted(set(sizes)))
    coarse = tuple(menu[i] for i in _spread(len(menu), SPECS))
    first = _pass(problem, aim, sizes, coarse, None)
    if first is None:
        first = _pass(problem, aim, tuple(range(least, experts + 1)) if experts <= 64 else sizes, menu, None)
        if first is None:
            return None
    step = max(1, experts // (SHARES - 1))
    offsets = np.linspace(-step, step, _FINE_SHARES).round().astype(int)
    near = sorted({least, experts, *(min(experts, max(least, first[1] + offset)) for offset in offsets.tolist())})
    second = _pass(problem, aim, tuple(near), menu, first)
    assert second is not None
    return second[0]


def _pass(
    problem: Problem, aim: Aim, sizes: tuple[int, ...], menu: tuple[int, ...], known: tuple[Solution, int] | None
) -> tuple[Solution, int] | None:
    """The best plan with one of these sizes of remote set in every layer, or each layer's own, and its (median) size; `known` where none
    is better than that."""
    columns = build_columns(problem, prefix_sets(problem.workload, sizes), memory_menu_mb=menu)
    here = Task(problem, columns, aim)
    bought = mains(here)
    if known is not None:
        middle = next((i for i, main in enumerate(bought) if main == known[0].main), 0)
        bought = bought[max(0, middle - _FINE_MAINS) : middle + _FINE_MAINS + 1]
    elif len(bought) > MAINS:
        bought = tuple(bought[i] for i in _spread(len(bought), MAINS))
    # Columns of one layer and size lie together: [L, sizes] groups, of which some may be empty.
    group = columns.layer.astype(np.int64) * len(sizes) + np.searchsorted(sizes, columns.count)
    bound, best, cutoff = None, known, known[0].value if known else np.inf
    for main in bought:
        node = make_node(here, (main,))
        if node is None:
            continue
        bound = bound_of(node, bound, cutoff, _CLOSE)
        if bound.lower >= min(cutoff, node.dearest):
            continue
        for found in (_best_size(node, group, len(columns.starts), len(sizes), cutoff), rounded(node, bound.u / node.scale, bound.pool)):
            if found is not None and node.value(found) < cutoff:
                cutoff = node.value(found)
                best = Solution(main, columns.layer_plans(problem, found), cutoff, 0.0, False), int(np.median(columns.count[found]))
    return best


def _best_size(node: Node, group: Ints, layers: int, sizes: int, cutoff: float) -> Ints | None:
    """Columns [L] of the best uniform choice below `cutoff`."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    present = group[starts]
    bounded = np.array(node.rows[1:].sum(axis=0)) if len(node.rows) > 1 else np.zeros(len(node.c))
    best: Ints | None = None
    pending = np.ones(sizes, dtype=bool)
    for u in _MULTIPLIERS if len(node.rows) > 1 else _MULTIPLIERS[:1]:
        priced = node.c + u * bounded
        least = np.minimum.reduceat(priced, starts)
        at = np.flatnonzero(priced <= np.repeat(least, np.diff(np.append(starts, len(priced)))))
        firsts = at[np.unique(group[at], return_index=True)[1]]
        table = np.full((layers, sizes), -1)
        table.ravel()[present] = firsts
        for size in np.flatnonzero(pending & (table >= 0).all(axis=0)):
            chosen = table[:, size]
            value = node.value(chosen)
            if value >= cutoff:
                pending[size] = False  # costs only rise with u
            elif node.meets(chosen):
                pending[size] = False
                cutoff, best = value, chosen
        if not pending.any():
            break
    return best


def _spread(length: int, most: int) -> tuple[int, ...]:
    """At most so many of 0 .. length - 1, evenly, both ends in it."""
    return tuple(sorted({round(float(i)) for i in np.linspace(0, length - 1, min(length, most))}))
