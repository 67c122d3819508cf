"""Whether a function that keeps failing is asked at all: a circuit breaker for each function.

Lambda chooses the instance that answers, so a caller cannot avoid one instance, only the function. After some failures in a row the
function is not asked for a pause. Then calls ask it again, and a further failure doubles the pause. One failure is enough
where it lasts: the function does not exist, or its memory does not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

_FAILURES = 5  # in a row
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class Breaker:
    """What is known of a function's last calls.

    failures   tries in a row that failed
    opened     times in a row that it was opened
    until_s    when the function may be asked again, by the clock of the caller

    >>> breaker = Breaker()
    >>> for _ in range(5):
    ...     breaker = breaker.failed(now_s=100.0)
    >>> breaker.is_open(100.5), breaker.is_open(101.0), breaker.failed(now_s=101.0).is_open(102.5)
    (True, False, True)
    """

    failures: int = 0
    opened: int = 0
    until_s: float = 0.0

    def is_open(self, now_s: float) -> bool:
        """Tell whether the function is not asked now."""
        return now_s < self.until_s

    def failed(self, now_s: float, lasts: bool = False) -> Breaker:
        """Return the breaker after a try that failed; `lasts`: the next one would fail too."""
        failures = self.failures + 1
        if self.is_open(now_s) or (failures < _FAILURES and not lasts):  # tries that were under way when it was opened open it once only
            return Breaker(failures, self.opened, self.until_s)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self.opened)
        return Breaker(failures, self.opened + 1, now_s + pause_s)


CLOSED = Breaker()  # also after each success
