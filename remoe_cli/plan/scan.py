"""The fast planner: one share of remote experts for all layers, the least used ones, scanned by cost.

For every share and main spec the memory and replicas of each layer are the cheapest, or, where a limit then fails, the cheapest under
the least multiplier that meets it; then each layer may also take the share that is cheapest for it by the relaxation. A first pass looks
at few shares, memory specs and main functions far apart, the next ones closer around the best so far. The plan is feasible and good, but
nothing is proven; the exact solver starts from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from remoe_cli.plan.columns import build_columns
from remoe_cli.plan.exact import Bound, Solution, bound_of
from remoe_cli.plan.node import Aim, Node, Task, mains, make_node
from remoe_cli.plan.problem import Problem
from remoe_cli.plan.rounding import rounded
from remoe_cli.plan.workload import Ints, prefix_sets

T = TypeVar("T")
SHARES, SPECS, MAINS = 17, 16, 24  # of the first pass, at most
REACH = 5  # steps from the best, in the next ones
CLOSER = (4, 16)  # how much smaller their steps are
_CLOSE = 1e-5  # how near a bound has to come to the relaxation's value
_MULTIPLIERS = np.concatenate([[0.0], np.geomspace(1e-4, 1e3, 15)])


def scan(problem: Problem, aim: Aim, least: int = 0) -> Solution | None:
    """The best plan found that sends at least `least` experts of every layer away, or None: then there may still be one.

    Its lower bound is 0.
    """
    sizes, menu = range(least, problem.spec.experts_per_layer + 1), problem.catalog.function.memory_menu_mb
    replicas = range(1, problem.catalog.function.max_replicas + 1)
    doubled = tuple(n for n in replicas if n & (n - 1) == 0)
    best = _pass(problem, aim, _spread(sizes, SHARES), _spread(menu, SPECS), doubled, None)
    if best is None:
        best = _pass(problem, aim, tuple(sizes) if len(sizes) <= 65 else _spread(sizes, SHARES), menu, tuple(replicas), None)
    for closer in CLOSER if best else ():
        assert best is not None
        near = _near(sizes, {len(layer.remote) for layer in best.layers}, SHARES * closer)
        some = tuple(sorted({sizes[0], *near, sizes[-1]}))
        specs = _near(menu, {layer.memory_mb for layer in best.layers} - {0}, SPECS * closer) or _spread(menu, SPECS)
        used = {layer.replicas for layer in best.layers}
        best = _pass(problem, aim, some, specs, tuple(n for n in replicas if {n - 1, n, n + 1} & used) or doubled, best, closer)
    return best


def _pass(
    problem: Problem,
    aim: Aim,
    sizes: tuple[int, ...],
    menu: tuple[int, ...],
    replicas: tuple[int, ...],
    best: Solution | None,
    closer: int = 1,
) -> Solution | None:
    """The best plan with one of these sizes of remote set in every layer, or each layer's own, if it is better than `best`."""
    columns = build_columns(problem, prefix_sets(problem.workload, sizes), memory_menu_mb=menu, replicas=replicas)
    here = Task(problem, columns, aim)
    cutoff = best.value if best else np.inf
    bought = mains(here, cutoff)
    # Columns of one layer and size lie together: [L, sizes] groups, of which some may be empty.
    group = columns.layer.astype(np.int64) * len(sizes) + np.searchsorted(sizes, columns.count)
    bound: Bound | None = None
    for main in _near(bought, {best.main} & set(bought), MAINS * closer) if best else _spread(bought, MAINS):
        node = make_node(here, (main,))
        if node is None:
            continue
        bound = bound_of(node, bound, cutoff, _CLOSE)
        if bound.lower >= min(cutoff, node.dearest):
            continue
        for found in (_best_size(node, group, len(columns.starts), len(sizes), cutoff), rounded(node, bound.u / node.scale, bound.pool)):
            if found is not None and node.value(found) < cutoff:
                cutoff = node.value(found)
                best = Solution(main, columns.layer_plans(problem, found), cutoff, 0.0, False)
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


def _spread(values: Sequence[T], most: int) -> tuple[T, ...]:
    """At most so many of them, evenly, both ends among them."""
    return tuple(values[i] for i in sorted({round(float(i)) for i in np.linspace(0, len(values) - 1, min(len(values), most))}))


def _near(values: Sequence[T], used: set[T], parts: int) -> tuple[T, ...]:
    """Those that lie up to REACH steps from what is used, of which `parts` are the whole."""
    step = max(1, round(len(values) / parts))
    places = {values.index(one) + step * i for one in used for i in range(-REACH, REACH + 1)}
    return tuple(values[i] for i in sorted(places) if 0 <= i < len(values))
