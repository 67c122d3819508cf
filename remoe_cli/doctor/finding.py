"""One row of what `remoe doctor` found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from remoe_cli.artifacts import Part
from remoe_cli.errors import RemoeError

_STALE_DAYS = 180  # older prices are worth a look at today's list


class Finding(Part):
    """One thing that was looked at.

    ok      whether remoe works with it as it is
    value   what was found
    hint    what to do about it, or what it means; empty where there is nothing to say
    """

    name: str
    ok: bool
    value: str
    hint: str = ""


def tried(name: str, look: Callable[[], Finding]) -> Finding:
    """Look at something; an error of remoe is a finding too, with the error's hint."""
    try:
        return look()
    except RemoeError as error:
        return Finding(name=name, ok=False, value=error.message, hint=error.hint)


def price_age(name: str, oldest: date, stale_hint: str = "") -> Finding:
    """Say how old prices are; `stale_hint` is for those older than half a year."""
    days = (date.today() - oldest).days
    return Finding(name=name, ok=True, value=f"the oldest is of {oldest}, {days} days ago", hint=stale_hint if days > _STALE_DAYS else "")
