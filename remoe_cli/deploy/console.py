"""How deploying talks to the user: messages, progress and questions. cli/output.py implements it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from remoe_cli.progress import Progress, no_progress


@dataclass(frozen=True)
class Table:
    """A table for people, as `cli/output.table` prints it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Overview:
    """Tables, and the sentences that belong under them."""

    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()


NO_OVERVIEW = Overview()


class Agree(Protocol):
    """Shows an overview, asks a question about it, and returns whether the answer is yes."""

    def __call__(self, question: str, overview: Overview = NO_OVERVIEW) -> bool: ...


@dataclass(frozen=True)
class Console:
    """How a stage talks to the user.

    say        shows a message
    progress   opens a display for a stage that may take longer than 2 s
    agree      asks before anything is created or deleted
    """

    say: Callable[[str], None]
    progress: Progress
    agree: Agree


# For programs: shows nothing and agrees to everything.
SILENT = Console(say=lambda message: None, progress=no_progress, agree=lambda question, overview=NO_OVERVIEW: True)
