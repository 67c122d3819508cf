"""Which instances of the expert functions are warm."""

from __future__ import annotations

from heapq import heappop, heappush

from remoe_cli.simulate.service import Functions


class Warm:
    """The instances of the expert functions: how many are in use, and since when the others are idle.

    `begin` has to be called in the order of time, and `end` before a later `begin`.
    """

    def __init__(self, functions: Functions | None) -> None:
        self._functions, self._running, self._used = functions, 0, 0
        self._ends: list[float] = []
        self._idle: list[float] = []  # the last one is used next
        self.started = 0

    def begin(self, at_s: float) -> bool:
        """Give a request its functions, and say whether one of each had to start."""
        if self._functions is None:
            return False
        needed = self._functions.needed
        while self._ends and self._ends[0] <= at_s:
            ended_s = heappop(self._ends)
            self._running -= 1
            while self._used > needed[self._running]:
                self._used -= 1
                self._idle.append(ended_s)
        self._running += 1
        starts = 0
        while self._used < needed[self._running]:
            self._used += 1
            if self._idle and at_s - self._idle[-1] < self._functions.idle_s:
                self._idle.pop()
            else:
                self._idle.clear()
                starts += 1
        self.started += starts
        return starts > 0

    def end(self, at_s: float) -> None:
        """Say when a request ends, or ended."""
        if self._functions is not None:
            heappush(self._ends, at_s)
