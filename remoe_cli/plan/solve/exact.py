"""The exact planner: one column per layer under shared limits, and branch and bound over main specs.

At a fixed main spec, the plan is a multiple-choice knapsack over the columns of columns.py under a few rows: main memory, TTFT, TPOT,
budget, and how long a request may take. A node of the search is a range of main specs. It is priced at the cheapest, run at the fastest and
filled to the largest of them, so its bound holds for every spec in the range. Bounds are Lagrangian: for duals u >= 0,
`const + sum over layers of min_j (c_j + u a_j) - u b` never exceeds the optimum, however good u is. So the duals come from a small
linear programme in floating point (column generation), and the bound is still certified. Columns whose reduced cost rules them out of
every plan that is better than the best known are left out below a node. At a single main spec, a plan is rounded from the relaxation. If
that leaves too wide a gap, an integer programme is solved over the columns whose reduced cost lies within a window; a plan with any other
column costs at least bound + window.

Shapes: C columns j, L layers, R rows; c [C] objective, rows [R, C], each divided by its limit, duals [R].
Source: planning.md, section 'Branch and bound over the main function'.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pulp

from remoe_cli import interrupts
from remoe_cli.errors import RemoeError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.problem import Main, Placement
from remoe_cli.plan.solve.master_lp import RestrictedMaster
from remoe_cli.plan.solve.node import Node, Task, mains, make_node
from remoe_cli.plan.solve.rounding import rounded

GAP = 1e-3  # relative gap at which the search stops
PENALTY = 1e5  # of breaking a whole limit, in units of the least cost: it bounds the duals, and leaves every bound valid


@dataclass(frozen=True)
class Solution:
    """The best plan found, and a lower bound that holds for the columns it was found among.

    value, lower_bound   in the objective's unit, USD or seconds
    timed_out            the time limit ended the search before the gap was reached
    """

    main: Main
    layers: tuple[LayerPlan, ...]
    value: float
    lower_bound: float
    timed_out: bool

    @property
    def placement(self) -> Placement:
        """The plan as a placement."""
        return Placement(self.main.spec, self.layers, self.main.instances)


def multipliers(task: Task, main: Main) -> dict[str, float]:
    """Compute how much a unit more of each limit lowers the relaxation's objective, at one main function.

    Units are experts, seconds and USD.
    """
    node = make_node(task, (main,))
    if node is None:
        return {}
    duals = bound_node(node).duals
    return {name: float(price) / limit for name, price, limit in zip(node.names, duals, node.limits, strict=True) if limit > 0}


@dataclass(frozen=True)
class NodeBound:
    """A certified lower bound of a node.

    lower   the bound, in the objective's unit
    duals   [R], of the rows
    pool    columns that the linear programme used
    open    columns that may be part of a plan better than the cutoff
    """

    lower: float
    duals: Floats
    pool: Ints
    open: Ints


def solve(task: Task, gap: float = 1e-3, time_limit_s: float = 120.0, start: Solution | None = None) -> Solution | None:
    """Find a plan within `gap` (relative) of the least, with a certified lower bound.

    Returns None when no plan meets the limits.

    `start` is a plan that is known to meet them.

    Raises: RemoeError when the time limit passes before any plan is found.
    """
    search = _Search(task, max(gap, SLACK), time.monotonic() + time_limit_s, start)
    search.run()
    best = search.best
    if best is None:
        if search.timed_out:
            raise RemoeError(
                f"The planner found no plan within {time_limit_s:g} s.", "Give it more time with --time-limit, or looser targets."
            )
        return None
    lower = min(search.lower, best.value)
    return Solution(best.main, best.layers, best.value, lower, search.timed_out and best.value - lower > search.gap * best.value)


class _Search:
    """Best-first search over ranges of main specs.

    Ranges, and at first single specs, are bounded over columns that are merged over replicas. A single spec that is still open is then
    bounded over its own columns. `closed` is the least bound of the leaves that are done.
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
        """Value of the best plan found so far."""
        return self.best.value if self.best else np.inf

    @property
    def lower(self) -> float:
        """Lower bound of everything that is searched or still open."""
        return float(min([self.closed, *(entry[0] for entry in self.heap[:1])]))

    def run(self) -> None:
        """Search until the gap is small enough, nothing is open, or the time is over."""
        if self.mains:
            self._push(0, len(self.mains) - 1, None)
        while self.heap and not self.timed_out:
            interrupts.check()
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
        """Translate a bound over merged columns into one over all columns."""
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
        if lower >= self.cutoff * (1 + SLACK):  # no better plan below; columns left out on the way are above the cutoff too
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
    """Bound a node by column generation, starting from what is `known` of a node like this one.

    Solve a linear programme over a pool of columns, price all columns with its duals, add each layer's best one, and repeat: until
    nothing is added, the bound is within `close` (relative) of the programme's value, or it is above `cutoff`.
    """
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
    """Choose columns [L] at one main spec, better than `cutoff` or None, with a lower bound for this spec."""
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
        if close or last or outside >= value or time.monotonic() > deadline:  # outside >= value: only the integer solver's own gap is left
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
    """Solve the integer programme over the kept columns: a choice that meets the rows, and its bound."""
    inside = np.inf
    for tighten in (0.0, 2e-6, 2e-5):  # the solver may break a limit by a millionth: then ask for a tighter limit
        limit_s = max(0.1, deadline - time.monotonic())
        if len(np.unique(node.layer[kept])) < len(node.starts):
            return None, np.inf
        lp, x = _programme(node, kept, tighten)
        lp.solve(pulp.HiGHS(msg=False, threads=1, gapRel=gap / 4, gapAbs=1e-10, timeLimit=limit_s))
        if lp.sol_status == pulp.LpSolutionInfeasible:
            return None, inside
        bound = lp.solverModel.getInfo().mip_dual_bound
        inside = min(inside, node.const + node.scale * bound)
        # PuLP reports LpStatusOptimal at a time limit: only sol_status and the bound can be trusted.
        if lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None, inside
        chosen = kept[[variable.varValue is not None and variable.varValue > 0.5 for variable in x]]
        if np.array_equal(node.layer[chosen], np.arange(len(node.starts))) and node.meets(chosen):
            return chosen, inside
    return None, inside


def _undominated(node: Node, at: Ints) -> Ints:
    """Drop columns that another column of their layer beats or equals in cost and in every row.

    At this main spec, nothing is lost.
    """
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
