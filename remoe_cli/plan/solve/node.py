"""One node of the planner's search: a range of main specs, as a knapsack over the columns.

What a column adds to cost, TTFT and TPOT at a main spec is computed here, once, for the exact solver and the scan. For a range, every
figure is the least of its specs and every limit the largest, so what holds for the node holds for each spec in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.document import MainSpec
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import Main, Problem
from remoe_cli.plan.solve.columns import Columns
from remoe_cli.plan.solve.variants import Small

MOST_INSTANCES = 64  # of one always-on main spec


@dataclass(frozen=True)
class Task:
    """An aim, over the columns and the catalog's main functions."""

    problem: Problem
    columns: Columns
    aim: Aim


@dataclass(frozen=True)
class Node:
    """Minimise `const + scale * c x` with one column per layer and `rows x <= 1`.

    at              [N], the node's columns among all
    starts, layer   [L], first column of each layer; [N], layer of each column
    rows            [R, N], each divided by its limit; `names` and `limits` are theirs
    """

    at: Ints
    starts: Ints
    layer: Small
    const: float
    scale: float
    c: Floats
    rows: Floats
    names: tuple[str, ...]
    limits: tuple[float, ...]

    def reduced(self, duals: Floats) -> tuple[Floats, Ints, float]:
        """Price columns at the duals: their prices [N], each layer's first best [L], and the Lagrangian bound."""
        priced = self.c + duals @ self.rows
        best = self.cheapest(priced)
        return priced, best, self.const + self.scale * float(priced[best].sum() - duals.sum())

    def cheapest(self, priced: Floats) -> Ints:
        """Find the first column of least price in each layer.

        Shapes: [L].
        """
        ends = [*self.starts[1:].tolist(), len(priced)]
        return np.array([start + int(priced[start:end].argmin()) for start, end in zip(self.starts.tolist(), ends, strict=True)])

    def reduced_cost_gap(self, duals: Floats) -> Floats:
        """Compute by how much each column's reduced cost exceeds its layer's least, in the objective's unit.

        Shapes: [N].
        """
        priced, best, _ = self.reduced(duals)
        sizes = np.diff(np.append(self.starts, len(priced)))
        dearer: Floats = (priced - np.repeat(priced[best], sizes)) * self.scale
        return dearer

    @cached_property
    def upper_bound(self) -> float:
        """A value that no plan at this node exceeds: a lower bound above it proves that there is no plan.

        It is a millionth above the sum of each layer's largest cost: by rounding, large duals leave the bound of a node with few columns
        above the value of its only plan.
        """
        return (self.const + self.scale * float(np.maximum.reduceat(self.c, self.starts).sum())) * (1 + 1e-6)

    def value(self, chosen: Ints) -> float:
        """Compute the objective of a choice [L]."""
        return self.const + self.scale * float(self.c[chosen].sum())

    def meets(self, chosen: Ints) -> bool:
        """Tell whether a choice [L] keeps every limit."""
        return bool((self.rows[:, chosen].sum(axis=1) <= 1 + SLACK).all())


def mains(task: Task, cutoff: float = math.inf) -> tuple[Main, ...]:
    """List every main function that may be bought, and every useful number of always-on instances.

    There are no more instances than the slowest request could use, and none that alone cost more than `cutoff`, the value of a known plan.
    """
    return tuple(main for spec in task.problem.menu for main in _counts(task, spec, cutoff))


def holds_rest(problem: Problem, spec: MainSpec) -> bool:
    """Tell whether a main function has room for all but the experts."""
    return main_function.local_capacity(problem, spec) >= 0 and main_function.fetch_capacity(problem, spec) >= 0


def _counts(task: Task, spec: MainSpec, cutoff: float) -> Iterator[Main]:
    problem = task.problem
    if not holds_rest(problem, spec):
        return
    most = MOST_INSTANCES if main_function.always_on(problem, spec) else 1
    for instances in range(1, MOST_INSTANCES + 1):
        main = Main(spec, instances)
        if task.aim.objective == "cost" and main_function.fixed_usd(problem, main) > cutoff:
            return
        if instances == 2 and most > 1:
            at = _usable(task, (main,), None)
            figures, layer = _figures(problem, task.columns, (main,), at), task.columns.layer[slice(None) if at is None else at]
            starts = np.flatnonzero(np.diff(layer, prepend=-1))
            slowest_s = figures.busy[1] + float(np.maximum.reduceat(figures.busy[0], starts).sum())
            most = math.ceil(slowest_s * (problem.workload.requests_per_hour or 0.0) / 3600)
        if instances > most:
            return
        yield main


@dataclass(frozen=True)
class _Figures:
    """What the columns [N] add to a mean request, and what there is besides them (`.._rest_s`).

    busy   what the columns add to the main function's time for a request, which those served at once share [N], and what there is besides
    ttft   what the columns add to the TTFT that is held against the target [N], and what there is besides
    held   for each request of `Workload.held`, should it be cold: what the columns add to its time [N], and what there is besides
    """

    decode_s: Floats
    tpot_rest_s: float
    busy: tuple[Floats, float]
    ttft: tuple[Floats, float]
    held: tuple[tuple[Floats, float], ...]


