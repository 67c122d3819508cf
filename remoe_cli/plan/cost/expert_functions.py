"""The expert functions of one layer: time, payload, memory and price of candidate remote sets (method sections 3, 4 and 9).

- One invocation per function and token carries all hit experts, so t_rem is paid once, not once per expert; the paper's equation 5,
  one call after another for each expert, is priced with `invocations="per-expert"`.
- Of an invocation only the time inside the function is billed (its warm overhead there, computing, its payload), rounded up to the
  platform's granularity; where the overhead's spread was measured, the mean of the rounded times counts, for that is what a bill
  adds up; each invocation has its fee.
- Overhead and rate are those measured on a live target where the profile has them, else the catalog's.
- In prefill replicas of one function share out its experts, by LPT on their work at one vCPU; several functions hold disjoint experts.
- A share of requests finds the functions cold: each instance's start is billed. It is waited for only beside an always-on main
  function, layer by layer; one that starts itself takes longer for that, and the functions start meanwhile (method section 10).

Shapes: S remote sets, Y memory specs, E experts, k = top-k, B kinds of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Bools, Floats, Ints
from remoe_cli.plan.catalog.catalog import FunctionSide
from remoe_cli.plan.problem.hits import HitDistribution
from remoe_cli.plan.problem.problem import GB_MB, MB, Problem

Places = npt.NDArray[np.int16]


def function_vcpus(side: FunctionSide, memory_mb: npt.ArrayLike) -> Floats:
    return np.minimum(side.max_useful_vcpus, np.asarray(memory_mb, dtype=np.float64) / side.mb_per_vcpu)


@dataclass(frozen=True)
class Warm:
    """A warm invocation besides its experts: t_rem in the part that is not billed and the part that is, and B.

    `billed_s` [T] are equally likely values; a catalog has one.
    """

    unbilled_s: float
    billed_s: Floats
    bytes_per_s: float

    @property
    def elapsed_s(self) -> float:
        return self.unbilled_s + float(self.billed_s.mean())


def warm(problem: Problem) -> Warm:
    """What was measured on a live target, where the profile has it, else what the catalog says."""
    side, measured = problem.catalog.function, problem.latency.invocation
    if measured is None:
        return Warm(side.warm_unbilled_s, np.array([side.warm_billed_s]), side.network_bytes_per_s)
    return Warm(measured.unbilled_s.mean, np.array(measured.billed_s.tenths), measured.bytes_per_s)


def inside_s(problem: Problem, memory_mb: npt.ArrayLike, work_s: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """Time of an invocation in the function besides overhead: the work of its experts under the CPU share, and its rows on the wire
    (the sums over tau_c(y, N) and over 2 N D / B of section 3)."""
    side = problem.catalog.function
    computing_s: Floats = problem.latency.remote_expert.elapsed_s(work_s, function_vcpus(side, memory_mb))
    return computing_s + 2 * np.asarray(rows) * (problem.spec.hidden_state_bytes * side.wire_expansion / warm(problem).bytes_per_s)


def expert_work_s(problem: Problem, memory_mb: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
    """What one expert adds to an invocation's work, broadcast over memory specs and token counts; 0 for no tokens."""
    work_s: Floats = problem.latency.remote_expert.work_s(tokens, function_vcpus(problem.catalog.function, memory_mb))
    return work_s


def decode_inside_s(problem: Problem, memory_mb: npt.ArrayLike, hits: npt.ArrayLike) -> Floats:
    """`inside_s` of one invocation for the h remote experts that one token hits."""
    return inside_s(problem, memory_mb, np.asarray(hits) * expert_work_s(problem, memory_mb, 1), hits)


def billed_s(problem: Problem, inside_s: npt.ArrayLike) -> Floats:
    """Mean of the billed time over the values of the billed overhead, each rounded up to the billing granularity; a millionth of it is
    forgiven, so that float noise does not buy a whole one."""
    granule_s = problem.catalog.function.billing_granularity_ms / 1000
    seconds = np.add.outer(warm(problem).billed_s, inside_s)
    billed: Floats = (np.ceil(seconds / granule_s - 1e-6) * granule_s).mean(axis=0)
    return billed


