"""The exact planner: one column per layer under shared limits, and branch and bound over the main function's menu.

At a fixed main spec the plan is a multiple-choice knapsack over the columns of `columns.py` under a few rows: main memory, TTFT, TPOT,
budget, and how long a request may take. A node of the search is a range of main specs, priced at its cheapest, run at its fastest and
filled to its largest, so its bound holds for every spec in it. Bounds are Lagrangian: for multipliers u >= 0,
`const + sum over layers of min_j (c_j + u a_j) - u b` never exceeds the optimum, whatever the quality of u, so the multipliers come from a
small column-generation LP in floating point and the bound is still certified. Columns that cannot be part of a better plan than the best
known (reduced cost) are left out of everything below a node. At a single main spec a plan is rounded from the relaxation. If that leaves
too wide a gap, an integer programme is solved over the columns whose reduced cost lies within a window; a solution with any other column
costs at least bound + window.

Notation: columns j of C, layers l of L, rows r of R; c [C] objective; rows [R, C], each divided by its limit; u [R] multipliers.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pulp

from remoe_cli.errors import RemoeError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.problem import Main, Placement
from remoe_cli.plan.solve.master_lp import RestrictedMaster
from remoe_cli.plan.solve.node import Node, Task, mains, make_node
from remoe_cli.plan.solve.rounding import rounded

GAP = 1e-3  # relative gap at which the search stops
PENALTY = 1e5  # of a row's whole limit, in units of the least cost: bounds the multipliers, never their validity


@dataclass(frozen=True)
class Solution:
    """`value` and `lower_bound` are in the objective's unit (USD or seconds); the bound holds for the columns it was found among."""

    main: Main
    layers: tuple[LayerPlan, ...]
    value: float
    lower_bound: float
    timed_out: bool

    @property
    def placement(self) -> Placement:
        return Placement(self.main.spec, self.layers, self.main.instances)


def multipliers(task: Task, main: Main) -> dict[str, float]:
    """What a unit more of each limit (experts, seconds, USD) would change the relaxation's least objective by, at one main function."""
    node = make_node(task, (main,))
    if node is None:
        return {}
    duals = bound_node(node).duals
    return {name: float(price) / limit for name, price, limit in zip(node.names, duals, node.limits, strict=True) if limit > 0}


@dataclass(frozen=True)
class NodeBound:
    """A certified bound of a node, its multipliers in the objective's unit, the columns its LP used, and those open to a better plan."""

    lower: float
    duals: Floats
    pool: Ints
    open: Ints


def solve(task: Task, gap: float = 1e-3, time_limit_s: float = 120.0, start: Solution | None = None) -> Solution | None:
    """A plan within `gap` (relative) of the least, its certified bound, or None when no plan meets the limits.

    `start` is a plan that is known to meet them. Raises RemoeError when the time limit passes before any plan is found.
    """
    search = _Search(task, max(gap, SLACK), time.monotonic() + time_limit_s, start)
    search.run()
    best = search.best
    if best is None:
        if search.timed_out:
            raise RemoeError(f"The planner found no plan within {time_limit_s:g} s.", "Give it more time, or looser targets.")
        return None
    lower = min(search.lower, best.value)
    return Solution(best.main, best.layers, best.value, lower, search.timed_out and best.value - lower > search.gap * best.value)


