"""How long requests are and how often they come: of one length, or of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.document import Lengths, Served, Waking
from remoe_cli.plan.problem.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Traffic:
    """How long requests are and how often they come.

    lengths   kinds of requests, whose shares sum to 1: means are taken over them
    requests  every length that occurs, for limits and percentiles; None where the kinds are all lengths that there are
    served    which requests of a file these are
    gap_count how many times between requests there are, where `gaps_s` has the longest of them
    per_hour  None where nothing tells how often they come
    gaps_s    times between requests, where a trace tells them: all in the order of time, or the longest
    notes     whole sentences on the file that they were read from
    """

    lengths: tuple[Lengths, ...]
    per_hour: float | None = None
    gaps_s: Sequence[float] | Floats = field(default=(), compare=False)
    notes: tuple[str, ...] = ()
    requests: Sizes | None = field(default=None, compare=False)
    served: Served | None = None
    gap_count: int = field(default=0, compare=False)

    @cached_property
    def sizes(self) -> Sizes:
        """The lengths of single requests."""
        return self.requests or sizes_of(tuple((kind.share, kind.n_in, kind.n_out) for kind in self.lengths))

    def cold_share(self, idle_ttl_s: float) -> float:
        """Compute the share of requests that find nothing warm: those after a gap of at least `idle_ttl_s`.

        Without a trace, requests come at random (a Poisson process). Where the traffic is unknown, none is cold.

        >>> round(one_length(125, 200, per_hour=20.0).cold_share(300.0), 3)
        0.189
        >>> Traffic(one_length(125, 200).lengths, gaps_s=(10.0, 10.0, 400.0, 10.0)).cold_share(300.0)
        0.25
        """
        if len(self.gaps_s):
            return int(np.count_nonzero(np.asarray(self.gaps_s) >= idle_ttl_s)) / max(self.gap_count, len(self.gaps_s))
        return math.exp(-self.per_hour * idle_ttl_s / 3600) if self.per_hour is not None else 0.0

    def waking(self, idle_s: float, wake_s: float) -> Waking | None:
        """Compute how often an instance wakes that is given back `idle_s` after its last request.

        It takes `wake_s` to wake. None where the traffic is unknown. Requests that come while it wakes wait, and find it awake.

        Source: method.md, section 4, for the equations.

        >>> waking = one_length(125, 200, per_hour=6.0).waking(600.0, 300.0)
        >>> round(waking.wake_share, 3), round(waking.up_share, 3)
        (0.311, 0.689)
        """
        if self.per_hour is None:
            return None
        after = self.cold_share(idle_s)
        if not len(self.gaps_s):
            woken = after / (1 + self.per_hour / 3600 * after * wake_s)
            return Waking(wake_share=woken, up_share=1 - woken)
        woken = after / (1 + after - self.cold_share(idle_s + wake_s))
        off_s = (1 - woken) * self._beyond_s(idle_s) + woken * self._beyond_s(idle_s + wake_s)
        mean_gap_s = 3600 / self.per_hour * (self.served.share if self.served else 1.0)
        return Waking(wake_share=woken, up_share=max(0.0, 1 - off_s / mean_gap_s))

    def _beyond_s(self, seconds: float) -> float:
        """Compute the mean, over all times between requests, of what is beyond so many seconds."""
        beyond = np.maximum(0.0, np.asarray(self.gaps_s, dtype=np.float64) - seconds)
        return float(beyond.sum()) / max(self.gap_count, len(self.gaps_s))


def one_length(n_in: int, n_out: int, per_hour: float | None = None) -> Traffic:
    """Make traffic whose requests all have one length.

    >>> one_length(125, 200).lengths
    (Lengths(share=1.0, n_in=125, n_out=200),)

    Raises: UsageError for a length below 1.
    """
    if min(n_in, n_out) < 1:
        raise UsageError("The workload needs at least 1 prompt token and 1 generated token.", "Give lengths of 1 or more.")
    return Traffic((Lengths(share=1.0, n_in=n_in, n_out=n_out),), per_hour)
