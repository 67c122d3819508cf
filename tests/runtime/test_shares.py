"""Shared calls are divided into whole numbers that add up, and nobody is favoured."""

from __future__ import annotations

import random

from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.shares import _COUNTED, Owed, divide_call


def call(draw: random.Random) -> Invocation:
    whole = {name: draw.randrange(0, 3 if "tries" in name else 5000) for name in _COUNTED}
    return Invocation("f", elapsed_s=0.1, duration_ms=1.0, memory_mb=128, init_ms=None, **whole)  # type: ignore[arg-type]


def test_the_parts_of_each_call_add_up_and_each_request_gets_its_share() -> None:
    draw = random.Random(0)
    weights, owed = (1, 1, 3, 0, 2), list[Owed]({} for _ in range(5))
    sums, exact = [dict.fromkeys(_COUNTED, 0) for _ in weights], [dict.fromkeys(_COUNTED, 0.0) for _ in weights]
    for _ in range(300):
        whole = call(draw)
        parts = divide_call(whole, weights, owed)
        for name in _COUNTED:
            assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
            for row, part in enumerate(parts):
                assert getattr(part, name) >= 0
                sums[row][name] += getattr(part, name)
                exact[row][name] += getattr(whole, name) * weights[row] / sum(weights)
    assert all(abs(sums[row][name] - exact[row][name]) < 2 for row in range(5) for name in _COUNTED)


def test_requests_that_join_and_leave_lose_nothing() -> None:
    draw, everybody, total, given = random.Random(1), list[Owed]({} for _ in range(6)), 0, 0
    for _ in range(300):
        here = draw.sample(range(6), draw.randrange(1, 6))
        whole = call(draw)
        parts = divide_call(whole, [draw.randrange(0, 3) for _ in here], [everybody[i] for i in here])
        total += whole.billed_ms
        given += sum(part.billed_ms for part in parts)
        assert min(part.billed_ms for part in parts) >= 0
    assert given == total
