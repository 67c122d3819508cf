"""Main model pre-allocation (MMP): main memory and the share of remote experts, for the worst case.

Before a request's activations are predicted, its main function has to be chosen. Notation: K experts in each of L layers; ratio b, so that
the m = b K least used experts of each layer are remote; w main spec, y memory of the expert functions.

  b = 1, 1 - 1/K, .. 0:   M = max(M_min + M_e(b), M_cal);  w = smallest spec of M or more;  stop when TTFT(w, b) and TPOT(w, b) hold.

What the paper leaves open is read in this way:
- M_min + M_e(b) is what a spec needs with (1 - b) K L experts local. M_cal is the least memory at which one local expert is not slower
  than one remote one with its way there: tau_c(w, n) <= tau_c(y, n) + 2 n D / B + t_rem, for one token and for the most that one expert
  gets of a prompt. If the menu has no such spec, its fastest ones count. Specs are taken by price per second, so "smallest" is cheapest.
- Memory and replicas of the functions are chosen later (method.md, sections 8 and 9), so the most of both counts: the largest spec, z_max
  replicas.
- The remote path is taken as the slower one, so local experts count only at b = 0. In decode the bound holds for the N_out tokens
  together, not for each: with all k_top experts of every token remote, b would change nothing.
- One function holds a layer's remote experts, as in the paper; b starts where the largest spec holds them.
- Always-on instances, whose price does not depend on the request's time, are left out.

Source: method.md, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.document import MainSpec
from remoe_cli.plan.paper import worst_times
from remoe_cli.plan.paper.bound import TokenBound
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import MB, Main, Problem


@dataclass(frozen=True)
class Allocation:
    """How many experts of each layer are remote (m), and the main spec."""

    remote: int
    main: MainSpec


def allocations(problem: Problem, aim: Aim, bound: TokenBound) -> Iterator[Allocation]:
    """Yield each step, from b = 1 down, at which all targets hold in the worst case.

    The paper takes the first.
    """
    layers, experts = problem.workload.use.shape
    largest_mb = problem.catalog.function.memory_menu_mb[-1]
    specs = _fast_enough(problem, bound, largest_mb)
    for remote in range(experts, -1, -1):
        if remote and (least_memory_mb(problem, remote) > largest_mb).any():
            continue
        local = layers * (experts - remote)
        spec = next((spec for spec in specs if _room(problem, spec) >= local), None)
        if spec is None:
            return
        if _holds(problem, aim, bound, spec, remote, largest_mb):
            yield Allocation(remote, spec)


def _room(problem: Problem, spec: MainSpec) -> float:
    return min(main_function.local_capacity(problem, spec), main_function.fetch_capacity(problem, spec))


def least_memory_mb(problem: Problem, remote: int) -> Floats:
    """Compute the memory of a function for the least used experts and their tokens of the longest prompt.

    Shapes: [L].
    Source: the limit of function memory in method.md, section 4.
    """
    longest = problem.workload.most_in
    rows = np.where(problem.workload.ranks < remote, problem.workload.use * longest, 0.0).sum(axis=1)
    return expert_functions.function_memory_bytes(problem, remote, rows) / MB


def _fast_enough(problem: Problem, bound: TokenBound, memory_mb: int) -> list[MainSpec]:
    """List the specs of M_cal or more, by rising price."""
    workload = problem.workload
    usable = [s for s in problem.menu if not main_function.always_on(problem, s) and _room(problem, s) >= 0]
    longest = max(kind.n_in for kind in workload.lengths)
    most = np.array([float(bound.largest(longest, workload.use.shape[1]).max())])
    work_s = expert_functions.expert_work_s(problem, memory_mb, most)
    remote_s = expert_functions.warm(problem).elapsed_s + np.array(
        [
            float(expert_functions.inside_s(problem, memory_mb, work_s, most)[0]),
            float(expert_functions.decode_inside_s(problem, memory_mb, 1)),
        ]
    )
    local = [
        np.array([float(main_function.expert_prefill_s(problem, s, most)[0]), main_function.expert_step_s(problem, s)]) for s in usable
    ]
    fast = [spec for spec, local_s in zip(usable, local, strict=True) if (local_s <= remote_s * (1 + SLACK)).all()]
    if not fast:
        least = min((local_s[1] for local_s in local), default=math.inf)
        fast = [spec for spec, local_s in zip(usable, local, strict=True) if local_s[1] <= least * (1 + SLACK)]
    return sorted(fast, key=lambda spec: (main_function.usd_per_s(problem, spec), spec.memory_mb))


def _holds(problem: Problem, aim: Aim, bound: TokenBound, spec: MainSpec, remote: int, memory_mb: int) -> bool:
    prompts = problem.ttft_prompts
    prefill = [float(_prefill_s(problem, bound, spec, n_in, remote, memory_mb).sum()) for _, n_in in prompts]
    decode = float(worst_times.decode_s(problem, bound, remote, memory_mb).sum()) if remote else _local_step_s(problem, spec)
    ttft = ttft_rest_s(problem, spec, remote) + sum(share * s for (share, _), s in zip(prompts, prefill, strict=True))
    tpot = main_function.decode_rest_s(problem, spec) + decode
    return meets(problem, aim, spec, ttft, tpot)


def _prefill_s(problem: Problem, bound: TokenBound, spec: MainSpec, n: int, remote: int, memory_mb: int) -> Floats:
    layers, experts = problem.workload.use.shape
    if remote:
        replicas = min(remote, problem.catalog.function.max_replicas)
        return worst_times.prefill_s(problem, bound, n, remote, np.full(layers, float(memory_mb)), replicas)
    every = np.full(layers, float(n * problem.spec.top_k))
    return worst_times.most_work_s(
        lambda tokens: main_function.expert_prefill_s(problem, spec, tokens), experts, every, bound.largest(n, experts)
    )


def _local_step_s(problem: Problem, spec: MainSpec) -> float:
    layers = len(problem.workload.use)
    return layers * problem.spec.top_k * main_function.expert_step_s(problem, spec)


def ttft_rest_s(problem: Problem, spec: MainSpec, remote: int) -> float:
    """Compute TTFT without the experts' work: non-expert modules, copies, and cold starts."""
    workload = problem.workload
    layers, experts = workload.use.shape
    seconds = float(sum(share * main_function.prefill_rest_s(problem, spec, n_in) for share, n_in in problem.ttft_prompts))
    seconds += problem.ttft_cold_share * main_function.start_s(problem, spec, layers * (experts - remote))
    if remote and spec.usd_per_hour is not None:
        seconds += layers * problem.ttft_cold_share * float(expert_functions.cold_s(problem, remote))
    return float(seconds)


def meets(problem: Problem, aim: Aim, spec: MainSpec, ttft_s: float, tpot_s: float) -> bool:
    """Tell whether a mean request with these times keeps the targets and the time that it may take."""
    limits = (aim.ttft_s, aim.tpot_s, main_function.longest_mean_s(problem, Main(spec)))
    seconds = (ttft_s, tpot_s, ttft_s + problem.workload.n_out * tpot_s)
    return all(limit is None or value <= limit * (1 + SLACK) for value, limit in zip(seconds, limits, strict=True))
