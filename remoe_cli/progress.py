"""How long work tells its caller how far it is. cli/output.py makes the displays that people see."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Report(Protocol):
    """Called with how much is done, how much there is (None: unknown), and what was done last."""

    def __call__(self, done: float, total: float | None, what: str = "") -> None: ...


def no_report(done: float, total: float | None, what: str = "") -> None:
    """Report to nobody."""


class Progress(Protocol):
    """Opens the display of one stage of work. Only one may be open at a time."""

    def __call__(self, title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]: ...


def no_progress(title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]:
    """Show nothing."""
    return nullcontext(no_report)
