"""Columns of the exact programme: per layer every (remote set, memory, functions, replicas) that may be part of an optimal plan.

With the main spec fixed, a column's share of TTFT, TPOT and cost is a constant, so the max() and the products of the paper's non-linear
programme disappear (planning study, section 1). The C columns of all layers lie one after the other, those of one set together. A set that
no single function of a memory spec holds is divided over the fewest that do; only undivided sets have replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan import main_side, remote_side
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.hits import HitLaw, hit_law, owners, prefix_law
from remoe_cli.plan.problem import MB, Problem
from remoe_cli.plan.workload import Bools, Floats, Ints

Small = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Steps:
    """Decode of one layer's sets at all memory specs, with one way of dividing them: `local` [P], `call_s` [Y, P], `shares` [S, P]."""

    local: Ints
    call_s: Floats
    shares: Floats


@dataclass(frozen=True)
class Columns:
    """All sets of all layers are numbered in one row, X of them; arrays [C] ascend in layer and set. Small integers are int32.

    members     bool [X, E], `set_layer` [X]
    starts      [L], the first column of each layer
    layer, at_set, memory_mb, functions, replicas, count    [C]; memory, functions and replicas of an empty set are 0
    zt_s        [B, C], remote prefill of each kind of request
    bill_usd    [C], invocations of a request, cold starts of functions in it
    start_s     [C], wait for functions that start, in the mean request (only beside an always-on main function)
    step        [C], the column's place in `decode_s`'s table
    """

    members: Bools
    set_layer: Small
    starts: Ints
    layer: Small
    at_set: Small
    memory_mb: Small
    functions: Small
    replicas: Small
    count: Small
    zt_s: Floats
    bill_usd: Floats
    start_s: Floats
    step: Small
    steps: tuple[Steps, ...]

    def local_s(self, problem: Problem, spec: MainSpec) -> Floats:
        """[B, X]: prefill of each set's local experts, for each kind of request."""
        stay = ~self.members
        out = []
        for kind in problem.workload.lengths:
            seconds = main_side.expert_prefill_s(problem, spec, problem.workload.use * kind.n_in)
            out.append(np.einsum("xe,xe->x", stay, seconds[self.set_layer]))
        return np.array(out)

    def decode_s(self, step_s: float) -> Floats:
        """E[max(local, remote)] of one decode token, for the places that `step` names."""
        return np.concatenate([(s.shares @ np.maximum(s.local * step_s, s.call_s).T).ravel() for s in self.steps])

    def layer_plans(self, problem: Problem, chosen: Ints) -> tuple[LayerPlan, ...]:
        """The layers of a plan from one chosen column per layer, ascending."""
        return tuple(self._layer_plan(problem, index, int(column)) for index, column in enumerate(chosen))

    def _layer_plan(self, problem: Problem, index: int, column: int) -> LayerPlan:
        members, functions = self.members[self.at_set[column]], int(self.functions[column])
        parts: tuple[tuple[int, ...], ...] = ()
        if functions > 1:
            owner = owners(members[None], problem.workload.ranks[index], functions)[0]
            parts = tuple(tuple(np.flatnonzero(owner == part).tolist()) for part in range(functions))
        return LayerPlan(
            layer=problem.spec.moe_layers[index],
            remote=tuple(np.flatnonzero(members).tolist()),
            memory_mb=int(self.memory_mb[column]),
            replicas=int(self.replicas[column]),
            functions=parts,
        )


