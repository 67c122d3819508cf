"""Why no plan meets the limits, and what would do: each limit alone, then both targets together."""

from __future__ import annotations

import math

import numpy as np

from remoe_cli.errors import InfeasibleError
from remoe_cli.plan import cost
from remoe_cli.plan.columns import Columns, build_columns
from remoe_cli.plan.exact import SLACK, Objective, Task, solve
from remoe_cli.plan.workload import Bools

GAP = 1e-4


def diagnose(
    problem: cost.Problem, candidates: tuple[Bools, ...], ttft_s: float | None, tpot_s: float | None, time_limit_s: float
) -> InfeasibleError:
    """The error for a problem that has no plan: it names the limit that fails and the least value found to do."""
    columns = build_columns(problem, candidates)
    if needed_mb(problem, columns) > problem.catalog.main.menu[-1].memory_mb:
        return _memory_or_payload(problem, candidates, columns)

    def least(objective: Objective, ttft: float | None = None) -> float:
        solution = solve(Task(problem, columns, objective, ttft_s=ttft), GAP, time_limit_s)
        return solution.value if solution else math.inf

    least_ttft = least("ttft") if ttft_s is not None else 0.0
    if ttft_s is not None and least_ttft > ttft_s * (1 + SLACK):
        up = round_up(least_ttft)
        return InfeasibleError(
            f"No plan meets a TTFT of {ttft_s:g} s: the least TTFT is {up:g} s.",
            f"Ask for a TTFT of {up:g} s or more, or for shorter prompts.",
        )
    least_tpot = least("tpot") if tpot_s is not None else 0.0
    if tpot_s is not None and least_tpot > tpot_s * (1 + SLACK):
        up = round_up(least_tpot)
        return InfeasibleError(f"No plan meets a TPOT of {tpot_s:g} s: the least TPOT is {up:g} s.", f"Ask for a TPOT of {up:g} s or more.")
    together = round_up(least("tpot", ttft_s))
    return InfeasibleError(
        f"No plan meets a TTFT of {ttft_s:g} s and a TPOT of {tpot_s:g} s together: at that TTFT the least TPOT is {together:g} s.",
        f"Ask for a TPOT of {together:g} s or more, or for a looser TTFT.",
    )


def round_up(value: float, digits: int = 4) -> float:
    """`value` rounded up to so many significant digits, so that what a message offers would do."""
    if value <= 0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.{digits}g}")


def needed_mb(problem: cost.Problem, columns: Columns) -> int:
    """Least main memory: the non-expert part and the experts that no function can hold; no amount if a layer has no column."""
    if _empty_layers(columns):
        return 2**62
    local = problem.spec.experts_per_layer * len(columns.starts) - int(np.maximum.reduceat(columns.count, columns.starts).sum())
    return math.ceil(cost.main_memory_bytes(problem, local) / cost.MB)


def _empty_layers(columns: Columns) -> list[int]:
    """Layers without a single column: only where the candidates leave out the empty set, as a forced placement does."""
    return sorted(set(range(len(columns.starts))) - set(columns.layer.tolist()))


def _memory_or_payload(problem: cost.Problem, candidates: tuple[Bools, ...], columns: Columns) -> InfeasibleError:
    largest = problem.catalog.main.menu[-1]
    needed = needed_mb(problem, columns)
    unlimited = build_columns(problem, candidates, payload_limited=False)
    if needed_mb(problem, unlimited) <= largest.memory_mb:
        limit = problem.catalog.function.payload_limit_bytes
        payload = _least_payload_bytes(problem, candidates)
        return InfeasibleError(
            f"The payload limit of {limit} bytes fails: with {problem.workload.n_in} prompt tokens, "
            f"enough experts can go remote only at {payload} bytes.",
            "Plan for shorter prompts, or take a catalog with more replicas, a larger payload or a larger main function.",
        )
    if empty := _empty_layers(unlimited):
        sets = candidates[empty[0]]
        rows = sets @ problem.workload.prefill_tokens[empty[0]]
        function_mb = math.ceil(cost.function_memory_bytes(problem, sets.sum(axis=1), rows).min() / cost.MB)
        return InfeasibleError(
            f"The memory of the expert functions fails: {sets.sum(axis=1).min()} experts of layer {problem.spec.moe_layers[empty[0]]} need "
            f"{function_mb} MB, and the catalog's largest function has {problem.catalog.function.memory_menu_mb[-1]} MB.",
            "Send a smaller share of the experts away, or take a catalog with larger functions.",
        )
    return InfeasibleError(
        f"The memory of the main function fails: it needs at least {needed} MB, and the catalog's largest has {largest.memory_mb} MB.",
        "Take a catalog with a larger main function, or with larger expert functions so that more experts can go remote.",
    )


def _least_payload_bytes(problem: cost.Problem, candidates: tuple[Bools, ...]) -> int:
    """Smallest payload limit that would do, by bisection over whole bytes (more payload never takes a column away)."""
    largest_mb = problem.catalog.main.menu[-1].memory_mb
    low = problem.catalog.function.payload_limit_bytes
    high = math.ceil(float(cost.payload_bytes(problem, problem.workload.prefill_tokens.sum(axis=1).max())))
    while high - low > 1:
        middle = (low + high) // 2
        side = problem.catalog.function.model_copy(update={"payload_limit_bytes": middle})
        tried = cost.Problem(problem.spec, problem.latency, problem.catalog.model_copy(update={"function": side}), problem.workload)
        if needed_mb(tried, build_columns(tried, candidates)) <= largest_mb:
            high = middle
        else:
            low = middle
    return high
