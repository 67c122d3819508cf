"""How many experts of which function one decode token hits, and how many in the main function.

Decode time (E[max(local, remote)]) and the bill both rest on this. A remote set is divided over functions: `owner` [S, E] is the
function of each expert in each of S candidate sets, ON_CPU or ON_GPU for the main function's. A token's layer ends with its busiest
function, while every function that it hits is billed, so the distribution keeps both. It is exact over the recorded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Bools, Floats, Ints

Pattern = tuple[Ints, Ints | Floats]  # of one layer: distinct sets of experts [P, k], and how many tokens used each [P], or their weight
Parts = tuple[tuple[int, ...], ...]  # the experts of each function
Few = npt.NDArray[np.int16]
ON_CPU, ON_GPU = -1, -2  # owners that are no function


@dataclass(frozen=True)
class HitShares:
    """What one decode token of one layer hits, for each of S sets.

    local, busiest   int64 [P], pairs that occur: experts hit in CPU memory, and in the function that is hit most
    shares           float64 [S, P], share of tokens with that pair
    gpu              int64 [P], experts hit on the GPU, with each pair; None where no set has any there
    """

    local: Ints
    busiest: Ints
    shares: Floats
    gpu: Ints | None


@dataclass(frozen=True)
class HitDistribution(HitShares):
    """The same, and what functions are hit.

    calls   float64 [S, k + 1], expected functions that are hit in so many experts; column 0 is 0
    """

    calls: Floats


@dataclass(frozen=True)
class HitCounter:
    """Count hits over the recorded tokens of all layers, and keep what is counted.

    Solvers and scenarios ask for the same sets many times, as plans do for other forms of experts and kinds of main functions. Each is
    counted once: by `of_prefixes`, by `of_parts`, and by `beside_gpu`.

    patterns   per layer
    ranks      int64 [L, E], 0 for the least used expert of a layer
    """

    patterns: tuple[Pattern, ...]
    ranks: Ints
    _prefixes: dict[int, HitDistribution] = field(default_factory=dict, init=False, repr=False)
    _parts: dict[tuple[int, Parts, tuple[int, ...]], HitDistribution] = field(default_factory=dict, init=False, repr=False)
    _rows: dict[bytes, int] = field(default_factory=dict, init=False, repr=False)  # a number for each row of `beside_gpu`
    _beside: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict, init=False, repr=False)  # a row of a batch
    _batches: list[tuple[Ints, Floats]] = field(default_factory=list, init=False, repr=False)  # codes that occur, and their shares

    def of_owners(self, layer: int, owner: Ints | Few) -> HitDistribution:
        """Count for the sets `owner` [S, E] of one layer, without experts on the GPU."""
        return _counted(self.patterns[layer], owner)

    def of_parts(self, layer: int, parts: Parts, gpu: tuple[int, ...] = ()) -> HitDistribution:
        """Count for one set (S = 1), given by the experts of each of its functions, and those on the GPU."""
        if (layer, parts, gpu) not in self._parts:
            found = self.of_owners(layer, owner_of(self.ranks.shape[1], parts))
            if gpu:
                one, on_gpu = np.zeros(1, dtype=np.int64), owner_of(self.ranks.shape[1], (), gpu) == ON_GPU
                beside = self.beside_gpu(one + layer, owner_of(self.ranks.shape[1], parts), one, on_gpu, one)
                found = HitDistribution(beside.local, beside.busiest, beside.shares, beside.gpu, found.calls)
            self._parts[layer, parts, gpu] = found
        return self._parts[layer, parts, gpu]

    def beside_gpu(self, layers: npt.NDArray[Any], divided: Ints | Few, remote: Ints, on_gpu: Bools, there: Ints) -> HitShares:
        """Count for sets of layers [S], which ascend, with experts on the GPU.

        Many sets share their remote experts or those on the GPU: `remote` and `there` [S] say which of the rows below are a set's.

        Shapes: `divided` [R, E], the function of each remote expert, else ON_CPU; `on_gpu` [G, E].
        """
        slots = self.patterns[0][0].shape[1] + 1
        numbers, numbers_gpu = self._numbered(divided.astype(np.int16)), self._numbered(np.packbits(on_gpu, axis=1))
        shares = np.zeros((len(layers), slots**3))
        for layer, begin in zip(*np.unique(layers, return_index=True), strict=True):
            here = slice(begin, int(np.searchsorted(layers, layer, side="right")))
            keys = [(int(layer), *key) for key in zip(numbers[remote[here]].tolist(), numbers_gpu[there[here]].tolist(), strict=True)]
            if missing := {key: begin + place for place, key in enumerate(keys) if key not in self._beside}:
                new = np.array(list(missing.values()))
                counted = _beside(self.patterns[layer], divided, remote[new], on_gpu, there[new])
                self._beside.update({key: (len(self._batches), row) for row, key in enumerate(missing)})
                self._batches.append(((codes := np.flatnonzero(counted.any(axis=0))), counted[:, codes]))
            batches, rows = np.array([self._beside[key] for key in keys]).T
            for batch in np.unique(batches).tolist():
                of_batch = np.flatnonzero(batches == batch)
                codes, known = self._batches[batch]
                shares[begin + of_batch[:, None], codes] = known[rows[of_batch]]
        return HitShares(*_of_codes(shares, slots, True))

    def _numbered(self, rows: npt.NDArray[Any]) -> Ints:
        """Give equal rows the same number, in all calls."""
        return np.array([self._rows.setdefault(row.tobytes(), len(self._rows)) for row in rows], dtype=np.int64)

    def of_prefixes(self, layer: npt.ArrayLike, sizes: Ints, functions: int) -> HitDistribution:
        """Count for the `sizes` [S] least used experts of a layer, or of layers [S], divided by `owners`.

        The first call for a number of functions counts all sizes of all layers at once; after it, S hardly takes time.
        """
        if functions not in self._prefixes:
            each = zip(self.patterns, self.ranks, strict=True)
            self._prefixes[functions] = joined([_all_prefixes(pattern, rank, functions) for pattern, rank in each])
        hits, at = self._prefixes[functions], np.asarray(layer) * (self.ranks.shape[1] + 1) + sizes
        return HitDistribution(hits.local, hits.busiest, hits.shares[at], None, hits.calls[at])


def owner_of(experts: int, parts: Parts, gpu: tuple[int, ...] = ()) -> Ints:
    """Write one set as int64 [1, E]: the function of each expert, else ON_GPU or ON_CPU."""
    owner = np.full((1, experts), ON_CPU)
    owner[0, list(gpu)] = ON_GPU
    for function, part in enumerate(parts):
        owner[0, list(part)] = function
    return owner


def owners(members: Bools, rank: Ints, functions: int) -> Ints:
    """Divide sets over functions: members go to the functions in turn, in order of use.

    So each function gets about as many experts and as many tokens.

    Shapes: `members` [S, E], `rank` [E] or [S, E]; int64 [S, E], the function of each member, -1 for the rest.
    """
    return np.where(members, positions(members, rank) % functions, -1)


def positions(members: Bools, rank: Ints) -> Ints:
    """Number the members of each set from 0 by rising use.

    Shapes: `members` [S, E], `rank` [E] or [S, E]; int64 [S, E].
    """
    rank = np.broadcast_to(rank, members.shape)
    by_use = np.take_along_axis(members, np.argsort(rank, axis=1), axis=1)
    place: Ints = np.take_along_axis(np.cumsum(by_use, axis=1), rank, axis=1) - 1
    return place


def distinct_rows(rows: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Find the first of equal rows [U], in their order, and for each row which of these it equals [S]."""
    places: dict[bytes, int] = {}
    each = np.array([places.setdefault(row.tobytes(), len(places)) for row in np.ascontiguousarray(rows)], dtype=np.int64)
    first: Ints = np.flatnonzero(np.diff(np.maximum.accumulate(each), prepend=-1))
    return first, each


