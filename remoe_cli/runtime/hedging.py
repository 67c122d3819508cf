"""When a call is slow enough to be made a second time: a quantile of what such calls take.

A second call is sent after the 95th percentile of the last calls, but not before twice their median: it takes about a median itself, so
before that it could not gain. This also keeps the quantile from being spent on calls that are a little slower than others, where 5% of
them are much slower. A call that a second one has overtaken does not count, so slow calls do not move the quantile up to themselves.

Source: J. Dean and L. A. Barroso, "The Tail at Scale", CACM 56(2), 2013.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

_QUANTILE, _MEDIANS = 0.95, 2.0
_LAST, _ENOUGH = 128, 20


@dataclass
class Latencies:
    """Seconds that the last calls took; sorted beside that, so that a quantile is one look.

    >>> taken = Latencies()
    >>> for i in range(20):
    ...     taken.add(0.010 + 0.0001 * i)
    >>> taken.hedge_after_s()
    0.0218
    """

    _by_age: deque[float] = field(default_factory=deque)
    _by_size: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Count a call."""
        if len(self._by_age) == _LAST:
            del self._by_size[bisect_left(self._by_size, self._by_age.popleft())]
        self._by_age.append(seconds)
        insort(self._by_size, seconds)

    def hedge_after_s(self) -> float | None:
        """Return the seconds after which a call is made a second time; None while too few calls are known."""
        n = len(self._by_size)
        if n < _ENOUGH:
            return None
        return max(self._by_size[math.ceil(_QUANTILE * n) - 1], _MEDIANS * self._by_size[(n - 1) // 2])


def size_class(rows: int) -> int:
    """Return the class of calls that are compared with each other: as many rows, within a factor of two."""
    return rows.bit_length()