def _figures(problem: Problem, columns: Columns, bought: tuple[Main, ...], at: Ints | None) -> _Figures:
    """Compute the least of each figure over the main specs, at the columns `at` or at all."""
    workload = problem.workload
    # One spec stands for all of the same speed and kind.
    kinds = {
        (
            s.hardware,
            main_function.vcpus(problem, s),
            main_function.on_gpu(problem, s),
            main_function.has_gpu_tier(problem, s),
            s.usd_per_hour is None,
            s.scales_to_zero,
        ): s
        for s in (m.spec for m in bought)
    }
    specs = tuple(kinds.values())
    chosen: Any = slice(None) if at is None else at
    sets = columns.at_set[chosen]
    local = np.minimum.reduce([columns.local_s(problem, spec) for spec in specs])
    prefill_s = [np.maximum(local_s[sets], zt_s[chosen]) for local_s, zt_s in zip(local, columns.zt_s, strict=True)]
    first_s = sum(kind.share * seconds for kind, seconds in zip(workload.lengths, prefill_s, strict=False)) + np.zeros(len(sets))
    warm_s, local_experts = first_s, problem.spec.experts_per_layer - columns.count[chosen]
    if workload.cold_share > 0 or workload.waking is not None:
        waits = [
            columns.start_s[chosen] * main_function.late_functions(problem, spec)
            + local_experts * main_function.cold_expert_s(problem, spec)
            for spec in specs
        ]
        first_s = first_s + np.minimum.reduce(waits)
    ttft_rest_s = min(
        sum(kind.share * main_function.prefill_rest_s(problem, spec, kind.n_in) for kind in workload.lengths)
        + main_function.cold_rest_s(problem, spec)
        for spec in specs
    )
    turn_s, turn_rest_s = np.zeros(len(sets)), 0.0  # that a prompt waits for the others
    step_s, step_rest_s = columns.decode_s(problem, specs, at), min(main_function.decode_rest_s(problem, spec) for spec in specs)
    decode_s, tpot_rest_s = problem.drafting.passes * step_s, problem.drafting.passes * step_rest_s
    if problem.concurrency > 1:
        turn_s, turn_rest_s, cold_s = step_s, step_rest_s, first_s - warm_s
        warm_rest_s = min(sum(k.share * main_function.prefill_rest_s(problem, s, k.n_in) for k in workload.lengths) for s in specs)
        cold_rest_s = min(main_function.cold_rest_s(problem, spec) for spec in specs)
        others = (problem.concurrency - 1) / max(workload.n_out, 1.0)
        decode_s, tpot_rest_s = decode_s + others * warm_s, tpot_rest_s + others * warm_rest_s
        first_s, ttft_rest_s = first_s + turn_s, warm_rest_s + cold_rest_s + turn_rest_s
        shared_s = (
            warm_s + turn_s + workload.n_out * decode_s,
            warm_rest_s + turn_rest_s + workload.n_out * tpot_rest_s,
        )
        busy = (shared_s[0] / problem.concurrency + cold_s, shared_s[1] / problem.concurrency + cold_rest_s)
    else:
        busy = (first_s + workload.n_out * decode_s, ttft_rest_s + workload.n_out * tpot_rest_s)
    held, ttft, at_percentile = [], (first_s, ttft_rest_s), problem.ttft_at
    if at_percentile or any(main_function.longest_request_s(problem, spec) < math.inf for spec in specs):
        cold_s = np.minimum.reduce([_cold_s(problem, spec, local_experts, columns.start_s[chosen]) for spec in specs])
        begin_s = min(main_function.start_s(problem, spec, 0) for spec in specs)
        if at_percentile is not None:
            row_s = prefill_s[workload.prompts.index(at_percentile.n_in)] + turn_s
            rest_s = min(main_function.prefill_rest_s(problem, spec, at_percentile.n_in) for spec in specs) + turn_rest_s
            ttft = (row_s + cold_s, rest_s + begin_s) if at_percentile.cold else (row_s, rest_s)
        starts_s = columns.start_s[chosen]
        held_s = np.minimum.reduce([_held_s(problem, spec, local_experts, starts_s) for spec in specs])
        for size in workload.held:
            rest_s = min(main_function.prefill_rest_s(problem, spec, size.n_in) for spec in specs) + begin_s + size.n_out * tpot_rest_s
            row_s = prefill_s[workload.prompts.index(size.n_in)] + held_s + size.n_out * decode_s + turn_s
            held.append((row_s, rest_s + turn_rest_s))
    return _Figures(decode_s, tpot_rest_s, busy, ttft, tuple(held))


def _cold_s(problem: Problem, spec: MainSpec, local_experts: Ints, mean_start_s: Floats) -> Floats:
    """Compute what each column adds to the time of a cold request."""
    if spec.starts:
        each_s = problem.spec.read_expert_bytes / main_function.load_bytes_per_s(problem, spec)
        return np.asarray(local_experts * each_s, dtype=np.float64)
    return _functions_s(problem, mean_start_s)