def build_columns(
    problem: Problem, candidates: tuple[Bools, ...], *, memory_menu_mb: tuple[int, ...] | None = None, payload_limited: bool = True
) -> Columns:
    """Columns for the candidate sets [S, E] of each layer, at the catalog's memory specs or some of them.

    Left out: what does not fit the function's memory or the payload, and replicas that do not shorten prefill: they cost at least
    as much, so nothing is lost.
    """
    menu = memory_menu_mb or problem.catalog.function.memory_menu_mb
    layers = [_layer_columns(problem, index, sets, menu, payload_limited) for index, sets in enumerate(candidates)]
    sizes = [len(arrays["count"]) for arrays, _ in layers]
    set_sizes = [len(sets) for sets in candidates]
    steps = [some for _, some in layers]
    step_sizes = [sum(s.shares.shape[0] * s.call_s.shape[0] for s in some) for some in steps]
    offsets = {"at_set": np.cumsum([0, *set_sizes[:-1]]), "step": np.cumsum([0, *step_sizes[:-1]])}

    def join(name: str) -> Any:
        parts = [arrays[name] + (offsets[name][i] if name in offsets else 0) for i, (arrays, _) in enumerate(layers)]
        joined = np.concatenate(parts, axis=-1)
        return joined if joined.dtype == np.float64 else joined.astype(np.int32)

    return Columns(
        members=np.concatenate(candidates),
        set_layer=np.repeat(np.arange(len(layers), dtype=np.int32), set_sizes),
        starts=np.cumsum([0, *sizes[:-1]]),
        layer=np.repeat(np.arange(len(layers), dtype=np.int32), sizes),
        steps=tuple(one for some in steps for one in some),
        **{name: join(name) for name in layers[0][0]},
    )


def _layer_columns(
    problem: Problem, index: int, sets: Bools, menu: tuple[int, ...], payload_limited: bool
) -> tuple[dict[str, Any], list[Steps]]:
    side, workload, rank = problem.catalog.function, problem.workload, problem.workload.ranks[index]
    count = sets.sum(axis=1)
    missing = np.ones((len(sets), len(menu)), dtype=bool) & (count > 0)[:, None]
    empty = np.flatnonzero(count == 0)[:1]  # the empty set is one column, without memory and replicas
    blocks = [_block(problem, empty, np.zeros(len(empty), int), {"zt_s": np.zeros((len(workload.lengths), len(empty)))})]
    steps: list[Steps] = []
    places = 0
    for functions in range(1, side.max_functions + 1):
        owner = owners(sets, rank, functions)
        biggest, held = _function_loads(problem, index, owner, functions)
        here = missing & (held[:, None] <= np.array(menu) * MB)
        missing &= ~here
        if functions > 1 and not here.any():
            continue
        law = _law(problem, index, sets, count, owner, functions)
        steps.append(Steps(law.local, remote_side.decode_call_s(problem, menu, law), law.shares))
        decode = workload.n_out * remote_side.decode_usd(problem, menu, law)
        start_s = workload.cold_share * remote_side.cold_s(problem, biggest)
        best = np.full((len(workload.lengths), *here.shape), np.inf)
        for replicas in range(1, (side.max_replicas if functions == 1 else 1) + 1):
            zt, bill, rows = _prefills(problem, index, sets, owner, functions, replicas, menu)
            usable = here & ((not payload_limited) | (remote_side.payload_bytes(problem, rows) <= side.payload_limit_bytes))[:, None]
            usable &= (zt < best).any(axis=0)
            best = np.where(usable, np.minimum(best, zt), best)
            usd = bill + decode + remote_side.cold_usd(problem, menu, biggest, functions * replicas)
            at_set, at_memory = np.nonzero(usable)
            figures = {
                "zt_s": zt[:, usable],
                "bill_usd": usd[usable],
                "start_s": start_s[at_set],
                "memory_mb": np.array(menu)[at_memory],
                "functions": np.full(len(at_set), functions),
                "replicas": np.full(len(at_set), replicas),
                "count": count[at_set],
                "step": places + at_set * len(menu) + at_memory,
            }
            blocks.append(_block(problem, at_set, at_memory, figures))
        places += len(sets) * len(menu)
    if len(empty):
        blocks[0]["step"] = empty * len(menu)
    order = np.lexsort([np.concatenate([block[name] for block in blocks]) for name in ("replicas", "at_memory", "at_set")])
    joined = {name: np.concatenate([block[name] for block in blocks], axis=-1)[..., order] for name in blocks[0] if name != "at_memory"}
    return joined, steps


