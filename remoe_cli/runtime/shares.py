"""Divide calls that several requests share, so that their receipts add up to what was billed.

A request's share of a function's calls in a step is its share of the rows that the step sent to that function. What Lambda counts is
whole: milliseconds, tries, bytes. So each call is divided into whole numbers that add up to it, and what rounding has given a request too
much or too little is kept for its next call. A request's sums are then within a few units of its exact share, however small its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import floor
from typing import Any

from remoe_cli.runtime.answer import Saved
from remoe_cli.runtime.invoke import Invocation

_COUNTED = tuple(each.name for each in fields(Invocation) if each.type == "int" and each.name not in ("memory_mb", "experts", "rows"))
# What a request's exact shares are above its whole ones, by field.
Owed = dict[str, float]


def divide_call(call: Invocation, rows: Sequence[int], owed: Sequence[Owed]) -> list[Invocation]:
    """Divide a call by rows; the parts add up to it exactly.

    `owed` is brought up to date. Without any rows, all pay the same.

    >>> call = Invocation("f", 100, 90, 0.1, 5.0, billed_ms=5, billed_tries=1, memory_mb=1769, init_ms=None, retries=0)
    >>> owed = [{}, {}]
    >>> for _ in range(2):
    ...     print([(part.billed_ms, part.billed_tries) for part in divide_call(call, (1, 1), owed)])
    [(3, 1), (2, 0)]
    [(2, 0), (3, 1)]
    """
    weights = rows if any(rows) else [1] * len(owed)
    parts: dict[str, Any] = {name: _divide(getattr(call, name), weights, name, owed) for name in _COUNTED}
    return [replace(call, **{name: whole[i] for name, whole in parts.items()}) for i in range(len(owed))]


def divide_saved(saved: Saved, owed: Sequence[Owed]) -> list[Saved]:
    """Divide calls that were not made evenly, in whole calls. `owed` is brought up to date."""
    calls = _divide(saved.calls, [1] * len(owed), "saved_calls", owed)
    return [Saved(count, saved.usd / len(owed)) for count in calls]


def _divide(count: int, weights: Sequence[int], name: str, owed: Sequence[Owed]) -> list[int]:
    """Divide a count by largest remainders."""
    total = sum(weights)
    exact = [each.get(name, 0.0) + count * weight / total for each, weight in zip(owed, weights, strict=True)]
    # Without rows there is nothing to pay, whatever is owed.
    whole = [max(0, floor(share)) if weight else 0 for share, weight in zip(exact, weights, strict=True)]
    paying = [i for i, weight in enumerate(weights) if weight]
    while (missing := count - sum(whole)) != 0:
        if missing > 0:
            whole[max(paying, key=lambda i: (exact[i] - whole[i], -i))] += 1
        else:
            whole[min((i for i in paying if whole[i]), key=lambda i: (exact[i] - whole[i], i))] -= 1
    for each, share, given in zip(owed, exact, whole, strict=True):
        each[name] = share - given
    return whole
