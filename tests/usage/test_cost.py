"""Receipts added up by hand: days, users, functions, idle hours and storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from remoe_cli.cli import output
from remoe_cli.cli.cost import _show
from remoe_cli.plan.cost.prices import MainPrices
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.kept import KeptReceipt, Kind
from remoe_cli.runtime.receipt import Loading, failed_receipt
from remoe_cli.usage import cost
from remoe_cli.usage.by import By
from remoe_cli.usage.cost import MAIN, Standing, Stored, report
from tests.support.api_server import PRICES

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)
RENTED = MainPrices(rented=True, usd_per_s=0.001, usd_per_request=0.0, usd_per_read=0.0, share_usd=7.0)
HOUR_USD = 3.6


def call(name: str, billed_ms: int) -> Invocation:
    return Invocation(name, 10, 10, 0.1, 5.0, billed_ms, 1, 2048, None, 0)


def line(
    hours: float,
    seconds: float = 0.0,
    calls: Sequence[Invocation] = (),
    kind: Kind = "answered",
    user: str | None = None,
    main: MainPrices = RENTED,
) -> KeptReceipt:
    """A receipt that ended so many hours after noon."""
    loading = kind == "loading"
    prices = PRICES.model_copy(update={"main": main})
    args = (0.0, (), Loading(seconds=seconds), calls) if loading else (seconds, calls)
    receipt = failed_receipt(prices, *args).model_copy(update={"prompt_tokens": 3, "generated_tokens": 2})
    return KeptReceipt(id="0", ended=NOON + timedelta(hours=hours), kind=kind, user=user, receipt=receipt)


def test_functions_users_and_days() -> None:
    kept = [
        line(0, 60, [call("f", 100), call("g", 900)], kind="loading"),
        line(1, 10, [call("f", 500)], user="ann"),
        line(2, 20, [call("f", 250), call("g", 250)], user="bob"),
        line(13, 30, [call("g", 1000)], kind="cancelled"),
    ]
    by_function = {row.of: row for row in report(kept, By.function).rows}
    assert {of: (row.requests, row.billed_ms, row.gb_seconds) for of, row in by_function.items() if of != MAIN} == {
        "f": (2, 850, pytest.approx(1.7)),
        "g": (2, 2150, pytest.approx(4.3)),
    }
    assert by_function["f"].usd == pytest.approx(1.7 * 0.1 + 3 * 0.001)
    assert (by_function[MAIN].main_s, by_function[MAIN].requests, by_function[MAIN].prompt_tokens) == (120, 3, 9)
    by_user = {row.of: row for row in report(kept, By.user).rows}
    assert {of: (row.requests, row.billed_ms) for of, row in by_user.items()} == {"": (1, 2000), "ann": (1, 500), "bob": (1, 500)}
    by_day = report(kept, By.day)
    assert [(row.of, row.requests, row.cancelled, row.billed_ms) for row in by_day.rows] == [
        ("2026-11-29", 2, 0, 2000),
        ("2026-11-30", 1, 1, 1000),
    ]
    assert by_day.loading_ms == 1000 and by_day.total.billed_ms == 3000 and by_day.usd == pytest.approx(sum(row.usd for row in by_day.rows))


def test_days_are_those_of_utc() -> None:
    late = line(11.5).model_copy(update={"ended": datetime(2026, 11, 30, 1, 30, tzinfo=timezone(timedelta(hours=2)))})
    assert [row.of for row in report([late], By.day).rows] == ["2026-11-29"]


def test_a_rented_main_function_pays_each_second_once() -> None:
    """Busy, idle between requests, and idle until now; the share of the plan's traffic counts for nothing."""
    kept = [line(0, 600, kind="loading"), line(1, 900), line(14, 1800)]
    gone, stands = report(kept, By.day), report(kept, By.day, standing=Standing(NOON + timedelta(hours=20)))
    assert gone.total.main_s == 3300 and gone.total.idle_s == pytest.approx(14 * 3600 - 2700)
    assert gone.total.usd == pytest.approx((14 * 3600 + 600) * 0.001)
    assert stands.total.idle_s - gone.total.idle_s == pytest.approx(6 * 3600) and stands.usd == pytest.approx(20 * HOUR_USD + 0.6)
    first, second = gone.rows  # the gap over midnight is divided
    assert first.idle_usd == pytest.approx(11.75 * HOUR_USD) and second.idle_usd == pytest.approx(1.5 * HOUR_USD)
    two = report(kept, By.day, standing=Standing(NOON + timedelta(hours=14), instances=2)).total
    assert two.idle_s == pytest.approx(28 * 3600 - 2700) and two.idle_usd + 2700 * 0.001 == pytest.approx(28 * HOUR_USD)


def batch(hours: float, seconds: float, requests: int, main: MainPrices = RENTED) -> list[KeptReceipt]:
    """Requests that were answered together, and ended so many hours after noon: each pays its part of the seconds."""
    receipt = failed_receipt(PRICES.model_copy(update={"main": main}), seconds, (), paid_s=seconds / requests)
    return [line(hours).model_copy(update={"receipt": receipt}) for _ in range(requests)]