def _block(problem: Problem, at_set: Ints, at_memory: Ints, figures: dict[str, Any]) -> dict[str, Any]:
    none = np.zeros(len(at_set), dtype=np.int64)
    nothing = {name: none for name in ("memory_mb", "functions", "replicas", "count", "step")}
    return nothing | {"bill_usd": none * 0.0, "start_s": none * 0.0} | figures | {"at_set": at_set, "at_memory": at_memory}


def _function_loads(problem: Problem, index: int, owner: Ints, functions: int) -> tuple[Ints, Floats]:
    """[S]: experts of the fullest function, and the bytes that the largest needs for the longest prompt."""
    tokens = problem.workload.use[index] * max(kind.n_in for kind in problem.workload.lengths)
    biggest, held = np.zeros(len(owner), dtype=np.int64), np.zeros(len(owner))
    for function in range(functions):
        here = owner == function
        experts = here.sum(axis=1)
        biggest = np.maximum(biggest, experts)
        held = np.maximum(held, remote_side.function_memory_bytes(problem, experts, here @ tokens))
    return biggest, held


def _are_prefixes(problem: Problem, index: int, sets: Bools, count: Ints) -> bool:
    """Whether each set is that of the least used experts; a single set is not worth the tables of all."""
    return len(sets) > 2 and bool((sets == (problem.workload.ranks[index] < count[:, None])).all())


def _law(problem: Problem, index: int, sets: Bools, count: Ints, owner: Ints, functions: int) -> HitLaw:
    if _are_prefixes(problem, index, sets, count):
        return prefix_law(problem.workload, index, count, functions)
    return hit_law(problem.workload, index, owner)


def _replica_of(problem: Problem, index: int, n_in: int, sets: Bools, replicas: int) -> Ints:
    """[S, E]: LPT. That of all prefixes is kept, as both planners ask for parts of it."""
    workload, count = problem.workload, sets.sum(axis=1)
    work = remote_side.expert_work_s(problem, problem.catalog.function.mb_per_vcpu, workload.use[index] * n_in)
    if not _are_prefixes(problem, index, sets, count):
        return remote_side.lpt(work, sets, replicas)
    most = problem.catalog.function.max_replicas
    key = ("lpt", index, n_in, most, work.tobytes())
    if key not in workload.memo:
        every = np.arange(len(work) + 1)[:, None] > workload.ranks[index]
        workload.memo[key] = remote_side.lpt_for_each(work, every, range(2, most + 1))
    at: Ints = workload.memo[key][replicas - 2][count].astype(np.int64)
    return at


def _prefills(
    problem: Problem, index: int, sets: Bools, owner: Ints, functions: int, replicas: int, menu: tuple[int, ...]
) -> tuple[Floats, Floats, Floats]:
    """Of the kinds of requests: longest invocation [B, S, Y]; mean bill [S, Y]; rows of the largest invocation of any kind [S]."""
    zts, bills, most = [], np.zeros((len(sets), len(menu))), np.zeros(len(sets))
    usd_per_s = remote_side.function_usd_per_s(problem, menu)
    for kind in problem.workload.lengths:
        tokens = problem.workload.use[index] * kind.n_in
        at = np.where(tokens > 0, owner, -1)
        if replicas > 1:
            at = _replica_of(problem, index, kind.n_in, sets, replicas)
        sent = remote_side.prefill(problem, tokens, menu, at, functions * replicas)
        zts.append(sent.zt_s)
        bills += kind.share * (usd_per_s * sent.billed_s + problem.catalog.function.usd_per_request * sent.calls)
        most = np.maximum(most, sent.rows)
    return np.array(zts), bills, most