class _Search:
    """Best first over ranges of main specs. `closed` is the least bound of the leaves that are done.

    Ranges, and single specs at first, are bounded over one column for all numbers of replicas; a single spec that is still open then gets
    the columns of those that are.
    """

    def __init__(self, task: Task, gap: float, deadline: float, start: Solution | None) -> None:
        self.task, self.gap, self.deadline, self.best = task, gap, deadline, start
        merged, self.firsts = task.columns.merged()
        self.merged = replace(task, columns=merged)
        self.mains = mains(task, self.cutoff)
        self.closed, self.timed_out = np.inf, False
        self.heap: list[tuple[float, int, int, int, bool, NodeBound]] = []
        self.order = count()

    @property
    def cutoff(self) -> float:
        return self.best.value if self.best else np.inf

    @property
    def lower(self) -> float:
        return float(min([self.closed, *(entry[0] for entry in self.heap[:1])]))

    def run(self) -> None:
        if self.mains:
            self._push(0, len(self.mains) - 1, None)
        while self.heap and not self.timed_out:
            if self.best and self.best.value - self.lower <= self.gap * self.best.value:
                return
            lower, _, first, last, whole, bound = heapq.heappop(self.heap)
            if first < last:
                middle = (first + last) // 2
                self._push(first, middle, bound)
                self._push(middle + 1, last, bound)
            elif whole:
                self._close(first, lower, bound)
            else:
                self._push(first, last, self._unmerged(bound), whole=True)
            self.timed_out = time.monotonic() > self.deadline

    def _unmerged(self, bound: NodeBound) -> NodeBound:
        """The same over all columns."""
        ends = np.append(self.firsts[1:], len(self.task.columns.layer))
        sizes = (ends - self.firsts)[bound.open]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return replace(bound, pool=self.firsts[bound.pool], open=np.repeat(self.firsts[bound.open], sizes) + within)

    def _push(self, first: int, last: int, parent: NodeBound | None, whole: bool = False) -> None:
        node = make_node(self.task if whole else self.merged, self.mains[first : last + 1], parent.open if parent else None)
        if node is None:
            return
        bound = bound_node(node, parent, self.cutoff)
        lower = max(bound.lower, parent.lower if parent else -np.inf)
        if bound.lower > node.upper_bound:
            return
        if lower >= self.cutoff * (1 + SLACK):  # nothing better below; what was fixed on the way is above the cutoff too
            self.closed = min(self.closed, lower)
            return
        heapq.heappush(self.heap, (lower, next(self.order), first, last, whole, bound))
        if whole:
            self._keep(node, self.mains[first], rounded(node, np.searchsorted(node.at, bound.pool)))

    def _close(self, index: int, lower: float, bound: NodeBound) -> None:
        main = self.mains[index]
        node = make_node(self.task, (main,), bound.open)
        if node is None:
            return
        found, leaf_lower = _leaf(node, bound, self.cutoff, self.gap, self.deadline)
        self.closed = min(self.closed, max(lower, leaf_lower))
        self._keep(node, main, found)

    def _keep(self, node: Node, main: Main, found: Ints | None) -> None:
        if found is not None and node.value(found) < self.cutoff:
            layers = self.task.columns.layer_plans(self.task.problem, node.at[found])
            self.best = Solution(main, layers, node.value(found), 0.0, False)


def bound_node(node: Node, known: NodeBound | None = None, cutoff: float = np.inf, close: float = 1e-7) -> NodeBound:
    """Multipliers by column generation: LP over a pool, price all columns, add each layer's best, until nothing is added, the bound is
    within `close` of the LP's value, or it is above `cutoff`. It begins with what is `known` of a node that is like this one."""
    duals = known.duals / node.scale if known and len(known.duals) == len(node.rows) else np.zeros(len(node.rows))
    master, pool = RestrictedMaster(len(node.rows), len(node.starts), PENALTY), np.empty(0, dtype=np.int64)
    new = [np.flatnonzero(np.isin(node.at, known.pool))] if known else []
    new += [node.cheapest(row) for row in (*node.rows, node.c)]
    lower, best_duals, used = -np.inf, duals, pool
    for _ in range(60):
        _, best, value = node.reduced(duals)
        if value > lower:
            lower, best_duals = value, duals
        if lower >= min(cutoff, node.upper_bound):
            break
        added = np.setdiff1d(np.concatenate([*new, best]), pool)
        master.add(node.c[added], node.rows[:, added], node.layer[added])
        pool, new = np.concatenate([pool, added]), []
        solved = master.solve()
        if solved is None:
            break
        value, duals, x = solved
        used = np.sort(pool[x > 1e-9])
        if node.const + node.scale * value - lower <= close * abs(lower):
            break
    keep = np.arange(len(node.at))
    if cutoff < np.inf:
        keep = np.flatnonzero(node.reduced_cost_gap(best_duals) <= cutoff * (1 + SLACK) - lower + 1e-12 * abs(cutoff))
    return NodeBound(lower, best_duals * node.scale, node.at[used], node.at[keep])