def test_the_time_of_requests_that_are_answered_together_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each pays a part, the time before the first receipt of a batch looks idle until the others are read."""
    busy = report([line(0, kind="loading"), *batch(0.5, 1800, 8)], By.day)
    assert (busy.total.main_s, busy.total.idle_s, busy.usd) == (1800, 0, pytest.approx(0.5 * HOUR_USD))
    kept = [line(0, kind="loading"), *batch(11, 3600, 3), *batch(14, 7200, 4), line(15, 900), line(15, 900)]
    for most in (1000, 5):
        monkeypatch.setattr(cost, "_OPEN_GAPS", most)
        found = report(kept, By.day)
        assert found.total.idle_s == pytest.approx(11.5 * 3600) and found.usd == pytest.approx(15 * HOUR_USD)
        assert [row.idle_s for row in found.rows] == [pytest.approx(11 * 3600), pytest.approx(1800)]  # each on its day
    assert report(batch(1, 1800, 2), By.day).begin == NOON + timedelta(hours=0.5)
    assert report(kept, By.day, since=NOON + timedelta(hours=9)).total.idle_s == pytest.approx(2.5 * 3600)


def test_an_instance_that_was_given_back_before_a_batch_is_idle_for_as_long_as_it_is_kept() -> None:
    sleeps = RENTED.model_copy(update={"idle_s": 600.0})
    found = report([line(0, main=sleeps), *batch(5, 100, 4, sleeps)], By.day)
    assert (found.total.idle_s, found.total.main_s) == (600, 100)


def test_the_time_before_a_main_server_was_loaded_is_no_idle_time() -> None:
    kept = [line(0), line(100, 0, kind="loading"), line(101)]
    assert report(kept, By.day).total.idle_s == pytest.approx(3600)


def test_requests_that_overlap_leave_no_idle_time_between_them() -> None:
    assert report([line(1, 3600), line(1.5, 3600), line(2, 3000)], By.day).total.idle_s == 0


def test_what_is_paid_by_use_is_never_idle_and_what_scales_to_zero_for_a_while() -> None:
    lambda_main = RENTED.model_copy(update={"rented": False, "usd_per_request": 0.5, "share_usd": None})
    by_use = report([line(0, 5, kind="loading", main=lambda_main), line(1, 10, main=lambda_main), line(9, 10, main=lambda_main)], By.day)
    # Loading is billed, without a fee: it is no invocation.
    assert by_use.total.idle_s == 0 and by_use.total.main_usd == pytest.approx(25 * 0.001 + 2 * 0.5)
    assert by_use.loading_usd == pytest.approx(5 * 0.001)
    sleeps = RENTED.model_copy(update={"idle_s": 600.0})
    zero = report(
        [line(0, main=sleeps), line(0.1, main=sleeps), line(9, main=sleeps)], By.day, standing=Standing(NOON + timedelta(hours=20))
    )
    assert zero.total.idle_s == pytest.approx(360 + 600 + 600)


def test_since_counts_later_receipts_and_the_idle_time_since_then() -> None:
    kept = [line(0, 10, [call("f", 100)]), line(4, 0, [call("f", 300)])]
    late = report(kept, By.day, since=NOON + timedelta(hours=3))
    assert (late.total.requests, late.total.billed_ms) == (1, 300) and late.total.idle_s == pytest.approx(3600)
    assert late.begin == NOON + timedelta(hours=4) and report(kept, By.day, since=NOON + timedelta(days=9)).begin is None


def test_storage_is_paid_while_the_deployment_stands() -> None:
    stored = Stored(stored_bytes=10 * 2**30, usd_per_gb_month=0.1)
    stands = report([line(0), line(1)], By.user, standing=Standing(NOON + timedelta(hours=73), stored=stored))
    assert stands.storage_usd == pytest.approx(0.1) and stands.usd == pytest.approx(stands.total.usd + 0.1)
    assert report([line(0)], By.user).storage_usd is None


def test_what_is_in_no_receipt_is_told_as_what_is_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_mode", output._Mode())
    kept = [line(0, 10, [replace(call("f", 100), unreported=2)]), line(1, 10, [call("f", 300)])]
    _show("m", report(kept, By.day), {"metered_ms": 450, "kept_ms": 400, "other_ms": 50})
    shown = " ".join(capsys.readouterr().out.split())
    assert "What 2 tries of calls were billed was not known when their receipts were made. A later receipt may have it." in shown
    assert "and 50 ms are in no receipt: other callers, or requests that a server did not end." in shown


def test_a_request_without_prices_is_counted_and_in_no_sum_of_money() -> None:
    unknown = line(1, 10)
    receipt = unknown.receipt.model_copy(update={"cost": None, "main": unknown.receipt.main.model_copy(update={"prices": None})})
    made = report([unknown.model_copy(update={"receipt": receipt})], By.day)
    assert (made.total.requests, made.total.unpriced, made.usd) == (1, 1, 0.0)


@pytest.mark.parametrize("columns", ["40", "80", "100"])
def test_what_is_printed_has_every_sum_whole_and_says_what_had_no_answer(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading is told too where a deployment has no expert functions."""
    monkeypatch.setenv("COLUMNS", columns)
    _show(
        "m", report([line(0, 60, kind="loading"), line(1, 10), *[line(2, 30, kind="failed")] * 3, line(3, kind="cancelled")], By.day), None
    )
    shown = capsys.readouterr().out
    assert {"2026-11-29", "15", "$0.16", "$10.7", "$10.9"} <= {*shown.split()} and max(map(len, shown.splitlines())) <= int(columns)
    text = " ".join(shown.split())
    assert "Of that, loading is $0.06: each has a receipt of its own." in text
    assert "Of the 5 requests, 3 failed or were refused and 1 were cancelled." in text