def function_usd_per_s(problem: Problem, memory_mb: npt.ArrayLike, experts: npt.ArrayLike) -> Floats:
    """[S, Y], for `memory_mb` [Y] or [S, Y]: c_c y (section 4), and what the /tmp costs to which a layer's functions fetch their experts:
    all have as much as the fullest needs, for its `experts` [S]."""
    side = problem.catalog.function
    fetched_mb = np.ceil(np.asarray(experts, dtype=np.float64) * (problem.spec.expert_bytes / MB))
    beyond_mb = np.maximum(0.0, fetched_mb + side.storage_spare_mb - side.storage_free_mb)
    memory_usd = problem.catalog.function_usd_per_gb_second * np.asarray(memory_mb, dtype=np.float64) / GB_MB
    usd: Floats = (side.usd_per_storage_gb_second * beyond_mb / GB_MB)[..., None] + memory_usd
    return usd


def bill_usd(problem: Problem, memory_mb: npt.ArrayLike, experts: npt.ArrayLike, billed_s: Floats, calls: Floats) -> Floats:
    """[S, Y]: what invocations of so much billed time together cost, and the fee of each; the others as in `function_usd_per_s`."""
    usd: Floats = function_usd_per_s(problem, memory_mb, experts) * billed_s + problem.catalog.function.usd_per_request * calls
    return usd


