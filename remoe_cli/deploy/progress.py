"""How a deployment tells how far it is; cli/output.py makes bars of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Report(Protocol):
    """Called with what is done, of how much if that is known, and what was done last."""

    def __call__(self, done: int, total: int | None, what: str = "") -> None: ...


class Progress(Protocol):
    """A bar for the time of a context; it counts things, or bytes."""

    def __call__(self, title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]: ...


def unseen(title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]:
    """No bar."""
    return nullcontext(lambda done, total, what="": None)
