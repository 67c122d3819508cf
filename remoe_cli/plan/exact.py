"""The exact planner: one column per layer under shared limits, and branch and bound over the main function's menu.

At a fixed main spec the plan is a multiple-choice knapsack over the columns of `columns.py` with at most three rows (main
memory, TTFT, TPOT). A node of the search is a range of the menu, priced at its cheapest, run at its fastest and filled to
its largest spec, so its bound holds for every spec in it. Bounds are Lagrangian: for multipliers u >= 0,
`const + sum over layers of min_j (c_j + u a_j) - u b` never exceeds the optimum, whatever the quality of u, so the multipliers
come from a small column-generation LP in floating point and the bound is still certified. A leaf is an integer programme
over the columns whose reduced cost lies within a window; a solution with any other column costs at least bound + window.
"""

from __future__ import annotations

import heapq
import os
import sys
import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import highspy
import numpy as np
import pulp

from remoe_cli.errors import RemoeError
from remoe_cli.plan import cost
from remoe_cli.plan.columns import Columns
from remoe_cli.plan.document import MainSpec
from remoe_cli.plan.workload import Floats, Ints

Objective = Literal["cost", "ttft", "tpot"]
PENALTY = 1e5  # of a row's whole limit, in units of the least cost: bounds the multipliers, never their validity
SLACK = 1e-9  # relative tolerance at which a target counts as met


@dataclass(frozen=True)
class Solution:
    """`value` and `lower_bound` are in the objective's unit (USD or seconds); the bound holds for these columns."""

    main: MainSpec
    chosen: Ints
    value: float
    lower_bound: float
    timed_out: bool


@dataclass(frozen=True)
class Task:
    """Least `objective` over the columns and the catalog's main menu, under the targets that are not None."""

    problem: cost.Problem
    columns: Columns
    objective: Objective
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True)
class _Node:
    """Minimise `const + scale * c x` with one column per layer and `rows x <= 1` (rows [R, C], each divided by its limit)."""

    starts: Ints
    layer: Ints
    const: float
    scale: float
    c: Floats
    rows: Floats

    def reduced(self, u: Floats) -> tuple[Floats, Floats, float]:
        """Costs less multipliers [C], their least per layer [L], and the Lagrangian bound."""
        priced = self.c + u @ self.rows
        least = np.minimum.reduceat(priced, self.starts)
        return priced, least, self.const + self.scale * float(least.sum() - u.sum())

    def cheapest(self, priced: Floats, least: Floats) -> Ints:
        """[L]: the first column of least price in each layer."""
        at = np.flatnonzero(priced <= least[self.layer])
        return at[np.unique(self.layer[at], return_index=True)[1]]

    @cached_property
    def dearest(self) -> float:
        """No plan at this node costs more: a bound above it proves that there is none."""
        return self.const + self.scale * float(np.maximum.reduceat(self.c, self.starts).sum())

    def value(self, chosen: Ints) -> float:
        return self.const + self.scale * float(self.c[chosen].sum())


@dataclass(frozen=True)
class _Bound:
    lower: float
    u: Floats
    pool: Ints


def solve(task: Task, gap: float = 1e-3, time_limit_s: float = 120.0) -> Solution | None:
    """A plan within `gap` (relative) of the least, its certified bound, or None when no plan meets the limits.

    Raises RemoeError when the time limit passes before any plan is found.
    """
    _silence_highs()
    menu, deadline = task.problem.catalog.main.menu, time.monotonic() + time_limit_s
    gap = max(gap, SLACK)
    best: tuple[float, int, Ints] | None = None
    closed, timed_out = np.inf, False  # closed: least bound of the leaves that are done
    heap: list[tuple[float, int, int, _Bound]] = []

    def push(first: int, last: int, parent: _Bound | None) -> None:
        node = _node(task, menu[first : last + 1])
        if node is None:
            return
        bound = _bound(node, parent, best[0] if best else np.inf)
        if bound.lower <= node.dearest:
            heapq.heappush(heap, (max(bound.lower, parent.lower if parent else -np.inf), first, last, bound))

    push(0, len(menu) - 1, None)
    while heap and not timed_out:
        lower, first, last, bound = heap[0]
        if best and best[0] - min(lower, closed) <= gap * best[0]:
            break
        heapq.heappop(heap)
        if first < last:
            middle = (first + last) // 2
            push(first, middle, bound)
            push(middle + 1, last, bound)
        elif (leaf := _node(task, menu[first : first + 1])) is not None:
            found, leaf_lower = _leaf(leaf, bound, best[0] if best else np.inf, gap, deadline)
            closed = min(closed, max(lower, leaf_lower))
            if found is not None and (best is None or leaf.value(found) < best[0]):
                best = (leaf.value(found), first, found)
        timed_out = time.monotonic() > deadline
    if best is None:
        if timed_out:
            raise RemoeError(f"The planner found no plan within {time_limit_s:g} s.", "Give it more time, or looser targets.")
        return None
    lower = min([closed, best[0], *(entry[0] for entry in heap[:1])])
    return Solution(menu[best[1]], best[2], best[0], lower, timed_out and best[0] - lower > gap * best[0])