def _held_s(problem: Problem, spec: MainSpec, local_experts: Ints, mean_start_s: Floats) -> Floats:
    """Compute what each column adds to the longest wait of a request (`longest_wait_s` in cost/prompts.py)."""
    cold_s = _cold_s(problem, spec, local_experts, mean_start_s)
    return cold_s + _functions_s(problem, mean_start_s) if spec.scales_to_zero else cold_s


def _functions_s(problem: Problem, mean_start_s: Floats) -> Floats:
    return mean_start_s / problem.workload.cold_share if problem.workload.cold_share > 0 else np.zeros(len(mean_start_s))


def _usable(task: Task, bought: tuple[Main, ...], at: Ints | None) -> Ints | None:
    """Leave columns with experts on the GPU out where no main function has room for one there; None: all columns."""
    if not task.columns.gpu.any() or any(main_function.gpu_capacity(task.problem, main.spec) for main in bought):
        return at
    every: Ints = np.arange(len(task.columns.gpu)) if at is None else at
    usable: Ints = every[task.columns.gpu[every] == 0]
    return usable


def make_node(task: Task, bought: tuple[Main, ...], at: Ints | None = None) -> Node | None:
    """Relax the problem over a range of main functions; None when one limit alone rules the range out.

    `at` are the columns to keep; by default all.
    """
    problem, columns = task.problem, task.columns
    at = _usable(task, bought, at)
    figures = _figures(problem, columns, bought, at)
    chosen: Any = slice(None) if at is None else at
    layer = columns.layer[chosen]
    starts = np.searchsorted(layer, np.arange(len(columns.starts)))
    if starts[-1] == len(layer) or (np.diff(np.append(starts, len(layer))) == 0).any():
        return None
    busy_s, busy_rest_s = figures.busy
    usd_per_s = min(main_function.usd_per_s(problem, main.spec) for main in bought)
    fixed_usd = min(main_function.fixed_usd(problem, main) for main in bought)
    usd, usd_rest = usd_per_s * busy_s + columns.bill_usd[chosen], usd_per_s * busy_rest_s + fixed_usd
    objectives = {"cost": (usd, usd_rest), "ttft": figures.ttft, "tpot": (figures.decode_s, figures.tpot_rest_s)}
    c, const = objectives[task.aim.objective]
    capacity = max(main_function.local_capacity(problem, main.spec) for main in bought)
    longest_s = max(main_function.longest_mean_s(problem, main) for main in bought)
    ends_s, held = max(main_function.longest_request_s(problem, main.spec) for main in bought), problem.workload.held
    gpu = columns.gpu[chosen].astype(np.float64)
    local = (problem.spec.experts_per_layer - columns.count[chosen]).astype(np.float64) - gpu
    limits: dict[str, tuple[Floats, float]] = {"memory": (local, float(capacity))}
    fetched = max(main_function.fetch_capacity(problem, main.spec) for main in bought)
    if fetched < math.inf:
        limits["storage"] = (local + gpu, fetched)
    if gpu.any():
        limits["gpu memory"] = (gpu, float(max(main_function.gpu_capacity(problem, main.spec) for main in bought)))
    for name, row, limit, rest in (
        ("ttft", figures.ttft[0], task.aim.ttft_s, figures.ttft[1]),
        ("tpot", figures.decode_s, task.aim.tpot_s, figures.tpot_rest_s),
        ("budget", usd, task.aim.budget_usd, usd_rest),
        ("time", busy_s, longest_s, busy_rest_s),
        *((f"time of {size.n_in} + {size.n_out}", row, ends_s, rest) for size, (row, rest) in zip(held, figures.held, strict=False)),
    ):
        if limit is None or limit == math.inf:
            continue
        least = limit * (1 + SLACK) - rest
        if not name.startswith("time") or np.maximum.reduceat(row, starts).sum() > least:  # else no choice breaks it
            limits[name] = (row, least)
    if any(np.minimum.reduceat(row, starts).sum() > limit for row, limit in limits.values()):
        return None
    # Local experts cost nothing in an always-on main function; then the sum of the largest costs is the unit. The solver's tolerances are
    # absolute, so a unit of 1 USD would hide everything that expert functions cost.
    scale = float(np.minimum.reduceat(c, starts).sum()) or float(np.maximum.reduceat(c, starts).sum()) or 1.0
    # A limit of exactly 0 allows only columns that use nothing of it: any use counts as 2, which breaks `<= 1`.
    rows = np.empty((len(limits), len(layer)))
    for index, (row, limit) in enumerate(limits.values()):
        rows[index] = row * (1 / limit) if limit > 0 else np.where(row > 0, 2.0, 0.0)
    return Node(
        np.arange(len(layer)) if at is None else at,
        starts,
        layer,
        const,
        scale,
        c / scale,
        rows,
        tuple(limits),
        tuple(limit for _, limit in limits.values()),
    )
