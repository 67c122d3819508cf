"""Requests with their times of arrival: as a trace has them, or drawn after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import Served
from remoe_cli.plan.problem.trace_requests import TimedRequests
from remoe_cli.plan.problem.traffic import Traffic


@dataclass(frozen=True)
class Source:
    """What requests are drawn from.

    gaps_s        float64 [N]: the time from each request to the next; None where the trace has no times
    n_in, n_out   int64 [N]: prompt tokens, and tokens after the first
    per_hour      requests an hour
    burstiness    coefficient of variation of the times between requests, where these are drawn anew: 1 is a Poisson process
    """

    gaps_s: Floats | None
    n_in: Ints
    n_out: Ints
    per_hour: float
    burstiness: float | None = None


@dataclass(frozen=True)
class Arrivals:
    """Requests in the order of time.

    at_s          float64 [N]: seconds since the first one
    n_in, n_out   int64 [N]
    over_s        how long the traffic goes on
    """

    at_s: Floats
    n_in: Ints
    n_out: Ints
    over_s: float


def source_of(timed: TimedRequests, per_hour: float | None, burstiness: float | None) -> Source:
    """Make the source of a trace; `per_hour` stretches its times, `burstiness` draws them anew.

    Raises: UsageError where nothing tells how often requests come.
    """
    gaps_s, own = None, None
    if len(timed.at_s) > 1 and (span_s := float(timed.at_s[-1] - timed.at_s[0])) > 0:
        mean_s = span_s / (len(timed.at_s) - 1)
        gaps_s, own = np.append(np.diff(timed.at_s), mean_s), 3600 / mean_s
    rate = per_hour or own
    if rate is None:
        raise UsageError("The trace does not tell when requests came.", "Give --requests-per-hour N, or a trace with timestamps.")
    if gaps_s is None and burstiness is None:
        burstiness = 1.0
    return Source(gaps_s, timed.n_in, timed.n_out, rate, burstiness)


def source_of_traffic(traffic: Traffic, per_hour: float | None, burstiness: float | None) -> Source:
    """Make the source of a plan's own requests, which come at random times.

    Raises: UsageError where nothing tells how often they come.
    """
    rate = per_hour or traffic.per_hour
    if rate is None:
        raise UsageError("The plan does not know how often requests come.", "Give --requests-per-hour N, or --trace FILE.")
    copies = np.maximum(1, np.round(1000 * np.array([kind.share for kind in traffic.lengths]))).astype(np.int64)
    n_in, n_out = (np.repeat([getattr(kind, name) for kind in traffic.lengths], copies) for name in ("n_in", "n_out"))
    return Source(None, n_in, n_out, rate, 1.0 if burstiness is None else burstiness)


def own_burstiness(source: Source) -> float | None:
    """Compute the burstiness of a trace's own times; None without times."""
    return None if source.gaps_s is None else float(source.gaps_s.std() / source.gaps_s.mean())


def served_of(source: Source, served: Served | None) -> Source:
    """Leave out requests that are longer than those that a plan is for."""
    if served is None:
        return source
    fits = (source.n_in <= served.n_in) & (source.n_out <= served.n_out) & (source.n_in + source.n_out <= served.tokens)
    gaps_s = None if source.gaps_s is None else source.gaps_s[fits]
    return replace(source, n_in=source.n_in[fits], n_out=source.n_out[fits], gaps_s=gaps_s)


def drawn(source: Source, count: int, seed: int) -> Arrivals:
    """Draw `count` requests.

    The trace's gaps and lengths are drawn in blocks of neighbours, about the square root of the trace long, so that busy and quiet times
    stay as they are. Lengths without times are drawn one by one.
    """
    random = np.random.default_rng(seed)
    known = len(source.n_in)
    block = 1 if source.gaps_s is None else max(1, math.isqrt(known))
    starts = random.integers(0, known, -(-count // block))
    at = ((starts[:, None] + np.arange(block)) % known).ravel()[:count]
    if source.burstiness is None and source.gaps_s is not None:
        gaps_s = source.gaps_s[at]
    else:
        gaps_s = _gamma(random, source.burstiness or 1.0, count)
    gaps_s = gaps_s * (3600 / source.per_hour / float(gaps_s.mean()))
    ends_s = np.cumsum(gaps_s)
    return Arrivals(ends_s - gaps_s, source.n_in[at], source.n_out[at], float(ends_s[-1]))


def _gamma(random: np.random.Generator, variation: float, count: int) -> Floats:
    """Draw gaps with this coefficient of variation; 0 is a clock."""
    return np.ones(count) if variation == 0 else random.gamma(1 / variation**2, variation**2, count) + 1e-12
