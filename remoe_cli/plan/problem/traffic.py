"""How long requests are and how often they come: of one length, of several, or as in a trace."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem.trace_counts import Trace, read_trace, total

KINDS = 4  # kinds of requests that stand for a distribution: what a plan costs bends with the length of prompts, but not sharply


@dataclass(frozen=True)
class Traffic:
    """How long requests are and how often they come.

    lengths   kinds of requests, whose shares sum to 1
    per_hour  None where nothing tells how often they come
    gaps_s    times between requests, in the order of time, where a trace tells them
    notes     whole sentences on the file that they were read from
    """

    lengths: tuple[Lengths, ...]
    per_hour: float | None = None
    gaps_s: Sequence[float] | Floats = field(default=(), compare=False)
    notes: tuple[str, ...] = ()

    def cold_share(self, idle_ttl_s: float) -> float:
        """Compute the share of requests that find nothing warm: those after a gap of at least `idle_ttl_s`.

        Without a trace, requests come at random (a Poisson process). Where the traffic is unknown, none is cold.

        >>> round(one_length(125, 200, per_hour=20.0).cold_share(300.0), 3)
        0.189
        >>> Traffic(one_length(125, 200).lengths, gaps_s=(10.0, 10.0, 400.0, 10.0)).cold_share(300.0)
        0.25
        """
        if len(self.gaps_s):
            return int(np.count_nonzero(np.asarray(self.gaps_s) >= idle_ttl_s)) / len(self.gaps_s)
        return math.exp(-self.per_hour * idle_ttl_s / 3600) if self.per_hour is not None else 0.0


def one_length(n_in: int, n_out: int, per_hour: float | None = None) -> Traffic:
    """Make traffic whose requests all have one length.

    >>> one_length(125, 200).lengths
    (Lengths(share=1.0, n_in=125, n_out=200),)

    Raises: UsageError for a length below 1.
    """
    if min(n_in, n_out) < 1:
        raise UsageError("The workload needs at least 1 prompt token and 1 generated token.", "Give lengths of 1 or more.")
    return Traffic((Lengths(share=1.0, n_in=n_in, n_out=n_out),), per_hour)


def read_traffic(path: Path) -> Traffic:
    """Read a file of requests, one a row; rows count alike unless they have a weight.

    At most KINDS kinds stand for them: equal parts of the requests by the length of their prompts, each with its mean lengths.
    With timestamps the file tells the traffic too.

    Raises: UsageError for what is not such a file, naming the row.
    """
    trace = read_trace(path)
    kinds = _kinds(trace)
    if not kinds:
        raise UsageError(f"{path}: all requests have the weight 0.", "Give a weight above 0, or leave the column out.")
    return Traffic(kinds, trace.per_hour, trace.gaps_s if len(trace.gaps_s) else (), (trace.note,))


def _kinds(trace: Trace) -> tuple[Lengths, ...]:
    """Cut the requests, in order of length, into parts of equal weight with their mean lengths; equal means are one kind."""
    all_weights = total(trace.weights, trace.copies)
    if not all_weights:
        return ()
    weighty = trace.weights / all_weights > 0
    lengths, weights, copies = (trace.n_in[weighty], trace.n_out[weighty]), trace.weights[weighty], trace.copies[weighty]
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
