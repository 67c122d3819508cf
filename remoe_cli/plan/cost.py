"""Latency, memory, payload and money of a placement: pure functions.

Equations are those of Remoe (arXiv 2512.18674) as restated in method sections 3 and 4, with these choices:

- one invocation per layer and replica carries all its hit experts, so t_rem is paid once, not once per expert;
- TPOT takes E[max(local, remote)] over the recorded tokens, not max of the means;
- of an invocation only the time inside the function is billed (its warm overhead there, computing, its payload), rounded up to the
  platform's granularity; where the overhead's spread was measured, the mean of the rounded times counts, for that is what a bill
  adds up; each invocation has its fee;
- overhead and rate are those measured on a live target where the profile has them, else the catalog's;
- requests are served one at a time, warm: cold starts and idle or kept-warm instances are not billed here.

Shapes: S remote sets, Y function memory specs, E experts, z replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.catalog import Catalog, FunctionSide
from remoe_cli.plan.document import LayerPlan, MainSpec, Outcome
from remoe_cli.plan.workload import Bools, Floats, Ints, Workload
from remoe_cli.profile.latency_record import Latency

MB = 2**20
GB_MB = 1024
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")


@dataclass(frozen=True)
class Problem:
    """All that a placement's cost depends on, besides the placement."""

    spec: MoeSpec
    latency: Latency
    catalog: Catalog
    workload: Workload

    @property
    def has_accelerator(self) -> bool:
        return self.catalog.main.usd_per_accelerator_gb_second > 0


@dataclass(frozen=True)
class Placement:
    main: MainSpec
    layers: tuple[LayerPlan, ...]


# The main function


def main_speed(problem: Problem, main: MainSpec, phase: Phase) -> float:
    """Speed relative to the profile's times: in proportion to vCPUs, saturating at those its machine had, and as much slower as a live
    main process was seen to be."""
    vcpus = problem.latency.main_vcpus if main.vcpus is None else min(main.vcpus, problem.latency.main_vcpus)
    return vcpus / problem.latency.main_vcpus / serving_ratio(problem, phase)


def serving_ratio(problem: Problem, phase: Phase) -> float:
    serving = problem.latency.serving
    return 1.0 if serving is None else {"prefill": serving.prefill, "decode": serving.decode}[phase]


def prefill_rest_s(problem: Problem, main: MainSpec) -> float:
    """Prefill besides experts: non-expert modules, and hidden states to the experts' device and back in each layer (2 tau_sw)."""
    tokens, latency = problem.workload.n_in, problem.latency
    copies_s = 2 * len(problem.spec.moe_layers) * float(latency.copy_s.seconds(tokens))
    return float(latency.nonexpert_prefill.seconds(tokens)) / nonexpert_speed(problem, main, "prefill") + copies_s


def decode_rest_s(problem: Problem, main: MainSpec) -> float:
    """One generated token besides experts, likewise."""
    copies_s = 2 * len(problem.spec.moe_layers) * float(problem.latency.copy_s.seconds(1))
    return problem.latency.nonexpert_decode_s / nonexpert_speed(problem, main, "decode") + copies_s


def nonexpert_speed(problem: Problem, main: MainSpec, phase: Phase) -> float:
    """Non-expert modules run on the accelerator when there is one, whatever the vCPUs."""
    return 1.0 / serving_ratio(problem, phase) if problem.has_accelerator else main_speed(problem, main, phase)


def base_bytes(problem: Problem) -> int:
    """M_g: non-expert modules, KV cache and hidden states of one request (section 4)."""
    workload, spec = problem.workload, problem.spec
    tokens = workload.n_in + workload.n_out
    return spec.nonexpert_bytes + spec.kv_cache_bytes(tokens) + spec.hidden_state_bytes * tokens


def main_memory_bytes(problem: Problem, local_experts: int) -> float:
    """Memory row of section 4 for `local_experts` experts of all layers together."""
    workload, spec = problem.workload, problem.spec
    held = spec.hidden_state_bytes * workload.n_out if problem.has_accelerator else base_bytes(problem)
    return problem.catalog.main.runtime_memory_mb * MB + held + spec.expert_bytes * local_experts


