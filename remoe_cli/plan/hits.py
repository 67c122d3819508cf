"""How many experts of which function one decode token hits: the law behind E[max(local, remote)] and behind the bill.

A remote set is divided over functions: `owner` [S, E] is the function of each expert in each of S candidate sets, -1 for local. A token's
layer ends with its busiest function, while every function that it hits is billed; so the law keeps both. It is exact over the trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.workload import Bools, Floats, Ints, Workload


@dataclass(frozen=True)
class HitLaw:
    """One decode token of one layer, for S remote sets.

    local, busiest   int64 [P], pairs that occur: local experts hit, and remote experts hit in the function that is hit most
    shares           float64 [S, P], of tokens with that pair
    calls            float64 [S, k + 1], expected functions that are hit in so many experts; column 0 is 0
    """

    local: Ints
    busiest: Ints
    shares: Floats
    calls: Floats


def owners(members: Bools, rank: Ints, functions: int) -> Ints:
    """int64 [S, E]: the function of each member of the sets, -1 for the rest. Members go round the functions in order of use, so that
    each function has about as many experts and as many tokens."""
    order = np.argsort(rank)
    position = np.empty(members.shape, dtype=np.int64)
    position[:, order] = np.cumsum(members[:, order], axis=1) - 1
    return np.where(members, position % functions, -1)


def hit_law(workload: Workload, layer: int, owner: Ints) -> HitLaw:
    """The law of one layer for the sets `owner` [S, E]."""
    patterns, counts = workload.patterns[layer]
    k, functions = patterns.shape[1], int(owner.max(initial=-1)) + 1
    with_none = np.concatenate([owner, np.full((len(owner), 1), -1)], axis=1)
    used = (patterns >= 0).sum(axis=1)
    hits = np.zeros((functions, len(owner), len(patterns)), dtype=np.int64)
    for slot in patterns.T:
        at = with_none[:, slot]
        for function in range(functions):
            hits[function] += at == function
    calls = np.zeros((len(owner), k + 1))
    for hit in range(1, k + 1):
        calls[:, hit] = ((hits == hit).sum(axis=0) @ counts) / counts.sum()
    busiest = hits.max(axis=0, initial=0)
    code = busiest + (k + 1) * (used[None, :] - hits.sum(axis=0))
    pairs = np.unique(code)
    shares = np.stack([(code == pair) @ counts for pair in pairs], axis=1) / counts.sum()
    return HitLaw(pairs // (k + 1), pairs % (k + 1), shares, calls)


def prefix_law(workload: Workload, layer: int, sizes: Ints, functions: int) -> HitLaw:
    """`hit_law` for the sets of the `sizes` [S] least used experts, divided by `owners`, in time that does not grow with S."""
    key = ("law", layer, functions)
    if key not in workload.memo:
        workload.memo[key] = _all_prefixes(workload, layer, functions)
    local, busiest, shares, calls = workload.memo[key]
    return HitLaw(local, busiest, shares[sizes], calls[sizes])


def _all_prefixes(workload: Workload, layer: int, functions: int) -> tuple[Ints, Ints, Floats, Floats]:
    """The law of every size. With rising size a token's state changes only where the size passes the rank of one of its experts: each of
    its states is added where it begins and taken away where the next does, and a running sum over sizes does the rest."""
    patterns, counts = workload.patterns[layer]
    tokens, k = patterns.shape
    experts = workload.use.shape[1]
    width = experts + 2
    rank = np.append(workload.ranks[layer], experts)  # a skipped slot (-1) is never remote
    ranks = np.ascontiguousarray(np.sort(rank[patterns], axis=1).T)  # [k, T]
    begin = np.concatenate([np.zeros((1, tokens), dtype=np.int64), ranks + 1])  # [k + 1, T]: size from which so many are remote
    function = ranks % functions
    hits = np.cumsum(function == np.arange(functions)[:, None, None], axis=1)  # [F, k, T]
    own = np.take_along_axis(hits, function[None], axis=0)[0]  # [k, T]: of the function of each next expert, with it
    busiest = np.concatenate([begin[:1], hits.max(axis=0)])
    local = np.maximum((ranks < experts).sum(axis=0) - np.arange(k + 1)[:, None], 0)
    rows = (busiest + (k + 1) * local) * width
    weights = np.tile(counts.astype(np.float64), k + 1)

    def table(height: int, more: Ints, less: Ints) -> Floats:
        """Tokens, added or taken away at those places, summed up over sizes; without the column past the last size."""
        plus, minus = (np.bincount(at.ravel(), weights[: at.size], height * width) for at in (more, less))
        return np.cumsum((plus - minus).reshape(height, width), axis=1)[:, :-1]

    states = table((k + 1) ** 2, rows + begin, rows[:-1] + begin[1:])
    calls = table(k + 1, own * width + begin[1:], (own - 1) * width + begin[1:])
    calls[0] = 0.0
    present = np.flatnonzero(states.any(axis=1))
    total = counts.sum()
    return present // (k + 1), present % (k + 1), states[present].T / total, calls.T / total
