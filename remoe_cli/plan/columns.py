"""Columns of the exact programme: per layer every (remote set, memory, functions, replicas) that may be part of an optimal plan.

With the main spec fixed, a column's share of TTFT, TPOT and cost is a constant, so the max() and the products of the paper's non-linear
programme disappear (planning study, section 1). The C columns of all layers lie one after the other, those of one set together. A set that
no single function of a memory spec holds is divided over the fewest that do; only undivided sets have replicas.
"""

from __future__ import annotations

import math
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
    problem: Problem,
    candidates: tuple[Bools, ...],
    *,
    memory_menu_mb: tuple[int, ...] | None = None,
    replicas: tuple[int, ...] | None = None,
    payload_limited: bool = True,
) -> Columns:
    """Columns for the candidate sets [S, E] of each layer, at the catalog's memory specs and numbers of replicas or some of them.

    Left out: what does not fit the function's memory or the payload, and replicas that do not shorten prefill: they cost at least
    as much, so nothing is lost.
    """
    menu = memory_menu_mb or problem.catalog.function.memory_menu_mb
    numbers = replicas or tuple(range(1, problem.catalog.function.max_replicas + 1))
    layers = [_layer_columns(_Asked(problem, index, menu, numbers, payload_limited), sets) for index, sets in enumerate(candidates)]
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


@dataclass(frozen=True)
class _Asked:
    """Of what one layer's columns are to be made."""

    problem: Problem
    index: int
    menu: tuple[int, ...]
    replicas: tuple[int, ...]
    payload_limited: bool


def _layer_columns(asked: _Asked, sets: Bools) -> tuple[dict[str, Any], list[Steps]]:
    """A layer's figures in tables of all sets, memory specs and replicas [S, Y, Z], of which the usable places become columns."""
    problem, menu = asked.problem, asked.menu
    workload, rank = problem.workload, problem.workload.ranks[asked.index]
    count, memory_mb = sets.sum(axis=1), np.array(menu)
    prefixes = _are_prefixes(rank, sets, count)
    shape = (len(sets), len(menu), len(asked.replicas))
    usable, zt_s, bill_usd = np.zeros(shape, dtype=bool), np.zeros((len(workload.lengths), *shape)), np.zeros(shape)
    functions_of, step, start_s = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2])
    usable[np.flatnonzero(count == 0)[:1], 0, 0] = True  # the empty set is one column, without memory and replicas
    missing = np.ones(shape[:2], dtype=bool) & (count > 0)[:, None]
    steps: list[Steps] = []
    taken = 0
    for functions in range(1, problem.catalog.function.max_functions + 1):
        if functions > 1 and not missing.any():
            break
        owner = owners(sets, rank, functions)
        biggest, held = _function_loads(problem, asked.index, owner, functions)
        here = missing & (held[:, None] <= memory_mb * MB)
        missing &= ~here
        at = np.flatnonzero(here.any(axis=1) | ((count == 0) & (functions == 1)))
        if not len(at):
            continue
        law = prefix_law(workload, asked.index, count[at], functions) if prefixes else hit_law(workload, asked.index, owner[at])
        steps.append(Steps(law.local, remote_side.decode_call_s(problem, menu, law), law.shares))
        places = taken + np.arange(len(at) * len(menu)).reshape(len(at), -1)
        taken += places.size
        s, y = np.nonzero(here[at] | (count[at] == 0)[:, None])
        step[at[s], y] = places[s, y]
        functions_of[here] = functions
        start_s += here * (workload.cold_share * remote_side.cold_s(problem, biggest))[:, None]
        quicker, zt, usd = _instances(asked, sets[at], owner[at], biggest[at], functions, here[at])
        usd += (workload.n_out * remote_side.decode_usd(problem, menu, law, biggest[at]))[..., None]
        s, y, z = np.nonzero(quicker)
        usable[at[s], y, z], bill_usd[at[s], y, z], zt_s[:, at[s], y, z] = True, usd[quicker], zt[:, quicker]
    s, y, z = np.nonzero(usable)
    away = count[s] > 0
    whole = {
        "memory_mb": memory_mb[y] * away,
        "functions": functions_of[s, y],
        "replicas": np.where(functions_of[s, y] > 1, 1, np.array(asked.replicas)[z]) * away,
        "count": count[s],
        "step": step[s, y],
        "at_set": s,
    }
    figures = {"zt_s": zt_s[:, usable], "bill_usd": bill_usd[usable], "start_s": start_s[s, y]}
    return figures | {name: array.astype(np.int32) for name, array in whole.items()}, steps


def _instances(asked: _Asked, sets: Bools, owner: Ints, biggest: Ints, functions: int, here: Bools) -> tuple[Bools, Floats, Floats]:
    """For each number of replicas: whether it is to be had, and quicker than fewer, [S, Y, Z]; the longest invocation of a prompt
    [B, S, Y, Z]; the bill of prompts and cold starts [S, Y, Z]. Divided sets, of several functions, have no replicas."""
    problem, menu, side = asked.problem, asked.menu, asked.problem.catalog.function
    lengths, use = problem.workload.lengths, problem.workload.use[asked.index]
    shape = (len(asked.replicas), *here.shape)
    quicker, zt_s, usd = np.zeros(shape, dtype=bool), np.full((len(lengths), *shape), np.inf), np.zeros(shape)
    work_s = [remote_side.expert_work_s(problem, side.mb_per_vcpu, use * kind.n_in) for kind in lengths] if functions == 1 else []
    shared = [remote_side.lpt_for_each(work, sets, asked.replicas) for work in work_s]
    usd_per_s = remote_side.function_usd_per_s(problem, menu, biggest)
    most = math.inf if not asked.payload_limited else side.payload_limit_bytes
    best = np.full((len(lengths), *here.shape), np.inf)
    for z, replicas in enumerate(asked.replicas if functions == 1 else (1,)):
        some = np.flatnonzero(biggest >= replicas)  # more replicas than experts shorten nothing
        usable = here[some]
        usd[z, some] = remote_side.cold_usd(problem, menu, biggest[some], functions * replicas)
        for i, kind in enumerate(lengths):
            at = shared[i][z, some] if shared else np.where(use > 0, owner, -1)
            sent = remote_side.prefill(problem, use * kind.n_in, menu, at, functions * replicas)
            usable &= (remote_side.payload_bytes(problem, sent.rows) <= most)[:, None]
            usd[z, some] += kind.share * (usd_per_s[some] * sent.billed_s + side.usd_per_request * sent.calls)
            zt_s[i, z, some] = sent.zt_s
        quicker[z, some] = usable & (zt_s[:, z, some] < best[:, some]).any(axis=0)
        best = np.where(quicker[z], np.minimum(best, zt_s[:, z]), best)
    return np.moveaxis(quicker, 0, -1), np.moveaxis(zt_s, 1, -1), np.moveaxis(usd, 0, -1)


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


def _are_prefixes(rank: Ints, sets: Bools, count: Ints) -> bool:
    """Whether each set is that of the least used experts; a single set is not worth the tables of all."""
    return len(sets) > 2 and bool((sets == (rank < count[:, None])).all())
