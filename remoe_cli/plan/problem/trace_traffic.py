"""Read how long requests are and how often they come from a file of requests.

Main functions know traffic (traffic.py), but no files of it, and none of the libraries that read them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Bools
from remoe_cli.plan.document import Lengths, Served
from remoe_cli.plan.problem.sizes import Size, Sizes, sizes_of
from remoe_cli.plan.problem.trace_counts import Trace, read_trace, total
from remoe_cli.plan.problem.traffic import Traffic

KINDS = 4  # kinds of requests that stand for a distribution: what a plan costs bends with the length of prompts, but not sharply


def read_traffic(path: Path, cover: float = 1.0) -> Traffic:
    """Read a file of requests, one a row; rows count alike unless they have a weight.

    At most KINDS kinds stand for them: equal parts of the requests by the length of their prompts, each with its mean lengths.
    With timestamps the file tells the traffic too. `cover` is the share of the requests to answer: those with most tokens are refused.

    Raises: UsageError for what is not such a file, naming the row, and for a share that is not above 0.
    """
    if not 0 < cover <= 1:
        raise UsageError(f"--cover is {cover:g}, not a share above 0.", "Give a share of the requests such as 0.99.")
    whole = _weighty(read_trace(path))
    weight = total(whole.weights, whole.copies)
    if not weight:
        raise UsageError(f"{path}: all requests have the weight 0.", "Give a weight above 0, or leave the column out.")
    trace = _covered(whole, cover, weight)
    share = 1.0 if trace is whole else total(trace.weights, trace.copies) / weight
    if whole.front and trace is not whole:  # bins hold means, so the requests that are left are counted again, up to an exact length
        trace = _weighty(read_trace(path, int((trace.n_in + trace.n_out).max())))
        share = total(trace.weights, trace.copies) / weight
    each = trace.weights * trace.copies
    sizes = Sizes(trace.n_in, trace.n_out, each / each.sum(), trace.front)
    tokens, n_in, n_out = (max(map(of, sizes.front)) for of in (sum, itemgetter(0), itemgetter(1)))
    served = Served(cover=cover, share=share, tokens=tokens, n_in=n_in, n_out=n_out)
    sizes = replace(sizes, longest=_served_front(sizes.front, served))
    per_hour = None if trace.per_hour is None else trace.per_hour * share
    return Traffic(_kinds(trace), per_hour, trace.gaps_s if len(trace.gaps_s) else (), (whole.note,), sizes, served, trace.gap_count)


def _served_front(front: tuple[Size, ...], served: Served) -> tuple[Size, ...]:
    """Add the longest requests that the deployment answers: it refuses by three numbers, which the file's requests need not reach.

    >>> _served_front((Size(1, 100), Size(3900, 10)), Served(cover=1.0, share=1.0, tokens=3910, n_in=3900, n_out=100))
    (Size(n_in=3810, n_out=100), Size(n_in=3900, n_out=10))
    """
    ends = (Size(served.n_in, served.tokens - served.n_in), Size(served.tokens - served.n_out, served.n_out))
    return sizes_of(tuple((1.0, *size) for size in (*front, *ends))).front


def _weighty(trace: Trace) -> Trace:
    """Leave out requests whose weight is 0, or next to it."""
    all_weights = total(trace.weights, trace.copies)
    return _picked(trace, trace.weights / all_weights > 0) if all_weights else _picked(trace, trace.weights > 0)


def _covered(trace: Trace, cover: float, weight: float) -> Trace:
    """Leave out the requests with most tokens, as long as the rest has that share of the weight."""
    tokens = trace.n_in + trace.n_out
    order = np.argsort(tokens, kind="stable")
    reached = np.cumsum((trace.weights * trace.copies)[order])
    most = tokens[order[min(len(order) - 1, int(np.searchsorted(reached, cover * weight * (1 - 1e-12))))]]
    kept = tokens <= most
    return trace if kept.all() or cover == 1 else _picked(trace, kept)


def _picked(trace: Trace, kept: Bools) -> Trace:
    if kept.all():
        return trace
    return replace(trace, n_in=trace.n_in[kept], n_out=trace.n_out[kept], weights=trace.weights[kept], copies=trace.copies[kept])


def _kinds(trace: Trace) -> tuple[Lengths, ...]:
    """Cut the requests, ordered by length, into parts of equal weight."""
    lengths, weights, copies = (trace.n_in, trace.n_out), trace.weights, trace.copies
    all_weights = total(weights, copies)
    ends = np.cumsum(copies)  # how many requests come until each length
    before = np.cumsum(weights * copies) - weights * copies

    def part(request: int) -> int:
        at = int(np.searchsorted(ends, request, "right"))
        weight = float(before[at]) + (request - int(ends[at] - copies[at])) * float(weights[at])
        return min(KINDS - 1, int(weight / all_weights * KINDS + 1e-9))

    count = int(ends[-1])
    starts = [bisect_left(range(count), number, key=part) for number in range(KINDS)]
    shares: dict[tuple[int, int], float] = {}
    for start, end in pairwise([*starts, count]):
        inside = np.diff(np.clip(np.concatenate(([0], ends)), start, end))
        held = total(weights, inside)
        if held:
            n_in, n_out = (max(1, round(total(tokens * weights, inside) / held)) for tokens in lengths)
            shares[n_in, n_out] = shares.get((n_in, n_out), 0.0) + held / all_weights
    return tuple(Lengths(share=share, n_in=n_in, n_out=n_out) for (n_in, n_out), share in sorted(shares.items()))
