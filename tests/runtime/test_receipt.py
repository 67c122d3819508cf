"""Receipts against sums worked out by hand."""

from __future__ import annotations

import pytest

from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.receipt import Prices, make_receipt

PRICES = Prices(catalog="by hand", main_gb=4.0, main_usd_per_gb_second=0.01, function_usd_per_gb_second=0.1, function_usd_per_request=0.001)


def call(function: str, billed_ms: int, memory_mb: int, init_ms: float | None = None, retries: int = 0) -> Invocation:
    return Invocation(function, 100, 40, 0.5, billed_ms - 0.5, billed_ms, 1 + retries, memory_mb, init_ms, retries)


def answer(times: tuple[float, ...], *calls: Invocation) -> Generated:
    return Generated((1, 2, 3, 4), tuple(range(len(times))), "text", "length", times, calls)


def test_sums_by_function_and_in_all() -> None:
    made = make_receipt(
        answer(
            (2.0, 2.5, 3.5),
            call("b", 1000, 512, init_ms=200.0),
            call("a", 250, 1024, retries=2),
            call("b", 3000, 512),
            call("b", 1, 512, 1.0),
        ),
        PRICES,
    )
    a, b = made.functions
    # a: 0.25 s x 1 GB x 0.1 + 3 tries x 0.001; b: 4.001 s x 0.5 GB x 0.1 + 3 x 0.001
    assert (a.name, a.memory_mb, a.invocations, a.cold_starts, a.retries, a.billed_ms) == ("a", 1024, 1, 0, 2, 250)
    assert (b.name, b.memory_mb, b.invocations, b.cold_starts, b.retries, b.billed_ms) == ("b", 512, 3, 2, 0, 4001)
    assert a.cost_usd == pytest.approx(0.028)
    assert b.cost_usd == pytest.approx(0.20305)
    assert (a.sent_bytes, a.received_bytes, b.sent_bytes, b.received_bytes) == (100, 40, 300, 120)
    # main: 3.5 s x 4 GB x 0.01
    assert made.cost.main_usd == pytest.approx(0.14)
    assert made.cost.functions_usd == pytest.approx(0.23105)
    assert made.cost.total_usd == pytest.approx(0.37105)
    assert (made.invocations, made.cold_starts, made.retries, made.billed_ms) == (4, 2, 2, 4251)
    assert (made.sent_bytes, made.received_bytes) == (400, 160)
    assert (made.prompt_tokens, made.generated_tokens) == (4, 3)
    assert (made.ttft_s, made.tpot_s, made.total_s) == (2.0, 0.75, 3.5)
    assert (made.catalog, made.predicted) == ("by hand", None)


def test_an_answer_of_one_token_without_remote_experts() -> None:
    made = make_receipt(answer((1.5,)), PRICES)
    assert (made.ttft_s, made.tpot_s, made.total_s) == (1.5, None, 1.5)
    assert made.functions == ()
    assert made.cost.functions_usd == 0
    assert made.cost.total_usd == made.cost.main_usd == pytest.approx(0.06)


def test_loading_that_is_billed_is_in_the_cost_and_not_in_the_times() -> None:
    made = make_receipt(answer((1.5,)), PRICES, main_load_s=2.0)
    assert (made.main_load_s, made.ttft_s, made.total_s) == (2.0, 1.5, 1.5)
    assert made.cost.main_usd == pytest.approx(0.14)
