"""How many experts of which function one decode token hits, and how many in the main function.

Decode time (E[max(local, remote)]) and the bill both rest on this. A remote set is divided over functions: `owner` [S, E] is the
function of each expert in each of S candidate sets, ON_CPU or ON_GPU for the main function's. A token's layer ends with its busiest
function, while every function that it hits is billed, so the distribution keeps both. It is exact over the recorded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Bools, Floats, Ints

Pattern = tuple[Ints, Ints | Floats]  # of one layer: distinct sets of experts [P, k], and how many tokens used each [P], or their weight
Parts = tuple[tuple[int, ...], ...]  # the experts of each function
Few = npt.NDArray[np.int16]
ON_CPU, ON_GPU = -1, -2  # owners that are no function


@dataclass(frozen=True)
class HitDistribution:
    """What one decode token of one layer hits, for each of S remote sets.

    local, busiest   int64 [P], pairs that occur: experts hit in CPU memory, and in the function that is hit most
    shares           float64 [S, P], share of tokens with that pair
    calls            float64 [S, k + 1], expected functions that are hit in so many experts; column 0 is 0
    gpu              int64 [P], experts hit on the GPU, with each pair; None where no set has any there
    """

    local: Ints
    busiest: Ints
    shares: Floats
    calls: Floats
    gpu: Ints | None = None


@dataclass(frozen=True)
class HitCounter:
    """Count hits over the recorded tokens of all layers, and keep what is counted.

    Solvers and scenarios ask for the same sets many times, as plans do for other forms of experts and kinds of main functions. Each is
    counted once: by `of_prefixes`, by `of_parts`, and by `of_owners` where experts are on the GPU.

    patterns   per layer
    ranks      int64 [L, E], 0 for the least used expert of a layer
    """

    patterns: tuple[Pattern, ...]
    ranks: Ints
    _prefixes: dict[int, HitDistribution] = field(default_factory=dict, init=False, repr=False)
    _with_gpu: dict[tuple[int, bytes], HitDistribution] = field(default_factory=dict, init=False, repr=False)
    _parts: dict[tuple[int, Parts, tuple[int, ...]], HitDistribution] = field(default_factory=dict, init=False, repr=False)

    def of_owners(self, layer: int, owner: Ints) -> HitDistribution:
        """Count for the sets `owner` [S, E] of one layer."""
        if not (owner == ON_GPU).any():
            return _counted(self.patterns[layer], owner)
        key = layer, blake2b(owner.astype(np.int16).tobytes(), digest_size=16).digest()
        if key not in self._with_gpu:
            self._with_gpu[key] = _counted_with_gpu(self.patterns[layer], owner)
        return self._with_gpu[key]

    def of_parts(self, layer: int, parts: Parts, gpu: tuple[int, ...] = ()) -> HitDistribution:
        """Count for one set (S = 1), given by the experts of each of its functions, and those on the GPU."""
        if (layer, parts, gpu) not in self._parts:
            self._parts[layer, parts, gpu] = self.of_owners(layer, owner_of(self.ranks.shape[1], parts, gpu))
        return self._parts[layer, parts, gpu]

    def of_prefixes(self, layer: npt.ArrayLike, sizes: Ints, functions: int) -> HitDistribution:
        """Count for the `sizes` [S] least used experts of a layer, or of layers [S], divided by `owners`.

        The first call for a number of functions counts all sizes of all layers at once; after it, S hardly takes time.
        """
        if functions not in self._prefixes:
            each = zip(self.patterns, self.ranks, strict=True)
            self._prefixes[functions] = joined([_all_prefixes(pattern, rank, functions) for pattern, rank in each])
        hits, at = self._prefixes[functions], np.asarray(layer) * (self.ranks.shape[1] + 1) + sizes
        return HitDistribution(hits.local, hits.busiest, hits.shares[at], hits.calls[at])


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


def _hits_of(patterns: Ints, owner: Ints, owners: Sequence[int]) -> Few:
    """Count the experts that each pattern hits of each of these owners.

    The counts of several owners are added up as the digits of one number.

    Shapes: `owner` [S, E]; int16 [owners, S, P].
    """
    hits = np.empty((len(owners), len(owner), len(patterns)), dtype=np.int16)
    bits = patterns.shape[1].bit_length()
    at_once = 62 // bits
    for begin in range(0, len(owners), at_once):
        some = owners[begin : begin + at_once]
        digit = np.zeros((len(owner), owner.shape[1] + 1), dtype=np.int16 if len(some) * bits < 16 else np.int64)  # the last: no expert
        for index, one in enumerate(some):
            digit[:, :-1][owner == one] = 1 << bits * index
        number = np.zeros((len(owner), len(patterns)), dtype=digit.dtype)
        for slot in patterns.T:
            number += digit.take(slot, axis=1, mode="wrap")
        for index in range(len(some)):
            hits[begin + index] = number >> bits * index & (1 << bits) - 1
    return hits


def _calls(hits: Few, counts: Ints | Floats, k: int) -> Floats:
    """Compute `HitDistribution.calls` from the hits of each function."""
    calls = np.zeros((hits.shape[1], k + 1))
    for hit in range(1, min(k, int(hits.max(initial=0))) + 1):
        calls[:, hit] = ((hits == hit).sum(axis=0) @ counts) / counts.sum()
    return calls


def _counted(pattern: Pattern, owner: Ints) -> HitDistribution:
    patterns, counts = pattern
    k, functions = patterns.shape[1], int(owner.max(initial=-1)) + 1
    used = (patterns >= 0).sum(axis=1)
    hits = _hits_of(patterns, owner, range(functions))
    calls = _calls(hits, counts, k)
    busiest = hits.max(axis=0, initial=0)
    code = busiest + (k + 1) * (used[None, :] - hits.sum(axis=0))
    pairs = np.unique(code)
    shares = np.stack([(code == pair) @ counts for pair in pairs], axis=1) / counts.sum()
    return HitDistribution(pairs // (k + 1), pairs % (k + 1), shares, calls)


def _counted_with_gpu(pattern: Pattern, owner: Ints) -> HitDistribution:
    """Count as `_counted` does where experts are on the GPU.

    Many sets share their remote experts or those on the GPU, so both are counted once, and each set only adds up tokens.
    """
    patterns, counts = pattern
    slots, functions = patterns.shape[1] + 1, int(owner.max(initial=-1)) + 1
    on_gpu, divided = owner == ON_GPU, np.maximum(owner, ON_CPU)
    (first, of_divided), (first_gpu, of_gpu) = distinct_rows(divided), distinct_rows(on_gpu)
    hits = _hits_of(patterns, divided[first], range(functions))
    kept = (patterns >= 0).sum(axis=1) - hits.sum(axis=0)
    # What is hit, as one number (_of_codes): busiest + slots * (kept - gpu) + slots**2 * gpu.
    remote_code = hits.max(axis=0, initial=0) + slots * kept
    gpu_code = _hits_of(patterns, on_gpu[first_gpu].astype(np.int64), (1,))[0].astype(np.int64) * (slots**2 - slots)
    shares = np.empty((len(owner), slots**3))
    for index, (which, there) in enumerate(zip(of_divided.tolist(), of_gpu.tolist(), strict=True)):
        shares[index] = np.bincount(remote_code[which] + gpu_code[there], counts, slots**3)
    shares /= counts.sum()
    return _of_codes(shares, _calls(hits, counts, slots - 1)[of_divided])


def joined(several: Sequence[HitDistribution]) -> HitDistribution:
    """Join the distributions of several layers into one, with the sets of one layer after the other's."""
    slots, has_gpu = several[0].calls.shape[1], any(hits.gpu is not None for hits in several)
    shares = np.zeros((sum(len(hits.shares) for hits in several), slots ** (3 if has_gpu else 2)))
    for hits, end in zip(several, np.cumsum([len(hits.shares) for hits in several]), strict=True):
        code = hits.local * slots + hits.busiest + (0 if hits.gpu is None else hits.gpu * slots**2)
        shares[end - len(hits.shares) : end, code] = hits.shares
    return _of_codes(shares, np.concatenate([hits.calls for hits in several]))