@cache
def _silence_highs() -> None:
    """HiGHS prints a banner on the process's stdout when its first instance is made, before any option can stop it."""
    sys.stdout.flush()
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()  # type: ignore[no-untyped-call]
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _node(task: Task, specs: tuple[MainSpec, ...]) -> _Node | None:
    """The relaxation over a range of the menu; None when one limit alone rules it out."""
    problem, columns = task.problem, task.columns
    workload = problem.workload
    prefill_speed, decode_speed = (max(cost.main_speed(problem, spec, phase) for spec in specs) for phase in cost.PHASES)
    price = min(cost.main_usd_per_s(problem, spec) for spec in specs)
    capacity = max(cost.local_capacity(problem, spec) for spec in specs)
    prefill, decode = columns.prefill_s(prefill_speed), columns.decode_s(decode_speed, cost.local_step_s(problem))
    prefill_rest = min(cost.prefill_rest_s(problem, spec) for spec in specs)
    decode_rest = min(cost.decode_rest_s(problem, spec) for spec in specs)
    match task.objective:
        case "cost":
            c, const = price * (prefill + workload.n_out * decode) + columns.bill_usd, price * (prefill_rest + workload.n_out * decode_rest)
        case "ttft":
            c, const = prefill, prefill_rest
        case "tpot":
            c, const = decode, decode_rest
    limits: list[tuple[Floats, float]] = [((problem.spec.experts_per_layer - columns.count).astype(np.float64), float(capacity))]
    if task.ttft_s is not None:
        limits.append((prefill, task.ttft_s * (1 + SLACK) - prefill_rest))
    if task.tpot_s is not None:
        limits.append((decode, task.tpot_s * (1 + SLACK) - decode_rest))
    if any(np.minimum.reduceat(row, columns.starts).sum() > limit for row, limit in limits):
        return None
    scale = float(np.minimum.reduceat(c, columns.starts).sum()) or 1.0
    # A limit of exactly 0 leaves only columns that use none of it: any use counts double, and so breaks `<= 1`.
    rows = np.stack([row / limit if limit > 0 else np.where(row > 0, 2.0, 0.0) for row, limit in limits])
    return _Node(columns.starts, columns.layer, const, scale, c / scale, rows)


def _bound(node: _Node, parent: _Bound | None, cutoff: float) -> _Bound:
    """Multipliers by column generation: LP over a pool, price all columns, add each layer's best, until nothing is added."""
    u = parent.u if parent else np.zeros(len(node.rows))
    pool = set(parent.pool.tolist()) if parent else set()
    for row in node.rows:
        pool.update(node.cheapest(row, np.minimum.reduceat(row, node.starts)).tolist())
    best = _Bound(-np.inf, u, np.array(sorted(pool)))
    for _ in range(60):
        priced, least, lower = node.reduced(u)
        if lower > best.lower:
            best = _Bound(lower, u, best.pool)
        if best.lower >= min(cutoff, node.dearest):
            break
        added = set(node.cheapest(priced, least).tolist()) - pool
        pool |= added
        pool_array = np.array(sorted(pool))
        value, u, used = _master(node, pool_array)
        best = _Bound(best.lower, best.u, used)
        if node.const + node.scale * value - best.lower <= 1e-7 * abs(best.lower):
            break
    return best


