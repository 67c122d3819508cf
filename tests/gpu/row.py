"""A row of the table that `make test-gpu` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure.

    ok   None for a figure that has no limit, and for what could not be run
    """

    what: str
    value: str
    limit: str = ""
    ok: bool | None = None


def at_most(what: str, value: float, limit: float, unit: str = "") -> Row:
    return Row(what, f"{value:g}{unit}", f"at most {limit:g}{unit}", value <= limit)
