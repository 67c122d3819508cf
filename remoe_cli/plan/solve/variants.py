"""Sets with the same remote experts, which differ in what is on the GPU, are priced together.

The expert functions of a layer do not see where the other experts are. So the columns of each remote set are copied for every set that has
it, and only the time of a decode token is worked out anew.

Shapes: X sets, U remote sets, E experts, S remote sets that are priced together, V speeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.cost.steps import Load, StepTimes, billed_s, calls_of, insides_s, loads_of, own_step_s, wait_s
from remoe_cli.plan.problem import hits
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import ON_GPU, REMOTE, Sets

KEPT_BYTES = 2**30  # of all tables of one solve
Small = npt.NDArray[np.int32]
Part = dict[str, Any]  # some columns, by the names of the fields of `Columns`


@dataclass(frozen=True)
class DecodeTable:
    """What decode time depends on, of sets that are divided over the same number of functions.

    local    [P], experts in CPU memory that a token hits
    call_s   [V, P], how long the remote side takes, at each speed of the functions
    shares   [S, P], share of tokens with each pair, for each set
    gpu      [P], experts on the GPU that it hits; None where none of the sets has any there

    Shapes: S sets, V speeds, P pairs of hits (`HitDistribution`).
    """

    local: Ints
    call_s: Floats
    shares: Floats
    gpu: Ints | None = None

    def expected_s(self, cpu_s: float, gpu_s: float) -> Floats:
        """Compute E[max(CPU, GPU, remote)] of a decode token, from the time of an expert on each device.

        Shapes: [S, V].
        """
        waits_s = np.maximum(self.local * cpu_s, self.call_s)
        if self.gpu is not None and gpu_s < math.inf:  # else these columns are not used
            waits_s = np.maximum(waits_s, self.gpu * gpu_s)
        seconds: Floats = self.shares @ waits_s.T
        return seconds


Keeps = Literal["waits", "loads", "nothing"]


def kept(room_bytes: int, sets: int, speeds: int, functions: int, steps: int) -> tuple[Keeps, int]:
    """Choose what a table of so many sets keeps in the memory that is left, and say how much that takes.

    >>> kept(5000, 1, 2, 1, 100), kept(1600, 1, 2, 1, 100), kept(1600, 1, 3, 1, 100), kept(1599, 1, 2, 1, 100)
    (('waits', 1600), ('waits', 1600), ('loads', 1600), ('nothing', 0))
    """
    waits, loads = 8 * sets * speeds * steps, 16 * sets * functions * steps
    ways: tuple[tuple[Keeps, int], ...] = (("waits", waits), ("loads", loads), ("nothing", 0))
    return next((way, used_bytes) for way, used_bytes in ways if used_bytes <= room_bytes)


@dataclass(frozen=True)
class StepTable:
    """The mean time of a decode step of several rows.

    It is worked out for a main function when a solver asks.

    layer, owner   [S], which ascend; [S, E], the function of each expert
    speeds_mb      [V], a memory spec of each speed of the functions
    keeps          what is not worked out anew for each main function: waits for functions, or at least what these are sent
    beside         the table of the sets with the same remote experts and none on the GPU, and which of these [S] each set waits like
    """

    problem: Problem
    layer: Small
    owner: Ints | hits.Few
    speeds_mb: Ints | Floats
    keeps: Keeps = "nothing"
    beside: tuple[StepTable, Ints] | None = None
    _loads: dict[int, tuple[Load, ...]] = field(default_factory=dict, init=False, repr=False)
    _waits: dict[tuple[int, int], Floats] = field(default_factory=dict, init=False, repr=False)
    _seconds: dict[StepTimes, Floats] = field(default_factory=dict, init=False, repr=False)

    def billed(self) -> tuple[Floats, Floats]:
        """Compute the mean billed time of a step's invocations, and their number.

        Shapes: billed time [S, V], number [S, 1].
        """
        billed, calls = np.zeros((len(self.layer), len(self.speeds_mb))), np.zeros((len(self.layer), 1))
        for one, here in self._by_layer():
            loads = loads_of(self.problem, one, self.owner[here])
            calls[here] = calls_of(loads, here.stop - here.start)
            for place, memory_mb in enumerate(self.speeds_mb.tolist()):
                inside_s = insides_s(self.problem, one, loads, memory_mb)
                billed[here, place] = billed_s(self.problem, loads, inside_s, here.stop - here.start)
                if self.keeps == "waits":
                    self._waits[one, place] = wait_s(self.problem, loads, inside_s)
            if self.keeps == "loads":
                self._loads[one] = loads
        return billed, calls

    def seconds(self, times: StepTimes) -> Floats:
        """Compute the time beside a main function with these times.

        Shapes: [S, V].
        """
        if times not in self._seconds:
            found = np.empty((len(self.layer), len(self.speeds_mb)))
            for one, here in self._by_layer():
                own_s = own_step_s(self.owner[here], self.problem.step_rows(one), times)
                for place, each_s in enumerate(self._waited(one, here)):
                    found[here, place] = np.maximum(own_s, each_s).mean(axis=1)
            self._seconds[times] = found
        return self._seconds[times]

    def _waited(self, layer: int, here: slice) -> Iterator[Floats]:
        """Compute how long the steps of some sets of a layer wait at each speed, or read it."""
        if self.beside is not None:
            table, like = self.beside
            where = next(slot for one, slot in table._by_layer() if one == layer)
            yield from (each_s[like[here] - where.start] for each_s in table._waited(layer, where))
            return
        if (layer, 0) in self._waits:
            yield from (self._waits[layer, place] for place in range(len(self.speeds_mb)))
            return
        loads = self._loads.get(layer) or loads_of(self.problem, layer, self.owner[here])
        for memory_mb in self.speeds_mb.tolist():
            yield wait_s(self.problem, loads, insides_s(self.problem, layer, loads, memory_mb))

    def _by_layer(self) -> Iterator[tuple[int, slice]]:
        starts = np.flatnonzero(np.diff(self.layer, prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(self.layer)]):
            yield int(self.layer[start]), slice(start, end)


@dataclass(frozen=True)
class Variants:
    """Which sets have the same remote experts.

    sets, layer   [X, E], [X]: all sets, and their layers
    first         [U], the first set with each remote set; ascending
    remote_set    [X], the remote set of each set, as a place in `first`
    first_gpu     [G], the first set with each row of experts on the GPU; ascending
    gpu_row       [X], that row of each set, as a place in `first_gpu`
    """

    sets: Sets
    layer: Small
    first: Ints
    remote_set: Ints
    first_gpu: Ints
    gpu_row: Ints


def variants_of(sets: Sets, layer: Small) -> Variants:
    """Find the different remote sets of each layer.

    Without anything on the GPU, each set counts as one of its own.
    """
    every = np.arange(len(sets))
    if not (sets == ON_GPU).any():
        return Variants(sets, layer, every, every, every[:1], 0 * every)
    remote, on_gpu = (np.packbits(sets == one, axis=1) for one in (REMOTE, ON_GPU))  # short rows are quick to compare
    of_layer = np.ascontiguousarray(layer[:, None]).view(np.uint8)
    return Variants(sets, layer, *hits.distinct_rows(np.concatenate([of_layer, remote], axis=1)), *hits.distinct_rows(on_gpu))


def spread_out(
    problem: Problem,
    variants: Variants,
    priced: Sequence[Part],
    at: Ints,
    owner: Ints | hits.Few,
    speeds_mb: Ints | None,
    begin: int,
    table: StepTable | None = None,
) -> tuple[list[Part], list[DecodeTable | StepTable]]:
    """Copy the columns of some remote sets for the sets that have these.

    Those with experts on the GPU get a decode table. `at` [S] are the remote sets, and `owner` [S, E] the function of each expert. The
    columns of a remote set name it as `at_set`, and their `decode_at` begins at `begin`. `speeds_mb` [V] is None where nothing is remote.
    `table` is that of the remote sets, where steps have several rows.
    """
    if len(variants.first) == len(variants.sets):
        return list(priced), []
    mine = np.flatnonzero(np.isin(variants.remote_set, at))
    on_gpu = (variants.sets[mine] == ON_GPU).any(axis=1)
    speeds = 1 if speeds_mb is None else len(speeds_mb)
    parts = [_copied(part, at, variants, mine[~on_gpu], begin, speeds, None) for part in priced]
    there = mine[on_gpu]
    if not len(there):
        return parts, []
    after = begin + len(at) * speeds
    parts += [_copied(part, at, variants, there, begin, speeds, after) for part in priced]
    remote = np.searchsorted(at, variants.remote_set[there])
    if not problem.is_one_token:
        owner = np.where(variants.sets[there] == ON_GPU, hits.ON_GPU, owner[remote])
        beside = None if table is None else (table, remote)
        return parts, [StepTable(problem, variants.layer[there], owner, np.zeros(1) if speeds_mb is None else speeds_mb, beside=beside)]
    (used, remote), (used_gpu, row) = (np.unique(each, return_inverse=True) for each in (remote, variants.gpu_row[there]))
    on_gpu = variants.sets[variants.first_gpu[used_gpu]] == ON_GPU
    found = problem.workload.hits.beside_gpu(variants.layer[there], owner[used], remote, on_gpu, row)
    call_s = np.zeros((1, len(found.local)))
    if speeds_mb is not None:
        call_s = expert_functions.decode_wait_s(problem, speeds_mb[:, None], found.busiest)
    return parts, [DecodeTable(found.local, call_s, found.shares, found.gpu)]


def hits_of(problem: Problem, layer: Small, owner: Ints | hits.Few) -> hits.HitDistribution:
    """Count what tokens hit of the sets `owner` [S, E] of layers [S], which ascend; none on the GPU."""
    counter = problem.workload.hits
    return hits.joined([counter.of_owners(one, owner[layer == one]) for one in np.unique(layer).tolist()])


def _copied(part: Part, at: Ints, variants: Variants, wanted: Ints, begin: int, speeds: int, after: int | None) -> Part:
    """Copy columns of remote sets for the sets `wanted`; from the place `after` on, these have a decode table of their own."""
    row: Ints = np.asarray(np.searchsorted(at, part["at_set"]))
    place = np.searchsorted(at, variants.remote_set[wanted])
    order, times = np.argsort(place, kind="stable"), np.bincount(place, minlength=len(at))
    column = np.repeat(np.arange(len(row)), times[row])
    within = np.arange(len(column)) - np.repeat(np.cumsum(times[row]) - times[row], times[row])
    which = order[np.repeat((np.cumsum(times) - times)[row], times[row]) + within]
    copied = {name: figures[..., column] for name, figures in part.items()}
    copied["at_set"] = wanted[which].astype(np.int32)
    if after is not None:
        copied["decode_at"] = (after + which * speeds + (copied["decode_at"] - begin) % speeds).astype(np.int32)
    return copied