def local_capacity(problem: Problem, main: MainSpec) -> int:
    """Experts of all layers together that the main function can hold; negative when not even the rest fits."""
    return int((main.memory_mb * MB - main_memory_bytes(problem, 0)) // problem.spec.expert_bytes)


def main_usd_per_s(problem: Problem, main: MainSpec) -> float:
    """c_g M_g + c_c w (section 4)."""
    side = problem.catalog.main
    return side.usd_per_gb_second * main.memory_mb / GB_MB + side.usd_per_accelerator_gb_second * base_bytes(problem) / (GB_MB * MB)


# The remote functions


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
    seconds = np.asarray(inside_s, dtype=np.float64)[..., None] + warm(problem).billed_s
    billed: Floats = (np.ceil(seconds / granule_s - 1e-6) * granule_s).mean(axis=-1)
    return billed


def function_usd_per_s(problem: Problem, memory_mb: npt.ArrayLike) -> Floats:
    """c_c y (section 4)."""
    return problem.catalog.function.usd_per_gb_second * np.asarray(memory_mb, dtype=np.float64) / GB_MB


def function_memory_bytes(problem: Problem, experts: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """Memory row of section 4: runtime, experts, and hidden states of all their prompt tokens."""
    side, spec = problem.catalog.function, problem.spec
    held = np.asarray(experts, dtype=np.float64) * (spec.expert_bytes * side.expert_memory_factor)
    return side.runtime_memory_mb * MB + held + np.asarray(rows, dtype=np.float64) * spec.hidden_state_bytes


def payload_bytes(problem: Problem, rows: npt.ArrayLike) -> Floats:
    """Bytes on the wire, each way, of one invocation with `rows` hidden states (payload row of section 4)."""
    return np.asarray(rows, dtype=np.float64) * problem.spec.hidden_state_bytes * problem.catalog.function.wire_expansion


def lpt(work_s: Floats, tokens: Floats, members: Bools, replicas: int) -> tuple[Floats, Floats]:
    """Longest processing time first (section 9): each expert, longest first, to the least loaded replica.

    `work_s` [Y, E] and `tokens` [E] of each expert, `members` [S, E]. Returns work in seconds [S, Y, z] and rows [S, Y, z].
    Work grows with tokens, so the order is that of the tokens; ties go to the lower expert id and replica.
    """
    load = np.zeros((len(members), len(work_s), replicas))
    rows = np.zeros_like(load)
    for expert in np.argsort(-tokens, kind="stable"):
        if tokens[expert] > 0 and members[:, expert].any():
            least = load.argmin(axis=2)[:, :, None]
            at = members[:, expert, None, None]
            np.put_along_axis(load, least, np.take_along_axis(load, least, 2) + np.where(at, work_s[:, expert][None, :, None], 0.0), 2)
            np.put_along_axis(rows, least, np.take_along_axis(rows, least, 2) + np.where(at, tokens[expert], 0.0), 2)
    return load, rows


def hit_law(workload: Workload, layer: int, members: Bools) -> tuple[Ints, Ints, Floats]:
    """Law of (local, remote) hits of one decode token of one layer, for remote sets `members` [S, E].

    Returns the pairs that occur, as local [P] and remote [P], and their shares [S, P].
    """
    patterns, counts = workload.patterns[layer]
    with_none = np.concatenate([members, np.zeros((len(members), 1), dtype=bool)], axis=1)
    slots = patterns.shape[1] + 1
    remote = np.zeros((len(members), len(patterns)), dtype=np.int64)
    for slot in patterns.T:
        remote += with_none[:, slot]
    code = remote + slots * ((patterns >= 0).sum(axis=1)[None, :] - remote)
    pairs = np.unique(code)
    shares = np.stack([((code == pair) * counts).sum(axis=1) for pair in pairs], axis=1) / counts.sum()
    return pairs // slots, pairs % slots, shares


@dataclass(frozen=True)
class RemoteSide:
    """One layer's remote side; the main function plays no part in it.

    zt_s        [S, Y]    longest replica in prefill, ZT of section 3
    bill_usd    [S, Y]    one request's invocations, prefill and decode
    rows        [S, Y]    hidden states in the largest prefill invocation
    call_s      [Y, P]    rho for each pair of the hit law
    """

    zt_s: Floats
    bill_usd: Floats
    rows: Floats
    call_s: Floats


def remote_side(
    problem: Problem, layer: int, members: Bools, memory_mb: Sequence[int], replicas: int, law: tuple[Ints, Ints, Floats]
) -> RemoteSide:
    """Prefill by LPT over replicas and decode by one invocation a token (sections 3, 4 and 9)."""
    workload, fee = problem.workload, problem.catalog.function.usd_per_request
    memory = np.asarray(memory_mb, dtype=np.float64)
    tokens = workload.prefill_tokens[layer]
    _, remote, shares = law
    load, rows = lpt(expert_work_s(problem, memory[:, None], tokens), tokens, members, replicas)
    inside = inside_s(problem, memory[:, None], load, rows)
    zt = np.where(rows > 0, warm(problem).elapsed_s + inside, 0.0)
    step = decode_inside_s(problem, memory[:, None], remote)
    calls = np.where(remote > 0, warm(problem).elapsed_s + step, 0.0)
    step_billed = np.where(remote > 0, billed_s(problem, step), 0.0)
    billed = np.where(rows > 0, billed_s(problem, inside), 0.0).sum(axis=2) + workload.n_out * (shares @ step_billed.T)
    invocations = (rows > 0).sum(axis=2) + workload.n_out * shares[:, remote > 0].sum(axis=1, keepdims=True)
    return RemoteSide(zt.max(axis=2), function_usd_per_s(problem, memory) * billed + fee * invocations, rows.max(axis=2), calls)


# The whole


def local_prefill_s(problem: Problem, tokens: Floats, members: Bools) -> Floats:
    """[S]: sum of tau_c(1 vCPU share, N_k) over the local experts of one layer, at the profile's own speed."""
    seconds: Floats = (~members) @ problem.latency.local_expert.seconds(tokens, problem.latency.main_vcpus)
    return seconds


def local_step_s(problem: Problem) -> float:
    """t_c: one local expert for one token, at the profile's own speed."""
    return float(problem.latency.local_expert.seconds(1, problem.latency.main_vcpus))


def evaluate(problem: Problem, placement: Placement) -> Outcome:
    """Cost and latency of a placement; it need not meet any limit."""
    workload = problem.workload
    prefill_speed, decode_speed = (main_speed(problem, placement.main, phase) for phase in PHASES)
    ttft, tpot, bill = prefill_rest_s(problem, placement.main), decode_rest_s(problem, placement.main), 0.0
    experts: Any = np.arange(problem.spec.experts_per_layer)
    for index, layer in enumerate(placement.layers):
        members = np.isin(experts, layer.remote)[None, :]
        law = hit_law(workload, index, members)
        local_prefill = local_prefill_s(problem, workload.prefill_tokens[index], members)[0] / prefill_speed
        local_decode = law[0] * local_step_s(problem) / decode_speed
        if not layer.remote:
            ttft, tpot = ttft + local_prefill, tpot + float(law[2][0] @ local_decode)
            continue
        side = remote_side(problem, index, members, [layer.memory_mb], layer.replicas, law)
        ttft += max(local_prefill, float(side.zt_s[0, 0]))
        tpot += float(law[2][0] @ np.maximum(local_decode, side.call_s[0]))
        bill += float(side.bill_usd[0, 0])
    main_usd = main_usd_per_s(problem, placement.main) * (ttft + workload.n_out * tpot)
    return Outcome(cost_usd_per_request=float(main_usd + bill), ttft_s=float(ttft), tpot_s=float(tpot))
