"""The expert functions of one layer: time, payload, memory and price of candidate remote sets.

- One invocation for each function and token carries all experts that are hit: t_rem is paid once, not once for each expert.
  `invocations="per-expert"` prices the paper's equation 5: one call after another, one for each expert.
- Only the time inside the function is billed: its warm overhead there, computing, and its payload, rounded up to the billing granularity.
  Where the spread of the overhead was measured, the mean of the rounded times counts, as it does on a bill. Each invocation has a fee.
- Overhead and network rate are those measured on a live target where the profile has them, else the catalog's.
- In prefill, replicas of one function share its experts by LPT on their work at one vCPU. Several functions hold disjoint experts.
- A share of requests finds the functions cold. The start of each instance is billed. It is waited for only beside an always-on main
  function, layer by layer; a main function that starts itself takes longer for that, and the expert functions start meanwhile.

Shapes: S remote sets, Y memory specs, E experts, k = top-k, B kinds of requests.
Source: method.md, sections 3, 4 and 9; cold starts: method.md, section 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.lambda_limits import MAX_TIMEOUT_S
from remoe_cli.plan.arrays import Bools, Floats, Ints
from remoe_cli.plan.catalog.catalog import FunctionSide
from remoe_cli.plan.cost import prices
from remoe_cli.plan.problem.hits import HitDistribution
from remoe_cli.plan.problem.problem import MB, Problem

Places = npt.NDArray[np.int16]
CALL_ROOM = 4.0  # a call may take so many times the predicted time before the platform ends it: it would be billed and lost
LEAST_TIMEOUT_S = 30


def function_vcpus(side: FunctionSide, memory_mb: npt.ArrayLike) -> Floats:
    """Compute the vCPUs that come with `memory_mb`, as far as a function can use them."""
    return np.minimum(side.max_useful_vcpus, np.asarray(memory_mb, dtype=np.float64) / side.mb_per_vcpu)


@dataclass(frozen=True)
class Warm:
    """What a warm invocation takes besides its experts.

    unbilled_s    part of the overhead (t_rem) that is outside the function
    billed_s      part of it inside the function, as equally likely values [T]; a catalog has one
    bytes_per_s   rate of the network (B)
    """

    unbilled_s: float
    billed_s: Floats
    bytes_per_s: float

    @property
    def elapsed_s(self) -> float:
        """The whole overhead (t_rem), in the mean."""
        return self.unbilled_s + float(self.billed_s.mean())


def warm(problem: Problem) -> Warm:
    """Read the overhead of a warm invocation: the profile's, measured on a live target, or the catalog's."""
    side, measured = problem.catalog.function, problem.latency.invocation
    if measured is None:
        return Warm(side.warm_unbilled_s, np.array([side.warm_billed_s]), side.network_bytes_per_s)
    return Warm(measured.unbilled_s.mean, np.array(measured.billed_s.tenths), measured.bytes_per_s)


def inside_s(problem: Problem, memory_mb: npt.ArrayLike, work_s: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """Compute the time of an invocation inside the function, without its overhead.

    It is the work of its experts at the function's vCPUs, and its rows on the wire there and back.

    Source: the sums over tau_c(y, N) and 2 N D / B in method.md, section 3.
    """
    side = problem.catalog.function
    computing_s: Floats = problem.latency.remote_expert.elapsed_s(work_s, function_vcpus(side, memory_mb))
    return computing_s + 2 * np.asarray(rows) * (problem.spec.hidden_state_bytes * side.wire_expansion / warm(problem).bytes_per_s)


def expert_work_s(problem: Problem, memory_mb: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
    """Compute the work that one expert adds to an invocation; 0 for no tokens.

    The time of the invocation is `elapsed_s` of the sum (profile/latency_record.py).

    Shapes: `memory_mb` and `tokens` are broadcast.
    """
    work_s: Floats = problem.latency.remote_expert.work_s(tokens, function_vcpus(problem.catalog.function, memory_mb))
    return work_s


def decode_inside_s(problem: Problem, memory_mb: npt.ArrayLike, hits: npt.ArrayLike) -> Floats:
    """Compute `inside_s` of an invocation for the remote experts that one token hits."""
    return inside_s(problem, memory_mb, np.asarray(hits) * expert_work_s(problem, memory_mb, 1), hits)


def billed_s(problem: Problem, inside_s: npt.ArrayLike) -> Floats:
    """Compute the mean billed time: `inside_s` plus each value of the billed overhead, each rounded up.

    A millionth of a granule is forgiven, so that floating-point noise does not buy a whole one.
    """
    granule_s = problem.catalog.function.billing_granularity_ms / 1000
    seconds = np.add.outer(warm(problem).billed_s, inside_s)
    billed: Floats = (np.ceil(seconds / granule_s - 1e-6) * granule_s).mean(axis=0)
    return billed


def function_usd_per_s(problem: Problem, memory_mb: npt.ArrayLike, experts: npt.ArrayLike) -> Floats:
    """Price a second of a function: its memory (c_c y), and the /tmp that it needs beyond the free part.

    All functions of a layer have as much /tmp as the fullest one needs for its `experts`.

    Shapes: `memory_mb` [Y] or [S, Y], `experts` [S]; USD [S, Y].
    Source: method.md, section 4.
    """
    storage_mb = prices.function_storage_mb(problem.catalog, problem.spec.fetched_expert_bytes, experts)
    return prices.function_usd_per_s(prices.function_prices(problem.catalog), memory_mb, storage_mb[..., None])


def bill_usd(problem: Problem, memory_mb: npt.ArrayLike, experts: npt.ArrayLike, billed_s: Floats, calls: Floats) -> Floats:
    """Price invocations by the billed time of all together, and by the fee and the log of each.

    Shapes: as in `function_usd_per_s`; `billed_s` and `calls` [S, Y] or [S, 1]; USD [S, Y].
    """
    usd_per_call = prices.function_prices(problem.catalog).usd_per_call
    usd: Floats = function_usd_per_s(problem, memory_mb, experts) * billed_s + usd_per_call * calls
    return usd


def function_memory_bytes(problem: Problem, experts: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """Compute the memory of a function: runtime, experts, and hidden states of their prompt tokens.

    Packed experts take their stored bytes. Where experts are dequantised, there is room for one more, which is being dequantised.

    Source: the limit of function memory in method.md, section 4.
    """
    side, spec = problem.catalog.function, problem.spec
    held = np.asarray(experts, dtype=np.float64) * (spec.function_expert_bytes * side.expert_memory_factor)
    held += spec.dequantised_beside_bytes
    return side.runtime_memory_mb * MB + held + np.asarray(rows, dtype=np.float64) * spec.hidden_state_bytes


def payload_bytes(problem: Problem, rows: npt.ArrayLike) -> Floats:
    """Compute the bytes on the wire, each way, of one invocation with `rows` hidden states.

    Source: the payload limit in method.md, section 4.
    """
    return np.asarray(rows, dtype=np.float64) * problem.spec.hidden_state_bytes * problem.catalog.function.wire_expansion


def cold_s(problem: Problem, experts: npt.ArrayLike) -> Floats:
    """Compute the time to the first result of an instance that has to start and read its experts."""
    side, measured = problem.catalog.function, problem.latency.cold_start
    # What was measured has read its experts too, by the disk of that machine.
    start_s = side.cold_start_s if measured is None else max(0.0, measured.total_s - measured.weights_s)
    return start_s + np.asarray(experts, dtype=np.float64) * problem.spec.fetched_expert_bytes / side.load_bytes_per_s


def allowed_s(problem: Problem, experts: npt.ArrayLike, call_s: npt.ArrayLike) -> Floats:
    """Compute how long a function has to be let work.

    It starts, reads its experts, and answers its longest call, with room.
    """
    seconds: Floats = cold_s(problem, experts) + CALL_ROOM * np.asarray(call_s)
    return seconds


def most_allowed_s(problem: Problem) -> float:
    """Look up the longest time that the platform lets a function work."""
    limit_s = problem.catalog.function.timeout_s
    return limit_s if math.isinf(limit_s) else min(limit_s, MAX_TIMEOUT_S)


def timeout_s(problem: Problem, experts: int, call_s: float) -> int:
    """Choose the timeout of a function, in whole seconds."""
    return max(LEAST_TIMEOUT_S, math.ceil(float(allowed_s(problem, experts, call_s)) - 1e-6))


def longest_step_s(problem: Problem, memory_mb: npt.ArrayLike, experts: npt.ArrayLike) -> Floats:
    """Compute the longest call of a decode step: all experts of each token are in one function.

    Several tokens share out their rows evenly among as many of these experts as they can hit.

    Shapes: `memory_mb` [V], `experts` [S]; [S, V].
    """
    rows = most_step_rows(problem, experts)[:, None]
    hits = np.minimum(rows, np.asarray(experts)[:, None])
    work_s = hits * expert_work_s(problem, memory_mb, rows / hits)
    seconds: Floats = warm(problem).elapsed_s + inside_s(problem, memory_mb, work_s, rows)
    return seconds


def most_step_rows(problem: Problem, experts: npt.ArrayLike) -> Ints:
    """Count the hidden states of the largest call of a decode step, to a function with so many experts."""
    rows: Ints = problem.step_tokens * np.minimum(problem.spec.top_k, np.asarray(experts))
    return rows


def shared_out(problem: Problem, owner: Ints, tokens: Floats, replicas: int) -> Ints:
    """Assign each expert to an invocation of a prompt: of its function, or of a replica of the only one.

    Shapes: `owner` int64 [S, E], the function of each expert; `tokens` [E] of the prompt; int64 [S, E], the invocation.
    """
    if replicas <= 1:
        return owner
    return lpt(expert_work_s(problem, problem.catalog.function.mb_per_vcpu, tokens), owner >= 0, replicas)


def lpt(work_s: Floats, members: Bools, replicas: int) -> Ints:
    """Divide experts over replicas: longest work first, each to the replica with the least load (LPT).

    The longest replica takes at most 4/3 - 1/(3 z) of the optimum. Of equals, the lower expert id and the lower replica go first.

    Shapes: `work_s` [E], `members` [S, E]; int64 [S, E], the replica of each expert; -1 for those that are not members or have no work.
    Source: method.md, section 9.
    """
    at: Ints = lpt_for_each(work_s, members, (replicas,))[0].astype(np.int64)
    return at


def lpt_for_each(work_s: Floats, members: Bools, replicas: Sequence[int]) -> Places:
    """Run `lpt` for several numbers of replicas at once.

    Shapes: int16 [Z, S, E].
    """
    most, sets = max(replicas), len(members)
    at = np.full((len(work_s), len(replicas) * sets), -1, dtype=np.int16)
    load = np.where(np.arange(most) < np.repeat(replicas, sets)[:, None], 0.0, np.inf)
    flat, firsts = load.reshape(-1), np.arange(len(load)) * most
    added = np.tile(np.where(members, work_s, 0.0).T, len(replicas))  # [E, Z S]
    some = members.any(axis=0) & (work_s > 0)
    for expert in np.argsort(-work_s, kind="stable"):
        if some[expert]:
            at[expert] = least = load.argmin(axis=1)
            flat[firsts + least] += added[expert]
    at[added == 0] = -1
    return np.ascontiguousarray(at.T).reshape(len(replicas), sets, -1)


@dataclass(frozen=True)
class Prefill:
    """The invocations of one prompt.

    zt_s       [S, Y], time of the longest one (ZT)
    billed_s   [S, Y], billed time of all together
    calls      [S, Y], how many there are
    rows       [S], hidden states in the largest one

    Source: method.md, section 3.
    """

    zt_s: Floats
    billed_s: Floats
    calls: Floats
    rows: Floats


def prefill(problem: Problem, tokens: Floats, memory_mb: Sequence[int], at: Ints | Places, parts: int) -> Prefill:
    """Price the invocations of one prompt, one for each of `parts` groups of experts.

    Shapes: `tokens` [E]; `at` [S, E], the group of each expert, -1 for local.
    """
    memory = np.asarray(memory_mb, dtype=np.float64)
    return invoked(problem, memory, *loads(tokens, expert_work_s(problem, memory[:, None], tokens).T, at, parts))


def loads(tokens: Floats, work_s: Floats, at: Ints | Places, parts: int) -> tuple[Floats, Floats]:
    """Add up the work and the rows of each group of experts.

    Shapes: `tokens` [E], `work_s` [E, Y], `at` [S, E]; work [parts, S, Y], rows [parts, S].
    """
    here = (at == np.arange(parts, dtype=at.dtype)[:, None, None]).astype(np.float64)  # [parts, S, E]
    return here @ work_s, here @ tokens


def invoked(problem: Problem, memory_mb: Floats | Ints, work_s: Floats, rows: Floats) -> Prefill:
    """Price the invocations of the groups that `loads` adds up."""
    inside = inside_s(problem, memory_mb, work_s, rows[..., None])
    invoked = rows[..., None] > 0
    zt = np.where(invoked, warm(problem).elapsed_s + inside, 0.0).max(axis=0)
    billed = np.where(invoked, billed_s(problem, inside), 0.0).sum(axis=0)
    return Prefill(zt, billed, np.broadcast_to(invoked.sum(axis=0), zt.shape), rows.max(axis=0))


def decode_wait_s(problem: Problem, memory_mb: npt.ArrayLike, hits: Ints) -> Floats:
    """Compute how long the remote side takes for a token that hits so many experts of one function (rho)."""
    overhead_s = warm(problem).elapsed_s
    if problem.invocations == "per-expert":
        calls: Floats = hits * (overhead_s + decode_inside_s(problem, memory_mb, 1))
        return calls
    return np.where(hits > 0, overhead_s + decode_inside_s(problem, memory_mb, hits), 0.0)


def decode_billed(problem: Problem, memory_mb: Sequence[int] | Ints, distribution: HitDistribution) -> tuple[Floats, Floats]:
    """Compute the billed time and the number of all invocations of one decode token.

    Shapes: billed time [S, Y], number [S, 1].
    """
    memory = np.asarray(memory_mb, dtype=np.float64)
    hits = np.arange(1, distribution.calls.shape[1])
    if problem.invocations == "per-expert":
        calls = (distribution.calls[:, 1:] @ hits)[:, None]
        return calls * billed_s(problem, decode_inside_s(problem, memory, 1)), calls
    billed = distribution.calls[:, 1:] @ billed_s(problem, decode_inside_s(problem, memory[:, None], hits)).T
    return billed, distribution.calls[:, 1:].sum(axis=1, keepdims=True)


def cold_usd(problem: Problem, memory_mb: npt.ArrayLike, experts: Ints, instances: int) -> Floats:
    """Price the starts of a layer's instances, in the mean request: their time, and their reads of S3.

    Shapes: `memory_mb` [Y] or [S, Y]; `experts` [S], in each instance; USD [S, Y].
    """
    starts = problem.workload.cold_share * instances
    reads_usd = prices.function_prices(problem.catalog).usd_per_read * prices.function_reads(
        problem.catalog, problem.spec.fetched_expert_bytes, experts
    )
    usd: Floats = starts * (cold_s(problem, experts)[:, None] * function_usd_per_s(problem, memory_mb, experts) + reads_usd[:, None])
    return usd
