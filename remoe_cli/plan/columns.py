"""Columns of the exact programme: per layer every (remote set, memory, functions, replicas) that may be part of an optimal plan.

With the main spec fixed, a column's share of TTFT, TPOT and cost is a constant, so the max() and the products of the paper's non-linear
programme disappear (planning study, section 1). The C columns of all layers lie one after the other, those of one set together. A set that
no single function of a memory spec holds is divided over the fewest that do; only undivided sets have replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan import main_side, remote_side
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.hits import hit_law, owners, prefix_law
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

    def merged(self) -> tuple[Columns, Ints]:
        """One column for all numbers of replicas of a set at a memory spec, with the least figures of any, so that what it cannot do none
        of them can; and where the columns of each begin among these."""
        firsts = np.flatnonzero(np.diff(self.step, prepend=-1))
        names = ("layer", "at_set", "memory_mb", "functions", "replicas", "count", "start_s", "step")
        same: dict[str, Any] = {name: getattr(self, name)[firsts] for name in names}
        zt_s, bill_usd = np.minimum.reduceat(self.zt_s, firsts, axis=1), np.minimum.reduceat(self.bill_usd, firsts)
        return replace(self, starts=np.searchsorted(firsts, self.starts), zt_s=zt_s, bill_usd=bill_usd, **same), firsts

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
        first = offsets.get(name, np.zeros(len(layers), dtype=np.int64)).tolist()
        return np.concatenate([arrays[name] + first[i] if first[i] else arrays[name] for i, (arrays, _) in enumerate(layers)], axis=-1)

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
    """A layer's figures in tables of all sets, memory specs and replicas [S, Y, Z], of which the usable places become columns."""
    side, workload, rank = problem.catalog.function, problem.workload, problem.workload.ranks[index]
    count, memory_mb = sets.sum(axis=1), np.array(menu)
    prefixes = _are_prefixes(problem, index, sets, count)
    shape = (len(sets), len(menu), side.max_replicas)
    usable, zt_s, bill_usd = np.zeros(shape, dtype=bool), np.zeros((len(workload.lengths), *shape)), np.zeros(shape)
    functions_of, step, start_s = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2])
    empty = np.flatnonzero(count == 0)[:1]
    usable[empty, 0, 0] = True  # the empty set is one column, without memory and replicas
    missing = np.ones(shape[:2], dtype=bool) & (count > 0)[:, None]
    steps: list[Steps] = []
    places = 0
    for functions in range(1, side.max_functions + 1):
        owner = owners(sets, rank, functions)
        biggest, held = _function_loads(problem, index, owner, functions)
        here = missing & (held[:, None] <= memory_mb * MB)
        missing &= ~here
        at = np.flatnonzero(here.any(axis=1) | ((count == 0) & (functions == 1)))
        if not len(at):
            continue
        law = prefix_law(workload, index, count[at], functions) if prefixes else hit_law(workload, index, owner[at])
        steps.append(Steps(law.local, remote_side.decode_call_s(problem, menu, law), law.shares))
        place = places + np.arange(len(at))[:, None] * len(menu) + np.arange(len(menu))
        places += place.size
        new = here[at]
        step[at] = np.where(new | (count[at] == 0)[:, None], place, step[at])
        functions_of[here] = functions
        start_s[at] = np.where(new, (workload.cold_share * remote_side.cold_s(problem, biggest[at]))[:, None], start_s[at])
        decode = workload.n_out * remote_side.decode_usd(problem, menu, law)
        best = np.full((len(workload.lengths), *new.shape), np.inf)
        for replicas, (zt, bill, rows) in enumerate(_prefills(problem, index, sets[at], owner[at], functions, menu), 1):
            fits = (not payload_limited) | (remote_side.payload_bytes(problem, rows) <= side.payload_limit_bytes)
            quicker = new & fits[:, None] & (zt < best).any(axis=0)
            best = np.where(quicker, np.minimum(best, zt), best)
            usd = bill + decode + remote_side.cold_usd(problem, menu, biggest[at], functions * replicas)
            s, y = np.nonzero(quicker)
            usable[at[s], y, replicas - 1] = True
            zt_s[:, at[s], y, replicas - 1] = zt[:, s, y]
            bill_usd[at[s], y, replicas - 1] = usd[s, y]
    s, y, z = np.nonzero(usable)
    some = count[s] > 0
    whole = {
        "memory_mb": memory_mb[y] * some,
        "functions": functions_of[s, y],
        "replicas": (z + 1) * some,
        "count": count[s],
        "step": step[s, y],
        "at_set": s,
    }
    figures = {"zt_s": zt_s[:, usable], "bill_usd": bill_usd[usable], "start_s": start_s[s, y]}
    return figures | {name: array.astype(np.int32) for name, array in whole.items()}, steps


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


def _prefills(
    problem: Problem, index: int, sets: Bools, owner: Ints, functions: int, menu: tuple[int, ...]
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """For 1, 2, .. replicas, of the kinds of requests: longest invocation [B, S, Y]; mean bill [S, Y]; rows of the largest invocation of
    any kind [S]. Divided sets have no replicas."""
    side, lengths = problem.catalog.function, problem.workload.lengths
    usd_per_s = remote_side.function_usd_per_s(problem, menu)
    replicas = range(2, side.max_replicas + 1) if functions == 1 else ()
    tokens = [problem.workload.use[index] * kind.n_in for kind in lengths]
    work_s = [remote_side.expert_work_s(problem, side.mb_per_vcpu, n) for n in tokens] if replicas else []
    shared = [remote_side.lpt_for_each(work, sets, replicas) for work in work_s]
    for parts in (functions, *replicas):
        zts, bills, most = [], np.zeros((len(sets), len(menu))), np.zeros(len(sets))
        for i, (kind, n) in enumerate(zip(lengths, tokens, strict=True)):
            at = np.where(n > 0, owner, -1) if parts == functions else shared[i][parts - 2]
            sent = remote_side.prefill(problem, n, menu, at, parts)
            zts.append(sent.zt_s)
            bills += kind.share * (usd_per_s * sent.billed_s + side.usd_per_request * sent.calls)
            most = np.maximum(most, sent.rows)
        yield np.array(zts), bills, most