def _of_codes(shares: Floats, calls: Floats) -> HitDistribution:
    """Make a distribution of shares by what is hit, as one number: GPU, local and busiest, in that order.

    Shapes: `shares` [S, (k + 1) ** 2] without a GPU, else [S, (k + 1) ** 3].
    """
    slots, present = calls.shape[1], np.flatnonzero(shares.any(axis=0))
    gpu = present // slots**2 if shares.shape[1] > slots**2 else None
    return HitDistribution(present // slots % slots, present % slots, shares[:, present], calls, gpu)


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
    own = np.zeros((k, tokens), dtype=np.int64)  # hits of its function, with each next expert
    for slot in range(k):
        own[slot:] += function[slot:] == function[slot]
    busiest = np.concatenate([begin[:1], np.maximum.accumulate(own)])
    local = np.maximum((ranks < experts).sum(axis=0) - np.arange(k + 1)[:, None], 0)
    rows = (busiest + (k + 1) * local) * width
    weights = np.tile(counts.astype(np.float64), k + 1)

    def table(height: int, more: Ints, less: Ints) -> Floats:
        """Add and subtract tokens at those places, and sum up over sizes."""
        plus, minus = (np.bincount(at.ravel(), weights[: at.size], height * width) for at in (more, less))
        return np.cumsum((plus - minus).reshape(height, width), axis=1)[:, :-1]

    states = table((k + 1) ** 2, rows + begin, rows[:-1] + begin[1:])
    calls = table(k + 1, own * width + begin[1:], (own - 1) * width + begin[1:])
    calls[0] = 0.0
    present = np.flatnonzero(states.any(axis=1))
    total = counts.sum()
    return HitDistribution(present // (k + 1), present % (k + 1), states[present].T / total, calls.T / total)
