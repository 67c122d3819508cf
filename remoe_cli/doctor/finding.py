"""One row of what `remoe doctor` found."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from remoe_cli.artifacts import Part
from remoe_cli.errors import RemoeError


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


def until_wrong(*looks: tuple[str, Callable[[], Finding]]) -> Iterator[Finding]:
    """Look at one thing after the other, and end after the first that is wrong: the next ones rest on it."""
    for name, look in looks:
        yield (found := tried(name, look))
        if not found.ok:
            return