def function_memory_bytes(problem: Problem, experts: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """Memory row of section 4: runtime, experts, and hidden states of all their prompt tokens."""
    side, spec = problem.catalog.function, problem.spec
    held = np.asarray(experts, dtype=np.float64) * (spec.expert_bytes * side.expert_memory_factor)
    return side.runtime_memory_mb * MB + held + np.asarray(rows, dtype=np.float64) * spec.hidden_state_bytes


def payload_bytes(problem: Problem, rows: npt.ArrayLike) -> Floats:
    """Bytes on the wire, each way, of one invocation with `rows` hidden states (payload row of section 4)."""
    return np.asarray(rows, dtype=np.float64) * problem.spec.hidden_state_bytes * problem.catalog.function.wire_expansion


def cold_s(problem: Problem, experts: npt.ArrayLike) -> Floats:
    """Time from the call to the first result of an instance that has to start and read so many experts."""
    side, measured = problem.catalog.function, problem.latency.cold_start
    start_s = side.cold_start_s if measured is None else measured.total_s
    return start_s + np.asarray(experts, dtype=np.float64) * problem.spec.expert_bytes / side.load_bytes_per_s


def shared_out(problem: Problem, owner: Ints, tokens: Floats, replicas: int) -> Ints:
    """[S, E]: which invocation of a prompt of `tokens` [E] takes each expert: its function's (`owner`), or a replica's of the only one."""
    if replicas <= 1:
        return owner
    return lpt(expert_work_s(problem, problem.catalog.function.mb_per_vcpu, tokens), owner >= 0, replicas)


def lpt(work_s: Floats, members: Bools, replicas: int) -> Ints:
    """Longest processing time first (section 9): each expert, longest first, to the least loaded replica.

    `work_s` [E], `members` [S, E]. Returns the replica of each expert, int64 [S, E], -1 for those that are no members or have no
    work. Ties go to the lower expert id and replica. At most 4/3 - 1/(3 z) of the optimum.
    """
    at: Ints = lpt_for_each(work_s, members, (replicas,))[0].astype(np.int64)
    return at


def lpt_for_each(work_s: Floats, members: Bools, replicas: Sequence[int]) -> Places:
    """`lpt` for several numbers of replicas at once: int16 [Z, S, E]."""
    most, sets = max(replicas), len(members)
    at = np.full((len(work_s), len(replicas) * sets), -1, dtype=np.int16)
    load = np.where(np.arange(most) < np.repeat(replicas, sets)[:, None], 0.0, np.inf)
    flat, firsts = load.reshape(-1), np.arange(len(load)) * most
    added = np.tile(np.where(members, work_s, 0.0).T, len(replicas))  # [E, Z S]
    for expert in np.argsort(-work_s, kind="stable"):
        if work_s[expert] > 0:
            at[expert] = least = load.argmin(axis=1)
            flat[firsts + least] += added[expert]
    at[added == 0] = -1
    return np.ascontiguousarray(at.T).reshape(len(replicas), sets, -1)


@dataclass(frozen=True)
class Prefill:
    """The invocations of one prompt: `zt_s` [S, Y] the longest (ZT of section 3), `billed_s` and `calls` [S, Y] of all together,
    `rows` [S] hidden states in the largest."""

    zt_s: Floats
    billed_s: Floats
    calls: Floats
    rows: Floats


def prefill(problem: Problem, tokens: Floats, memory_mb: Sequence[int], at: Ints | Places, parts: int) -> Prefill:
    """One invocation for each of `parts` groups of experts, `at` [S, E] (-1 for none); `tokens` [E] of each expert."""
    memory = np.asarray(memory_mb, dtype=np.float64)
    return invoked(problem, memory, *loads(tokens, expert_work_s(problem, memory[:, None], tokens).T, at, parts))


def loads(tokens: Floats, work_s: Floats, at: Ints | Places, parts: int) -> tuple[Floats, Floats]:
    """Work [parts, S, Y] and rows [parts, S] of each group; `work_s` [E, Y] of each expert."""
    here = (at == np.arange(parts)[:, None, None]).astype(np.float64)  # [parts, S, E]
    return here @ work_s, here @ tokens


def invoked(problem: Problem, memory_mb: Floats | Ints, work_s: Floats, rows: Floats) -> Prefill:
    """The invocations of `loads`."""
    inside = inside_s(problem, memory_mb, work_s, rows[..., None])
    invoked = rows[..., None] > 0
    zt = np.where(invoked, warm(problem).elapsed_s + inside, 0.0).max(axis=0)
    billed = np.where(invoked, billed_s(problem, inside), 0.0).sum(axis=0)
    return Prefill(zt, billed, np.broadcast_to(invoked.sum(axis=0), zt.shape), rows.max(axis=0))


def decode_wait_s(problem: Problem, memory_mb: npt.ArrayLike, hits: Ints) -> Floats:
    """rho, what the remote side takes for a token that hits so many experts of one function."""
    overhead_s = warm(problem).elapsed_s
    if problem.invocations == "per-expert":
        calls: Floats = hits * (overhead_s + decode_inside_s(problem, memory_mb, 1))
        return calls
    return np.where(hits > 0, overhead_s + decode_inside_s(problem, memory_mb, hits), 0.0)


def decode_billed(problem: Problem, memory_mb: Sequence[int] | Ints, distribution: HitDistribution) -> tuple[Floats, Floats]:
    """Of one decode token: billed time [S, Y] and number [S, 1] of all invocations."""
    memory = np.asarray(memory_mb, dtype=np.float64)
    hits = np.arange(1, distribution.calls.shape[1])
    if problem.invocations == "per-expert":
        calls = (distribution.calls[:, 1:] @ hits)[:, None]
        return calls * billed_s(problem, decode_inside_s(problem, memory, 1)), calls
    billed = distribution.calls[:, 1:] @ billed_s(problem, decode_inside_s(problem, memory[:, None], hits)).T
    return billed, distribution.calls[:, 1:].sum(axis=1, keepdims=True)


def cold_usd(problem: Problem, memory_mb: npt.ArrayLike, experts: Ints, instances: int) -> Floats:
    """[S, Y], for `memory_mb` [Y] or [S, Y]: what starting the layer's instances adds to the mean request, with `experts` [S] in each."""
    billed = problem.workload.cold_share * instances * cold_s(problem, experts)
    usd: Floats = billed[:, None] * function_usd_per_s(problem, memory_mb, experts)
    return usd
