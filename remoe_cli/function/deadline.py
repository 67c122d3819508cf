"""Ending an invocation that its timeout would end: that costs less, and the instance stays warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .errors import FunctionTimeError


def refuse_late(rows: Sequence[int], done: int, took_s: float, left_s: Callable[[], float]) -> None:
    """Raise FunctionTimeError when the experts that are left take longer than the function has.

    That is judged by those that are done: by their number and by their rows.
    """
    if not done:
        return
    needed_s = took_s * min((len(rows) - done) / done, sum(rows[done:]) / sum(rows[:done]))
    if needed_s > (has_s := left_s()):
        raise FunctionTimeError(f"{len(rows) - done} experts take about {needed_s:.1f} s, and the function has {has_s:.1f} s left")