def _leaf(node: Node, bound: NodeBound, cutoff: float, gap: float, deadline: float) -> tuple[Ints | None, float]:
    """Best choice [L] at one main spec (None when none is better than `cutoff`) and a lower bound for this spec."""
    lower, gaps = node.reduced(bound.duals / node.scale)[2], node.reduced_cost_gap(bound.duals / node.scale)
    window = max(gap, 1e-3) * max(abs(lower), 1e-3 * node.scale)
    while True:
        last = window >= cutoff - lower or window >= float(gaps.max())
        window = min(window, cutoff - lower)
        kept = _undominated(node, np.flatnonzero(gaps <= window))
        outside = lower + window if (gaps > window).any() else np.inf
        found, inside = _integer(node, kept, gap, deadline)
        leaf_lower = max(lower, min(inside, outside))
        value = node.value(found) if found is not None else np.inf
        least_known = min(value, cutoff)
        close = least_known < np.inf and least_known - leaf_lower <= gap * least_known
        if close or last or outside >= value or time.monotonic() > deadline:  # outside >= value: what is left is the solver's gap
            return found, leaf_lower
        window *= 3


def _programme(node: Node, at: Ints, tighten: float) -> tuple[Any, list[Any]]:
    lp = pulp.LpProblem("plan", pulp.LpMinimize)
    x = [lp.add_variable(f"x{index}", 0, 1, pulp.LpInteger) for index in range(len(at))]
    lp += pulp.LpAffineExpression(list(zip(x, node.c[at].tolist(), strict=True)))
    for row in node.rows:
        lp += pulp.LpAffineExpression(list(zip(x, row[at].tolist(), strict=True))) <= 1.0 - tighten
    for index in range(len(node.starts)):
        lp += pulp.LpAffineExpression([(x[i], 1.0) for i in np.flatnonzero(node.layer[at] == index)]) == 1.0
    return lp, x


def _integer(node: Node, kept: Ints, gap: float, deadline: float) -> tuple[Ints | None, float]:
    """The integer programme over the kept columns: a choice that truly meets the rows, and the solver's bound."""
    inside = np.inf
    for tighten in (0.0, 2e-6, 2e-5):  # the solver's tolerance may break a limit by a millionth; then ask for a little more
        limit_s = max(0.1, deadline - time.monotonic())
        if len(np.unique(node.layer[kept])) < len(node.starts):
            return None, np.inf
        lp, x = _programme(node, kept, tighten)
        lp.solve(pulp.HiGHS(msg=False, threads=1, gapRel=gap / 4, gapAbs=1e-10, timeLimit=limit_s))
        if lp.sol_status == pulp.LpSolutionInfeasible:
            return None, inside
        bound = lp.solverModel.getInfo().mip_dual_bound
        inside = min(inside, node.const + node.scale * bound)
        # PuLP maps a time limit to LpStatusOptimal: only sol_status and the bound are believed.
        if lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None, inside
        chosen = kept[[variable.varValue is not None and variable.varValue > 0.5 for variable in x]]
        if np.array_equal(node.layer[chosen], np.arange(len(node.starts))) and node.meets(chosen):
            return chosen, inside
    return None, inside


def _undominated(node: Node, at: Ints) -> Ints:
    """Drop columns that another of their layer beats or equals in cost and every row: exact, at this main spec."""
    keys = np.concatenate([node.rows[::-1][:, at], node.c[None, at], node.layer[None, at]])
    kept: list[int] = []
    front: Floats = np.empty((0, len(node.rows)))
    layer = -1
    for column in at[np.lexsort(keys)]:
        if node.layer[column] != layer:
            layer, front = int(node.layer[column]), np.empty((0, len(node.rows)))
        row = node.rows[:, column]
        if not (front <= row).all(axis=1).any():
            kept.append(int(column))
            front = np.concatenate([front, row[None]])
    return np.array(sorted(kept), dtype=np.int64)
