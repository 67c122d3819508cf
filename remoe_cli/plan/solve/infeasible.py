"""Why no plan meets the limits, and what would do.

Each limit is tried alone, and all that fail alone are named; then the targets are tried together, then the budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from remoe_cli.errors import InfeasibleError, OverBudgetError
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.document import MainSpec, Objective
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import MB, Problem
from remoe_cli.plan.solve.candidates import REMOTE, Sets
from remoe_cli.plan.solve.columns import Columns, build_columns, weighed_functions
from remoe_cli.plan.solve.exact import solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.wording import request_tokens

GAP = 1e-4


def diagnose(problem: Problem, candidates: tuple[Sets, ...], aim: Aim, time_limit_s: float) -> InfeasibleError | OverBudgetError:
    """Make the error for a problem without a plan: which limit fails, and the least value that would do."""
    error = _diagnosed(problem, candidates, aim, time_limit_s)
    if len(problem.menu) == len(problem.catalog.main.menu):
        return error
    return type(error)(error.message, f"{error.hint} With --requests-per-hour, main functions that are rented by the hour are tried too.")


def _diagnosed(problem: Problem, candidates: tuple[Sets, ...], aim: Aim, time_limit_s: float) -> InfeasibleError | OverBudgetError:
    functions = weighed_functions(problem, aim)  # of the search, so that what is named is what it lacks
    columns = build_columns(problem, candidates, functions=functions)
    if not _roomy(problem, columns):
        return _memory_or_payload(problem, candidates, functions)

    def least(objective: Objective, ttft: float | None = None, tpot: float | None = None) -> float:
        solution = solve(Task(problem, columns, Aim(objective, ttft_s=ttft, tpot_s=tpot)), GAP, time_limit_s)
        return round_up(solution.value) if solution else math.inf

    ttft_s, tpot_s = least("ttft"), least("tpot")
    if math.inf in (ttft_s, tpot_s):
        return _too_slow(problem, columns, time_limit_s)
    missed = [
        (name, target, alone)
        for name, target, alone in (("TTFT", aim.ttft_s, ttft_s), ("TPOT", aim.tpot_s, tpot_s))
        if target is not None and alone > target * (1 + SLACK)
    ]
    if missed:
        return _out_of_reach(_no_plan(problem), missed, aim.budget_usd, least("cost"))
    if aim.ttft_s is not None and aim.tpot_s is not None and (together := least("tpot", aim.ttft_s)) > aim.tpot_s * (1 + SLACK):
        return InfeasibleError(
            f"{_no_plan(problem)} meets a TTFT of {aim.ttft_s:g} s and a TPOT of {aim.tpot_s:g} s together: "
            f"at that TTFT the least TPOT is {together:g} s.",
            f"Ask for a TPOT of {together:g} s or more, or for a looser TTFT.",
            _times(together, aim.tpot_s),
        )
    cheapest = least("cost", aim.ttft_s, aim.tpot_s)
    under = " under these targets" if (aim.ttft_s, aim.tpot_s) != (None, None) else ""
    return OverBudgetError(
        f"{_no_plan(problem)} costs {aim.budget_usd:g} USD a request or less: the cheapest{under} costs {cheapest:g} USD.",
        f"Give a --budget of {cheapest:g} USD or more{', or looser targets' if under else ''}.",
        _times(cheapest, aim.budget_usd or 0.0),
    )


def _no_plan(problem: Problem) -> str:
    return "No plan" if len(problem.menu) == len(problem.catalog.main.menu) else "No plan that is paid by use"


def _out_of_reach(
    no_plan: str, missed: Sequence[tuple[str, float, float]], budget_usd: float | None, cheapest_usd: float
) -> InfeasibleError:
    """Name every target that no plan meets by itself, with the least that one can have: (name, target, least), in seconds."""
    said = [f"{no_plan} meets a {name} of {target:g} s: the least {name} is {alone:g} s." for name, target, alone in missed]
    wanted = [f"a {name} of {alone:g} s or more" for name, _, alone in missed]
    if budget_usd is not None and cheapest_usd > budget_usd * (1 + SLACK):
        said.append(f"{no_plan} costs {budget_usd:g} USD a request or less: the cheapest costs {cheapest_usd:g} USD.")
        wanted.append(f"a budget of {cheapest_usd:g} USD or more")
    shortfall = max(_times(alone, target) for _, target, alone in missed)
    if len(wanted) == 1:
        also = ", or for shorter prompts" if missed[0][0] == "TTFT" else ""
        return InfeasibleError(" ".join(said), f"Ask for {wanted[0]}{also}.", shortfall)
    return InfeasibleError(" ".join(said), f"Ask for {', and '.join(wanted)}. Each is the least without the other targets.", shortfall)


def _times(least: float, limit: float) -> float:
    return least / limit if limit > 0 else math.inf


def _too_slow(problem: Problem, columns: Columns, time_limit_s: float) -> InfeasibleError:
    """Blame the time that a request may take, where memory and payload suffice and no target is asked for."""
    side, traffic, longest = problem.catalog.main, problem.workload.requests_per_hour, problem.workload.most_tokens
    kinds = {spec.usd_per_hour is None for spec in side.menu}
    ends = [f"{side.timeout_s:g} s paid by use"] if True in kinds else []
    ends += [f"{side.rented_timeout_s:g} s on rented instances"] if False in kinds and side.rented_timeout_s is not None else []
    unhurried = replace(problem, workload=replace(problem.workload, traffic=replace(problem.workload.traffic, per_hour=1e-6)))
    if traffic is not None and solve(Task(unhurried, columns, Aim("ttft")), GAP, time_limit_s) is not None:
        longer = f", and one paid by use is too slow for {request_tokens(longest.n_in, longest.n_out)}" if len(kinds) > 1 else ""
        return InfeasibleError(
            f"Rented instances do not keep up with {traffic:g} requests an hour{longer}.",
            f"Plan for shorter answers or less traffic{_cover(problem)}, or use a catalog with faster main functions.",
        )
    return InfeasibleError(
        f"No main function can answer a request of {request_tokens(longest.n_in, longest.n_out)} that finds all cold before it is ended: "
        f"it has {', '.join(ends)}.",
        f"Plan for shorter answers{_cover(problem)}, or use a catalog with faster main functions; give --cold-share 0 where expert "
        "functions beside a rented instance are kept warm.",
    )


def round_up(value: float, digits: int = 4) -> float:
    """Round up to so many significant digits, so that what a message offers really suffices.

    >>> round_up(0.0123411)
    0.01235
    """
    if value <= 0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.{digits}g}")


def _least_local(problem: Problem, columns: Columns) -> int | None:
    """Count the experts that no function can hold; None if a layer has no column at all."""
    if columns.empty_layers:
        return None
    return problem.spec.experts_per_layer * len(columns.starts) - int(np.maximum.reduceat(columns.count, columns.starts).sum())


def _roomy(problem: Problem, columns: Columns) -> bool:
    local = _least_local(problem, columns)
    return local is not None and any(_capacity(problem, spec) >= local for spec in problem.menu)


def _capacity(problem: Problem, spec: MainSpec) -> int:
    """Count the experts of all layers that fit a main function, in CPU memory and on its GPU; negative where the rest does not fit."""
    on_cpu = main_function.local_capacity(problem, spec)
    both = on_cpu + main_function.gpu_capacity(problem, spec)
    return int(min(both, main_function.fetch_capacity(problem, spec))) if on_cpu >= 0 else on_cpu


def _memory_or_payload(problem: Problem, candidates: tuple[Sets, ...], functions: Collection[int]) -> InfeasibleError:
    longest = problem.workload.most_in
    unlimited = build_columns(problem, candidates, functions=functions, payload_limited=False)
    if _roomy(problem, unlimited):
        limit = problem.catalog.function.payload_limit_bytes
        payload = _least_payload_bytes(problem, candidates, functions)
        return InfeasibleError(
            f"The payload limit of {limit} bytes is too small: with {longest} prompt tokens, "
            f"enough experts can be remote only with {payload} bytes.",
            f"Plan for shorter prompts{_cover(problem)}, or use a catalog with more replicas, a larger payload or a larger main function.",
        )
    untimed = build_columns(_with_function(problem, timeout_s=math.inf), candidates, functions=functions, payload_limited=False)
    if _roomy(_with_function(problem, timeout_s=math.inf), untimed):
        return InfeasibleError(
            f"The time of expert functions is too short: with {longest} prompt tokens and room for calls that take longer than predicted, "
            f"enough experts can be remote only where a function may work for more than {expert_functions.most_allowed_s(problem):g} s.",
            f"Plan for shorter prompts{_cover(problem)}, or use a catalog with more replicas, faster functions or a larger main function.",
        )
    if empty := unlimited.empty_layers:
        side, index = problem.catalog.function, empty[0]
        sets = candidates[index] == REMOTE
        experts = math.ceil(sets.sum(axis=1).min() / side.max_functions)
        rows = sets @ problem.workload.use[index] * longest
        function_mb = math.ceil(expert_functions.function_memory_bytes(problem, experts, rows.min() / side.max_functions) / MB)
        return InfeasibleError(
            f"The memory of expert functions is too small: {sets.sum(axis=1).min()} experts of layer {problem.spec.moe_layers[index]} need "
            f"{function_mb} MB in each of {side.max_functions}, with {longest} prompt tokens, and the catalog's largest function has "
            f"{side.memory_menu_mb[-1]} MB.",
            "Make a smaller share of the experts remote, or use a catalog with larger functions.",
        )
    largest = max(problem.menu, key=lambda spec: _capacity(problem, spec))
    usable_bytes = main_function.usable_gpu_bytes(problem, largest)
    if largest.gpu_memory_mb is not None and main_function.base_bytes(problem) > usable_bytes:
        return InfeasibleError(
            f"The GPU memory is too small: the model without its experts needs {main_function.base_bytes(problem) / MB:.0f} MB"
            f"{_for(problem)}, "
            f"and {largest.name} has {usable_bytes / MB:.0f} MB for it.",
            "Use a catalog with larger GPUs, or plan for shorter requests.",
        )
    fetched, least = main_function.fetch_capacity(problem, largest), _least_local(problem, unlimited) or 0
    if fetched < least:
        return InfeasibleError(
            f"The /tmp of the main function is too small: {least} experts have to be local, and {largest.name}, which fetches them there, "
            f"has room for {max(0.0, fetched):.0f} beside the rest of the model.",
            "Use a catalog with other main functions, or with larger expert functions so that more experts can be remote.",
        )
    return InfeasibleError(
        f"The memory of the main function is too small: it needs at least {_needed_mb(problem, largest, unlimited)} MB{_for(problem)}, "
        f"and the catalog's largest has {largest.memory_mb} MB.",
        "Use a catalog with a larger main function, or with larger expert functions so that more experts can be remote.",
    )


def _for(problem: Problem) -> str:
    """Name the request that the memory has to hold."""
    longest = problem.workload.most_tokens
    return f" for a request of {request_tokens(longest.n_in, longest.n_out)}"


def _cover(problem: Problem) -> str:
    return ", leave the longest out with --cover" if problem.workload.traffic.served else ""


def _with_function(problem: Problem, **update: float) -> Problem:
    side = problem.catalog.function.model_copy(update=update)
    return replace(problem, catalog=problem.catalog.model_copy(update={"function": side}))


def _needed_mb(problem: Problem, spec: MainSpec, columns: Columns) -> int:
    on_cpu = max(0, (_least_local(problem, columns) or 0) - main_function.gpu_capacity(problem, spec))
    return math.ceil(main_function.main_memory_bytes(problem, spec, on_cpu) / MB)


def _least_payload_bytes(problem: Problem, candidates: tuple[Sets, ...], functions: Collection[int]) -> int:
    """Find the smallest payload limit that would do, by bisection over whole bytes.

    A larger payload never takes a column away.
    """
    low = problem.catalog.function.payload_limit_bytes
    rows = problem.workload.use.sum(axis=1).max() * problem.workload.most_in
    high = math.ceil(float(expert_functions.payload_bytes(problem, rows)))
    while high - low > 1:
        middle = (low + high) // 2
        tried = _with_function(problem, payload_limit_bytes=middle)
        if _roomy(tried, build_columns(tried, candidates, functions=functions)):
            high = middle
        else:
            low = middle
    return high