def _master(node: _Node, pool: Ints) -> tuple[float, Floats, Ints]:
    """LP over the pool, rows elastic at PENALTY: its value, the rows' multipliers, and the columns it uses."""
    lp, x = _programme(node, pool, elastic=True)
    lp.solve(pulp.HiGHS(mip=False, msg=False, threads=1))
    u = np.array([max(0.0, -lp.get_constraint_by_name(f"row{index}").pi) for index in range(len(node.rows))])
    used = pool[[variable.varValue > 1e-9 for variable in x]]
    return float(pulp.value(lp.objective)), u, used


def _programme(node: _Node, at: Ints, elastic: bool, tighten: float = 0.0) -> tuple[Any, list[Any]]:
    lp = pulp.LpProblem("plan", pulp.LpMinimize)
    upper, kind = (None, pulp.LpContinuous) if elastic else (1, pulp.LpInteger)
    x = [lp.add_variable(f"x{index}", 0, upper, kind) for index in range(len(at))]
    over = [lp.add_variable(f"over{index}", 0) for index in range(len(node.rows))] if elastic else []
    terms = list(zip(x, node.c[at].tolist(), strict=True)) + [(variable, PENALTY) for variable in over]
    lp += pulp.LpAffineExpression(terms)
    for index, row in enumerate(node.rows):
        sums = list(zip(x, row[at].tolist(), strict=True)) + ([(over[index], -1.0)] if elastic else [])
        lp += pulp.LpAffineExpression(sums) <= 1.0 - tighten, f"row{index}"
    for index in range(len(node.starts)):
        lp += pulp.LpAffineExpression([(x[i], 1.0) for i in np.flatnonzero(node.layer[at] == index)]) == 1.0, f"layer{index}"
    return lp, x


def _leaf(node: _Node, bound: _Bound, cutoff: float, gap: float, deadline: float) -> tuple[Ints | None, float]:
    """Best choice [L] at one main spec (None when none is better than `cutoff`) and a lower bound for this spec."""
    priced, least, lower = node.reduced(bound.u)
    excess = (priced - least[node.layer]) * node.scale
    window = max(gap, 1e-3) * max(abs(lower), 1e-3 * node.scale)
    while True:
        last = window >= cutoff - lower or window >= float(excess.max())
        window = min(window, cutoff - lower)
        kept = _undominated(node, np.flatnonzero(excess <= window))
        outside = lower + window if (excess > window).any() else np.inf
        found, inside = _integer(node, kept, gap, deadline)
        leaf_lower = max(lower, min(inside, outside))
        value = node.value(found) if found is not None else np.inf
        least_known = min(value, cutoff)
        close = least_known < np.inf and least_known - leaf_lower <= gap * least_known
        if close or last or outside >= value or time.monotonic() > deadline:  # outside >= value: what is left is the solver's gap
            return found, leaf_lower
        window *= 3


def _integer(node: _Node, kept: Ints, gap: float, deadline: float) -> tuple[Ints | None, float]:
    """The integer programme over the kept columns: a choice that truly meets the rows, and the solver's bound."""
    inside = np.inf
    for tighten in (0.0, 2e-6, 2e-5):  # the solver's tolerance may break a limit by a millionth; then ask for a little more
        limit_s = max(0.1, deadline - time.monotonic())
        if len(np.unique(node.layer[kept])) < len(node.starts):
            return None, np.inf
        lp, x = _programme(node, kept, elastic=False, tighten=tighten)
        lp.solve(pulp.HiGHS(msg=False, threads=1, gapRel=gap / 4, gapAbs=1e-10, timeLimit=limit_s))
        if lp.sol_status == pulp.LpSolutionInfeasible:
            return None, inside
        bound = lp.solverModel.getInfo().mip_dual_bound
        inside = min(inside, node.const + node.scale * bound)
        if lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None, inside
        chosen = kept[[variable.varValue is not None and variable.varValue > 0.5 for variable in x]]
        if np.array_equal(node.layer[chosen], np.arange(len(node.starts))) and (node.rows[:, chosen].sum(axis=1) <= 1 + SLACK).all():
            return chosen, inside
    return None, inside


def _undominated(node: _Node, at: Ints) -> Ints:
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