def _hits_of(patterns: Ints, owner: Ints | Few, owners: Sequence[int]) -> Few:
    """Count the experts that each pattern hits of each of these owners.

    The counts of several owners are added up as the digits of one number.

    Shapes: `owner` [S, E]; int16 [owners, S, P].
    """
    hits = np.empty((len(owners), len(owner), len(patterns)), dtype=np.int16)
    bits, by_expert = patterns.shape[1].bit_length(), owner.T
    at_once = 62 // bits
    for begin in range(0, len(owners), at_once):
        some = owners[begin : begin + at_once]
        narrowest = next(kind for kind in (np.int16, np.int32, np.int64) if len(some) * bits < np.iinfo(kind).bits)
        digit = np.zeros((owner.shape[1] + 1, len(owner)), dtype=narrowest)  # the last: no expert
        for index, one in enumerate(some):
            digit[:-1][by_expert == one] = 1 << bits * index
        number = np.zeros((len(patterns), len(owner)), dtype=digit.dtype)  # sets inside: those of a pattern are taken together
        for slot in patterns.T:
            number += digit.take(slot, axis=0, mode="wrap")
        number = np.ascontiguousarray(number.T)
        for index in range(len(some)):
            hits[begin + index] = number >> bits * index & (1 << bits) - 1
    return hits


