"""Columns of the exact programme: every choice for one layer that may be part of an optimal plan.

A choice is a set (which experts are remote, and which are on the GPU), a memory spec, a number of functions and a number of replicas. With
the main spec fixed, its part of TTFT, TPOT and cost is a constant, so the max() and the products of the paper's non-linear programme
disappear. The C columns of all layers lie one after the other, those of one set together. Remote experts are in one function, or divided
over as many as the catalog allows: where no single one holds them, or because several compute a token's experts at once. Only undivided
ones have replicas. What is on the GPU changes nothing of the functions: sets with the same remote experts are priced once, and differ in
the main function's times only.

Source: planning.md, section 'Columns'.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from remoe_cli.plan.arrays import Bools, Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function, steps
from remoe_cli.plan.cost.expert_functions import Places
from remoe_cli.plan.cost.steps import StepTimes
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.hits import owner_of, owners, positions
from remoe_cli.plan.problem.problem import MB, Problem
from remoe_cli.plan.problem.workload import Workload
from remoe_cli.plan.solve.candidates import ON_CPU, ON_GPU, REMOTE, Sets
from remoe_cli.plan.solve.variants import KEPT_BYTES, DecodeTable, Small, StepTable, hits_of, kept, spread_out, variants_of

_KEPT = 4  # so many times are kept of what `decode_s` works out for a range of main functions
_AT_ONCE = 2**19  # figures in one table of sets, speeds and invocations: larger tables take more memory and as much time


@dataclass(frozen=True)
class Columns:
    """All columns of all layers. The sets of all layers are numbered in one row.

    sets, set_layer       [X, E], where each expert is in each set (`candidates.Sets`); [X], its layer
    starts                [L], the first column of each layer
    layer, at_set         [C], layer and set of each column; both ascend
    memory_mb, functions, replicas    [C], 0 for an empty set
    count, gpu            [C], remote experts, and experts on the GPU
    zt_s                  [B, C], remote prefill of each length of prompts
    bill_usd              [C], invocations of a request, with cold starts of functions
    start_s               [C], wait for functions that start, in the mean request (only beside an always-on main function)
    decode_at             [D, C], places of the column in `decode_tables`; the least of them is its decode time

    Shapes: C columns, X sets, L layers, E experts, B lengths of prompts (`Workload.prompts`); D is 1 unless columns are merged. Small
    integers are int32.
    """

    sets: Sets
    set_layer: Small
    starts: Ints
    layer: Small
    at_set: Small
    memory_mb: Small
    functions: Small
    replicas: Small
    count: Small
    gpu: Small
    zt_s: Floats
    bill_usd: Floats
    start_s: Floats
    decode_at: Small
    decode_tables: tuple[DecodeTable | StepTable, ...]
    _decode_s: dict[tuple[StepTimes, ...], Floats] = field(default_factory=dict, init=False, repr=False)

    @property
    def empty_layers(self) -> list[int]:
        """Layers without a single column.

        There are some only where the candidates leave out the empty set, as in a forced placement.
        """
        return sorted(set(range(len(self.starts))) - set(self.layer.tolist()))

    def local_s(self, problem: Problem, spec: MainSpec) -> Floats:
        """Compute prefill of each set's experts in the main function, for each length of prompts.

        It is endless where they cannot be there.

        Shapes: [B, X].
        """
        on_cpu, on_gpu = self.sets == ON_CPU, self.sets == ON_GPU
        there, out = np.flatnonzero(on_gpu.any(axis=1)), []
        for n_in in problem.workload.prompts:
            tokens = problem.workload.use * n_in
            seconds = np.einsum("xe,xe->x", on_cpu, main_function.expert_prefill_s(problem, spec, tokens)[self.set_layer])
            if len(there) and not main_function.has_gpu_tier(problem, spec):
                seconds[there] = np.inf
            elif len(there):
                gpu_s = main_function.gpu_expert_prefill_s(problem, spec, tokens)[self.set_layer[there]]
                seconds[there] = np.maximum(seconds[there], np.einsum("xe,xe->x", on_gpu[there], gpu_s))
            out.append(seconds)
        return np.array(out)

    def decode_s(self, problem: Problem, specs: Sequence[MainSpec], at: Ints | None = None) -> Floats:
        """Compute the mean time of a decode step of the columns `at`, or of all: the least of the specs.

        Shapes: [C].
        """
        fastest = steps.least_times([steps.step_times(problem, spec) for spec in specs])
        if fastest not in self._decode_s:
            cpu_s, gpu_s = (min(each[device][1] for each in fastest) for device in (0, 1))
            each_s = [
                table.expected_s(cpu_s, gpu_s)
                if isinstance(table, DecodeTable)
                else np.minimum.reduce([table.seconds(each) for each in fastest])
                for table in self.decode_tables
            ]
            while len(self._decode_s) >= _KEPT:
                del self._decode_s[next(iter(self._decode_s))]
            self._decode_s[fastest] = np.concatenate([seconds.ravel() for seconds in each_s])
        seconds = self._decode_s[fastest]
        least: Floats = reduce(np.minimum, (seconds[places if at is None else places[at]] for places in self.decode_at))
        return least

    def merged(self) -> tuple[Columns, Ints]:
        """Merge columns that differ only in functions and replicas into one optimistic column.

        It has the least of each figure, so its bound is valid for each. Also returns where the columns of each merged one begin.
        """
        firsts = np.flatnonzero(np.diff(self.at_set, prepend=-1) | np.diff(self.memory_mb, prepend=-1))
        names = ("layer", "at_set", "memory_mb", "functions", "replicas", "count", "gpu")
        same: dict[str, Any] = {name: getattr(self, name)[firsts] for name in names}
        least: dict[str, Any] = {
            name: np.minimum.reduceat(getattr(self, name), firsts, axis=-1) for name in ("zt_s", "bill_usd", "start_s")
        }
        within = np.cumsum(np.diff(self.decode_at[0], prepend=-1) != 0)  # numbers the different places
        within -= np.repeat(within[firsts], np.diff(np.append(firsts, len(within))))
        places = np.repeat(self.decode_at[:, firsts], within.max(initial=0) + 1, axis=0)
        places[within, np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(within))))] = self.decode_at[0]
        return replace(self, starts=np.searchsorted(firsts, self.starts), decode_at=places, **same, **least), firsts

    def layer_plans(self, problem: Problem, chosen: Ints) -> tuple[LayerPlan, ...]:
        """Write one chosen column per layer, in order, as the layers of a plan."""
        return tuple(self._layer_plan(problem, index, int(column)) for index, column in enumerate(chosen))

    def _layer_plan(self, problem: Problem, index: int, column: int) -> LayerPlan:
        placed, functions = self.sets[self.at_set[column]], int(self.functions[column])
        members = placed == REMOTE
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
            gpu=tuple(np.flatnonzero(placed == ON_GPU).tolist()),
        )


def build_columns(
    problem: Problem,
    candidates: tuple[Sets, ...],
    *,
    memory_menu_mb: tuple[int, ...] | None = None,
    functions: Collection[int] | None = None,
    replicas: tuple[int, ...] | None = None,
    payload_limited: bool = True,
) -> Columns:
    """Price the candidate sets of each layer at every memory spec and number of functions and replicas.

    Or at some; the fewest functions that hold a set are always among them. Left out is what does not fit the function's memory, its time
    or the payload, and what cannot be better: memory that makes a function no faster, and replicas that do not shorten prefill.

    Shapes: `candidates` per layer [S, E].
    """
    workload, side = problem.workload, problem.catalog.function
    menu, numbers = np.array(memory_menu_mb or side.memory_menu_mb), replicas or tuple(range(1, side.max_replicas + 1))
    sets = np.concatenate(candidates)
    layer_of_set = np.repeat(np.arange(len(candidates), dtype=np.int32), [len(some) for some in candidates])
    # From here on, `members` and what goes with them are the different remote sets.
    variants = variants_of(sets, layer_of_set)
    members, set_layer = sets[variants.first] == REMOTE, layer_of_set[variants.first]
    rank, count = workload.ranks[set_layer], members.sum(axis=1)
    # Counting all prefixes does not pay for one set of a layer.
    prefixes = len(members) > 2 * len(candidates) and bool((members == (rank < count[:, None])).all())
    empty = np.flatnonzero(count == 0)
    nowhere = np.repeat(owner_of(sets.shape[1], ()), len(empty), axis=0)
    tables: list[DecodeTable | StepTable] = []
    if problem.is_one_token:
        hit = workload.decode_hits[set_layer[empty]].sum(axis=1, keepdims=True)
        tables.append(DecodeTable(np.ones(1, dtype=np.int64), np.zeros((1, 1)), hit))
    elif len(empty):
        tables.append(StepTable(problem, set_layer[empty], nowhere, np.zeros(1)))
    parts, more = spread_out(problem, variants, [_nothing_remote(workload, empty)], empty, nowhere, None, 0)
    tables += more
    taken = len(empty) + sum(_places(table) for table in more)
    room_bytes, several = KEPT_BYTES, None
    for divided in _divided(problem, menu, members, set_layer, range(1, side.max_functions + 1) if functions is None else functions):
        at, number, memory_mb = divided.at, divided.functions, divided.memory_mb
        if not problem.is_one_token:
            keeps, used_bytes = kept(room_bytes, len(at), len(divided.speeds_mb), number, problem.step_rows(0).shape[1])
            room_bytes -= used_bytes
            several = StepTable(problem, divided.layer, divided.owner, divided.speeds_mb, keeps)
            tables.append(several)
            billed_s, calls = several.billed()
            billed = billed_s / problem.concurrency, calls / problem.concurrency
        else:
            counted = workload.hits.of_prefixes(divided.layer, count[at], number) if prefixes else None
            hits = counted or hits_of(problem, divided.layer, divided.owner)
            wait_s = expert_functions.decode_wait_s(problem, divided.speeds_mb[:, None], hits.busiest)
            tables.append(DecodeTable(hits.local, wait_s, hits.shares))
            billed = expert_functions.decode_billed(problem, divided.speeds_mb, hits)
        decode_usd = expert_functions.bill_usd(problem, memory_mb, divided.biggest, *billed)
        start_s = workload.cold_share * expert_functions.cold_s(problem, divided.biggest)
        priced = []
        for z, quicker, zt_s, usd in _instances(divided, numbers if number == 1 else (1,), payload_limited):
            s, v = np.nonzero(quicker)
            small = {
                "at_set": at[s],
                "memory_mb": memory_mb[s, v],
                "functions": np.full(len(s), number),
                "replicas": np.full(len(s), z),
                "decode_at": taken + np.ravel_multi_index((s, v), memory_mb.shape),
            }
            bill_usd = usd + workload.n_out * problem.drafting.passes * decode_usd
            figures = {"bill_usd": bill_usd[s, v], "start_s": start_s[s], "zt_s": zt_s[:, s, v]}
            priced.append(figures | {name: array.astype(np.int32) for name, array in small.items()})
        copied, more = spread_out(problem, variants, priced, at, divided.owner, divided.speeds_mb, taken, several)
        parts, tables = [*parts, *copied], [*tables, *more]
        taken += memory_mb.size + sum(_places(table) for table in more)
    order = np.lexsort([np.concatenate([part[name] for part in parts]) for name in ("replicas", "functions", "memory_mb", "at_set")])
    whole = {name: np.concatenate([part.pop(name) for part in parts], axis=-1)[..., order] for name in tuple(parts[0])}
    whole["decode_at"] = whole["decode_at"][None]
    layer = layer_of_set[whole["at_set"]]
    return Columns(
        sets=sets,
        set_layer=layer_of_set,
        starts=np.searchsorted(layer, np.arange(len(candidates))),
        layer=layer,
        count=(sets == REMOTE).sum(axis=1)[whole["at_set"]].astype(np.int32),
        gpu=(sets == ON_GPU).sum(axis=1)[whole["at_set"]].astype(np.int32),
        decode_tables=tuple(tables),
        **whole,
    )


def weighed_functions(problem: Problem, aim: Aim) -> Collection[int]:
    """List the numbers of functions that are weighed for an aim besides the fewest that hold a set.

    These are all if it is for TPOT, else none.
    """
    return range(1, problem.catalog.function.max_functions + 1) if aim.is_for_tpot else ()


def fewest_functions(problem: Problem, index: int, layer: LayerPlan) -> int:
    """Count the functions that the MoE layer at `index` needs at its memory; 0 where none is remote."""
    members = np.isin(np.arange(problem.spec.experts_per_layer), layer.remote)[None]
    for functions in range(1, len(layer.parts)):
        owner = owners(members, problem.workload.ranks[index], functions).astype(np.int16)
        if _function_loads(problem, np.array([index]), owner, functions)[1][0] <= layer.memory_mb * MB:
            return functions
    return len(layer.parts)


def _places(table: DecodeTable | StepTable) -> int:
    """Count the places of a table in the result of `decode_s`."""
    return len(table.shares) * len(table.call_s) if isinstance(table, DecodeTable) else len(table.layer) * len(table.speeds_mb)


def _nothing_remote(workload: Workload, at: Ints) -> dict[str, Any]:
    """Make one column for each empty set, without memory and replicas."""
    small = dict.fromkeys(("memory_mb", "functions", "replicas"), np.zeros(len(at), dtype=np.int32))
    places = {"at_set": at.astype(np.int32), "decode_at": np.arange(len(at), dtype=np.int32)}
    figures = dict.fromkeys(("bill_usd", "start_s"), np.zeros(len(at)))
    return small | places | figures | {"zt_s": np.zeros((len(workload.prompts), len(at)))}


@dataclass(frozen=True)
class _Divided:
    """Some sets, each divided over the same number of functions.

    at, layer   [S], their places among all sets, and their layers
    owner       [S, E], the function of each expert, -1 for local
    biggest     [S], experts of the fullest function
    speeds_mb   [V], a memory spec of each number of vCPUs that there is
    memory_mb   [S, V], the least spec of that speed that holds the set in so many functions; 0 where there is none
    """

    problem: Problem
    at: Ints
    layer: Small
    owner: Places
    functions: int
    biggest: Ints
    speeds_mb: Ints
    memory_mb: Ints

    def by_layer(self) -> Iterator[tuple[int, slice]]:
        """Iterate over the layers that have sets, with the slice of their sets."""
        starts = np.flatnonzero(np.diff(self.layer, prepend=-1))
        for start, end in pairwise([*starts.tolist(), len(self.layer)]):
            yield int(self.layer[start]), slice(start, end)


def _divided(problem: Problem, menu: Ints, members: Bools, set_layer: Small, numbers: Collection[int]) -> Iterator[_Divided]:
    """Divide the sets over one function, then over two, and so on, a limited number of sets at a time.

    A number that is not among `numbers` counts only where fewer functions do not hold the set.
    """
    side, count = problem.catalog.function, members.sum(axis=1)
    place_in_set = positions(members, problem.workload.ranks[set_layer]).astype(np.int16)
    first = np.flatnonzero(np.diff(expert_functions.function_vcpus(side, menu), prepend=0.0))  # [V]: the least spec of each speed
    faster = np.append(first[1:], len(menu))  # [V]: the least spec of the next speed
    end = np.repeat(faster[None], len(members), axis=0)  # [X, V]: from this spec on, fewer functions hold the set
    for functions in range(1, side.max_functions + 1):
        wanted = functions in numbers
        at = np.flatnonzero((count >= functions) & (wanted | (first < end).any(axis=1)))  # no function is empty
        before = faster if wanted else end[at]
        owner = np.where(members[at], place_in_set[at] % functions, -1)
        biggest, held = _function_loads(problem, set_layer[at], owner, functions)
        place = np.maximum(np.searchsorted(menu * MB, held)[:, None], first)
        memory_mb = np.where(place < before, np.append(menu, 0)[place], 0)
        end[at] = np.minimum(place, end[at])
        fit = np.flatnonzero(memory_mb.any(axis=1))
        step = max(1, _AT_ONCE // (len(first) * max(functions, side.max_replicas)))
        for sets in np.split(fit, range(step, len(fit), step)) if len(fit) else ():
            yield _Divided(problem, at[sets], set_layer[at[sets]], owner[sets], functions, biggest[sets], menu[first], memory_mb[sets])


def _instances(divided: _Divided, replicas: tuple[int, ...], payload_limited: bool) -> Iterator[tuple[int, Bools, Floats, Floats]]:
    """Price each number of replicas.

    Yields the number; whether it can be had and is quicker than fewer [S, V]; the longest invocation of each prompt [B, S, V]; and the
    bill of prompts and cold starts [S, V].
    """
    problem, side = divided.problem, divided.problem.catalog.function
    workload = problem.workload
    each = [workload.use * n_in for n_in in workload.prompts]
    shares = [kind.share for kind in workload.lengths]
    work_s = [expert_functions.expert_work_s(problem, divided.speeds_mb[:, None, None], tokens).transpose(1, 2, 0) for tokens in each]
    shared = [_shared(divided, tokens, replicas) for tokens in each]
    held, most = {size.n_in for size in workload.held}, side.payload_limit_bytes if payload_limited else math.inf
    step_s = expert_functions.longest_step_s(problem, divided.speeds_mb, divided.biggest)
    step_fits = expert_functions.payload_bytes(problem, expert_functions.most_step_rows(problem, divided.biggest)) <= most
    best = np.full((len(each), *divided.memory_mb.shape), np.inf)
    for z, number in enumerate(replicas):
        usable = (divided.memory_mb > 0) & (divided.biggest >= number)[:, None]  # more replicas than experts shorten nothing
        if not problem.is_one_token:
            usable &= step_fits[:, None]
        usd = expert_functions.cold_usd(problem, divided.memory_mb, divided.biggest, divided.functions * number)
        zt_s = np.empty_like(best)
        for i, tokens in enumerate(each):
            loads = [
                expert_functions.loads(tokens[layer], work_s[i][layer], shared[i][z, rows], divided.functions * number)
                for layer, rows in divided.by_layer()
            ]
            sent = expert_functions.invoked(
                problem, divided.speeds_mb, *(np.concatenate(load, axis=1) for load in zip(*loads, strict=True))
            )
            if workload.prompts[i] in held:
                call_s = np.maximum(sent.zt_s, step_s)
                allowed_s = expert_functions.allowed_s(problem, divided.biggest[:, None], call_s)
                usable &= allowed_s <= expert_functions.most_allowed_s(problem) * (1 + SLACK)
                usable &= (expert_functions.payload_bytes(problem, sent.rows) <= most)[:, None]
            if i < len(shares):
                usd += shares[i] * expert_functions.bill_usd(problem, divided.memory_mb, divided.biggest, sent.billed_s, sent.calls)
            zt_s[i] = sent.zt_s
        quicker = usable & (zt_s < best).any(axis=0)
        best = np.where(quicker, np.minimum(best, zt_s), best)
        yield number, quicker, zt_s, usd


def _shared(divided: _Divided, tokens: Floats, replicas: tuple[int, ...]) -> Places:
    """Assign each expert to an invocation of a prompt. Divided sets have no replicas.

    Shapes: [Z, S, E].
    """
    if divided.functions > 1:
        return divided.owner[None]
    work_s = expert_functions.expert_work_s(divided.problem, divided.problem.catalog.function.mb_per_vcpu, tokens)
    each = [expert_functions.lpt_for_each(work_s[layer], divided.owner[rows] >= 0, replicas) for layer, rows in divided.by_layer()]
    return np.concatenate(each, axis=1)


def _function_loads(problem: Problem, layer: Small, owner: Places, functions: int) -> tuple[Ints, Floats]:
    """Count the experts of the fullest function, and the bytes that the largest one needs.

    Shapes: [S].
    """
    tokens = problem.workload.use[layer] * main_function.most_rows(problem)
    biggest, held = np.zeros(len(owner), dtype=np.int64), np.zeros(len(owner))
    for function in range(functions):
        here = owner == function
        experts = here.sum(axis=1)
        biggest = np.maximum(biggest, experts)
        held = np.maximum(held, expert_functions.function_memory_bytes(problem, experts, np.einsum("se,se->s", here, tokens)))
    return biggest, held
