"""Replicas of the expert functions: instances over which LPT divides a prompt's experts. Prefill only.

Notation: layers l; z_l replicas, at most z_max and at most one for each remote expert; H_w USD per second of the main function.

  z_l = least whose fullest replica keeps the payload limit;
  while TTFT_worst(z) is above the target:  z_l += 1 for the l where that adds least cost, of those whose worst case it shortens;
  while some z_l + 1 lowers cost:           z_l += 1 for the l where it lowers cost most.

TTFT_worst takes max(local, max_j ZT_lj) in each layer, the remote side bounded by worst_times.py, the local one for the expected tokens.
Cost is H_w max(local, max_j ZT_lj) and the invocations' bills for the expected tokens: nothing else depends on z.

Source: method.md, section 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.paper import worst_times
from remoe_cli.plan.paper.bound import TokenBound
from remoe_cli.plan.paper.mmp import Allocation, ttft_rest_s
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.problem.problem import Problem


def choose(problem: Problem, ttft_s: float | None, bound: TokenBound, allocation: Allocation, memory_mb: Ints) -> Ints | None:
    """Choose z for functions of `memory_mb`; None where the payload or the target cannot be kept.

    Shapes: [L].
    """
    layers, most = len(memory_mb), min(problem.catalog.function.max_replicas, allocation.remote)

    local_s = _local_s(problem, allocation, [kind.n_in for kind in problem.workload.lengths])

    @cache
    def part(layer: int, z: int) -> tuple[float, bool]:
        return _part(problem, allocation, layer, int(memory_mb[layer]), z, local_s[:, layer])

    first = [next((z for z in range(1, most + 1) if part(layer, z)[1]), 0) for layer in range(layers)]
    if not all(first):
        return None
    z: Ints = np.array(first)
    worst_s = _worst_s(problem, bound, allocation, memory_mb, most)
    rows = np.arange(layers)

    def next_best(shorter: bool) -> tuple[float, int] | None:
        """Find the least added cost, and its layer."""
        more = [(layer, int(z[layer]) + 1) for layer in range(layers) if z[layer] < most]
        if shorter:
            more = [(layer, n) for layer, n in more if worst_s[layer, n - 1] < worst_s[layer, n - 2] * (1 - SLACK)]
        return min(((part(layer, n)[0] - part(layer, n - 1)[0], layer) for layer, n in more if part(layer, n)[1]), default=None)

    rest_s = ttft_rest_s(problem, allocation.main, allocation.remote)
    while ttft_s is not None and rest_s + worst_s[rows, z - 1].sum() > ttft_s * (1 + SLACK):
        found = next_best(shorter=True)
        if found is None:
            return None
        z[found[1]] += 1
    while (found := next_best(shorter=False)) is not None and found[0] < 0:
        z[found[1]] += 1
    return z


def _local_s(problem: Problem, allocation: Allocation, prompts: Sequence[int]) -> Floats:
    """Compute prefill of the local experts for each length of prompts.

    Shapes: [B, L].
    """
    is_local, seconds = problem.workload.ranks >= allocation.remote, []
    for n_in in prompts:
        each = main_function.expert_prefill_s(problem, allocation.main, problem.workload.use * n_in)
        seconds.append((is_local * each).sum(axis=1))
    return np.array(seconds)


def _part(problem: Problem, allocation: Allocation, layer: int, memory_mb: int, z: int, local_s: Floats) -> tuple[float, bool]:
    """Price what depends on z in a layer, in USD a request, and tell whether the payload limit is kept."""
    workload, side, spec = problem.workload, problem.catalog.function, allocation.main
    owner = np.where(workload.ranks[layer] < allocation.remote, 0, -1)[None]
    remote = np.array([allocation.remote])
    usd, fits = float(expert_functions.cold_usd(problem, [memory_mb], remote, z)[0, 0]), True
    for kind, kind_local_s in zip(workload.lengths, local_s.tolist(), strict=True):
        tokens = workload.use[layer] * kind.n_in
        sent = expert_functions.prefill(problem, tokens, [memory_mb], expert_functions.shared_out(problem, owner, tokens, z), z)
        seconds = max(kind_local_s, float(sent.zt_s[0, 0]))
        bill = float(expert_functions.bill_usd(problem, [memory_mb], remote, sent.billed_s, sent.calls)[0, 0])
        usd += kind.share * (main_function.usd_per_s(problem, spec) * seconds + bill)
    for size in workload.held:
        tokens = workload.use[layer] * size.n_in
        sent = expert_functions.prefill(problem, tokens, [memory_mb], expert_functions.shared_out(problem, owner, tokens, z), z)
        fits &= float(expert_functions.payload_bytes(problem, sent.rows[0])) <= side.payload_limit_bytes
    return usd, fits


def _worst_s(problem: Problem, bound: TokenBound, allocation: Allocation, memory_mb: Ints, most: int) -> Floats:
    """Compute each layer's part of TTFT_worst with z = 1, 2, .. replicas.

    Shapes: [L, z].
    """
    memory = memory_mb.astype(np.float64)
    total = np.zeros((len(memory), most))
    local_s = _local_s(problem, allocation, [n_in for _, n_in in problem.ttft_prompts])
    for (share, n_in), its_local_s in zip(problem.ttft_prompts, local_s, strict=True):
        for z in range(1, most + 1):
            remote_s = worst_times.prefill_s(problem, bound, n_in, allocation.remote, memory, z)
            total[:, z - 1] += share * np.maximum(its_local_s, remote_s)
    return total