def _calls(hits: Few, counts: Ints | Floats, k: int) -> Floats:
    """Compute `HitDistribution.calls` from the hits of each function."""
    calls = np.zeros((hits.shape[1], k + 1))
    for hit in range(1, min(k, int(hits.max(initial=0))) + 1):
        calls[:, hit] = ((hits == hit).sum(axis=0) @ counts) / counts.sum()
    return calls


def _counted(pattern: Pattern, owner: Ints | Few) -> HitDistribution:
    patterns, counts = pattern
    k, functions = patterns.shape[1], int(owner.max(initial=-1)) + 1
    hits = _hits_of(patterns, owner, range(functions))
    busiest, kept = _busiest_and_kept(patterns, hits)
    code = busiest + (k + 1) * kept.astype(np.int64)
    pairs = np.unique(code)
    shares = np.stack([(code == pair) @ counts for pair in pairs], axis=1) / counts.sum()
    return HitDistribution(pairs // (k + 1), pairs % (k + 1), shares, None, _calls(hits, counts, k))


def _busiest_and_kept(patterns: Ints, hits: Few) -> tuple[Few, Few]:
    """Find the most hits of a function, and count those of no function.

    Shapes: `hits` [functions, S, P]; int16 [S, P].
    """
    used = (patterns >= 0).sum(axis=1, dtype=np.int16)
    return hits.max(axis=0, initial=0), used - hits.sum(axis=0, dtype=np.int16)


def _beside(pattern: Pattern, divided: Ints | Few, remote: Ints, on_gpu: Bools, there: Ints) -> Floats:
    """Add up the tokens of sets of one layer by what they hit, as one number (`_of_codes`).

    Shapes: as in `HitCounter.beside_gpu`; [S, (k + 1) ** 3].
    """
    patterns, counts = pattern
    (rows, which), (rows_gpu, which_gpu) = (np.unique(one, return_inverse=True) for one in (remote, there))
    slots, functions = patterns.shape[1] + 1, int(divided[rows].max(initial=-1)) + 1
    busiest, kept = _busiest_and_kept(patterns, _hits_of(patterns, divided[rows], range(functions)))
    # What is hit: busiest + slots * (kept - gpu) + slots**2 * gpu.
    remote_code = busiest + slots * kept.astype(np.int64)
    gpu_code = _hits_of(patterns, on_gpu[rows_gpu].astype(np.int16), (1,))[0].astype(np.int64) * (slots**2 - slots)
    shares, weights = np.empty((len(remote), slots**3)), _weights(counts)
    for index, (one, other) in enumerate(zip(which.tolist(), which_gpu.tolist(), strict=True)):
        shares[index] = np.bincount(remote_code[one] + gpu_code[other], weights, slots**3)
    shares /= counts.sum()
    return shares


def _weights(counts: Ints | Floats) -> Floats | None:
    """Write counts as `np.bincount` adds them up; None where all are 1, which is quicker."""
    return None if (counts == 1).all() else counts.astype(np.float64)


def joined(several: Sequence[HitDistribution]) -> HitDistribution:
    """Join the distributions of several layers, with the sets of one layer after the other's.

    None of them has experts on the GPU.
    """
    slots = several[0].calls.shape[1]
    shares = np.zeros((sum(len(hits.shares) for hits in several), slots**2))
    for hits, end in zip(several, np.cumsum([len(hits.shares) for hits in several]), strict=True):
        shares[end - len(hits.shares) : end, hits.local * slots + hits.busiest] = hits.shares
    return HitDistribution(*_of_codes(shares, slots, False), np.concatenate([hits.calls for hits in several]))


def _of_codes(shares: Floats, slots: int, has_gpu: bool) -> tuple[Ints, Ints, Floats, Ints | None]:
    """Write shares by what is hit, as one number (GPU, local and busiest, in that order), as the fields of `HitShares`.

    Shapes: `shares` [S, slots ** 2] without a GPU, else [S, slots ** 3].
    """
    present = np.flatnonzero(shares.any(axis=0))
    return present // slots % slots, present % slots, shares[:, present], present // slots**2 if has_gpu else None


def _all_prefixes(pattern: Pattern, rank: Ints, functions: int) -> HitDistribution:
    """Count the hits of one layer for every size of its remote set, 0 to E.

    With rising size a token's state changes only where the size passes the rank of one of its experts. Each of its states is added
    where it begins and taken away where the next one begins; a running sum over sizes does the rest.
    """
    patterns, counts = pattern
    tokens, k = patterns.shape
    experts = len(rank)
    width = experts + 2
    rank = np.append(rank, experts)  # a skipped slot (-1) is never remote
    ranks = np.ascontiguousarray(np.sort(rank[patterns], axis=1).T)  # [k, T]
    begin = np.concatenate([np.zeros((1, tokens), dtype=np.int64), ranks + 1])  # [k + 1, T]: size from which so many are remote
    function = (ranks % functions).astype(np.int8)
    own = np.zeros((k, tokens), dtype=np.int8 if k < 128 else np.int64)  # hits of its function, with each next expert
    for slot in range(k):
        own[slot:] += function[slot:] == function[slot]
    own = own.astype(np.int64)
    busiest = np.concatenate([begin[:1], np.maximum.accumulate(own)])
    local = np.maximum((ranks < experts).sum(axis=0) - np.arange(k + 1)[:, None], 0)
    rows = (busiest + (k + 1) * local) * width
    of_token = _weights(counts)
    weights = None if of_token is None else np.tile(of_token, k + 1)

    def table(height: int, more: Ints, less: Ints) -> Floats:
        """Add and subtract tokens at those places, and sum up over sizes."""
        plus, minus = (
            np.bincount(at.ravel(), None if weights is None else weights[: at.size], height * width).astype(np.float64)
            for at in (more, less)
        )
        return np.cumsum((plus - minus).reshape(height, width), axis=1)[:, :-1]

    states = table((k + 1) ** 2, rows + begin, rows[:-1] + begin[1:])
    enters = own * width + begin[1:]
    calls = table(k + 1, enters, enters - width)
    calls[0] = 0.0
    present = np.flatnonzero(states.any(axis=1))
    total = counts.sum()
    return HitDistribution(present // (k + 1), present % (k + 1), states[present].T / total, None, calls.T / total)
