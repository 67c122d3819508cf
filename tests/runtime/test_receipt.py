"""Receipts against sums worked out by hand, and against the prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.cli import infer, output
from remoe_cli.errors import InvokeError
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.cost import main_function, prices
from remoe_cli.plan.cost.placement import layer_outcome, total
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.plan.document import LayerPlan, MainSpec
from remoe_cli.plan.problem.problem import Main, Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation, Report
from remoe_cli.runtime.receipt import Loading, Prices, attach, failed_receipt, make_receipt, receipt_of, unpriced_receipt, with_report
from tests.support.synthetic import synthetic_profile

MAIN = MainPrices(rented=False, usd_per_s=0.04, usd_per_request=0.002, usd_per_read=0.0001)
FUNCTION = FunctionPrices(
    usd_per_gb_second=0.1, usd_per_storage_gb_second=0.01, storage_free_mb=512, usd_per_call=0.001, usd_per_read=0.0001
)
PRICES = Prices(catalog="by hand", main=MAIN, function=FUNCTION, storage_mb={"a": 500, "b": 1536})
AWS = read_catalog("aws-us-east-1")


def call(function: str, billed_ms: int, memory_mb: int, init_ms: float | None = None, retries: int = 0, **more: int) -> Invocation:
    tries = {"cold_tries": int(init_ms is not None)} | more
    return Invocation(function, 100, 40, 0.5, billed_ms - 0.5, billed_ms, 1 + retries, memory_mb, init_ms, retries, **tries)


def answer(times: tuple[float, ...], *calls: Invocation) -> Generated:
    return Generated((1, 2, 3, 4), tuple(range(len(times))), "text", "length", times, calls)


def test_sums_by_function_and_in_all() -> None:
    made = make_receipt(
        answer(
            (2.0, 2.5, 3.5),
            call("b", 1000, 512, init_ms=200.0, reads=7),
            call("a", 250, 1024, retries=2, cold_tries=2, unreported=1),
            call("b", 3000, 512),
            call("b", 1, 512, 1.0),
        ),
        PRICES,
    )
    a, b = made.functions
    # a: 0.25 s x 1 GB x 0.1 + 3 tries x 0.001, with /tmp that is free
    # b: 4.001 s x (0.5 GB x 0.1 + 1 GB of /tmp beyond the free half x 0.01) + 3 x 0.001 + 7 reads x 0.0001
    assert (a.name, a.memory_mb, a.invocations, a.cold_starts, a.retries, a.billed_ms, a.unreported) == ("a", 1024, 3, 2, 2, 250, 1)
    assert (b.name, b.memory_mb, b.invocations, b.cold_starts, b.retries, b.billed_ms, b.reads) == ("b", 512, 3, 2, 0, 4001, 7)
    assert a.cost_usd == pytest.approx(0.028)
    assert b.cost_usd == pytest.approx(4.001 * 0.06 + 0.0037)
    assert (a.sent_bytes, a.received_bytes, b.sent_bytes, b.received_bytes) == (100, 40, 300, 120)
    assert made.cost is not None
    # main: 3.5 s x 0.04 and its fee
    assert (made.cost.main_busy_usd, made.cost.main_idle_usd, made.cost.main_fees_usd) == (pytest.approx(0.14), 0, 0.002)
    assert made.cost.main_usd == pytest.approx(0.142)
    assert made.cost.functions_usd == pytest.approx(a.cost_usd + b.cost_usd)
    assert made.cost.total_usd == pytest.approx(0.142 + a.cost_usd + b.cost_usd)
    assert (made.invocations, made.cold_starts, made.retries, made.billed_ms, made.unreported) == (6, 4, 2, 4251, 1)
    assert (made.sent_bytes, made.received_bytes) == (400, 160)
    assert (made.prompt_tokens, made.generated_tokens, made.answered) == (4, 3, True)
    assert (made.ttft_s, made.tpot_s, made.total_s) == (2.0, 0.75, 3.5)
    assert (made.catalog, made.predicted) == ("by hand", None)
    assert (made.main.basis, a.basis) == ("measured", "report")


def test_an_answer_of_one_token_without_remote_experts() -> None:
    made = make_receipt(answer((1.5,)), PRICES)
    assert (made.ttft_s, made.tpot_s, made.total_s) == (1.5, None, 1.5)
    assert made.functions == () and made.cost is not None
    assert made.cost.functions_usd == 0
    assert made.cost.total_usd == made.cost.main_usd == pytest.approx(0.062)


def test_loading_is_in_the_cost_with_what_functions_were_billed_meanwhile_and_in_no_time() -> None:
    loading = (call("a", 100, 1024, init_ms=90.0), call("b", 300, 512, init_ms=90.0, reads=4))
    made = make_receipt(answer((1.5,), call("a", 50, 1024)), PRICES, Loading(seconds=2.0, reads=30), loading)
    assert (made.main_load_s, made.ttft_s, made.total_s) == (2.0, 1.5, 1.5)
    assert [(f.name, f.invocations, f.cold_starts, f.billed_ms, f.loading_ms) for f in made.functions] == [
        ("a", 2, 1, 150, 100),
        ("b", 1, 1, 300, 300),
    ]
    assert made.cost is not None
    assert made.cost.main_usd == pytest.approx(3.5 * 0.04 + 0.002 + 30 * 0.0001)
    loading_usd = (0.1 * 0.1 + 0.001) + (0.3 * 0.06 + 0.001 + 4 * 0.0001)
    assert made.cost.loading_usd == pytest.approx(loading_usd)
    assert made.cost.functions_usd == pytest.approx(loading_usd + 0.05 * 0.1 + 0.001)


def test_a_request_that_failed_has_a_receipt_too() -> None:
    made = failed_receipt(PRICES, 2.0, (replace(call("a", 900, 1024, retries=4), failed=True), call("b", 100, 512)))
    assert (made.answered, made.ttft_s, made.generated_tokens, made.total_s) == (False, None, 0, 2.0)
    assert (made.invocations, made.billed_ms, made.retries) == (6, 1000, 4)
    error = InvokeError("It is gone.", "Look.")
    assert receipt_of(error) is None
    attach(error, made)
    assert receipt_of(error) is made


@pytest.mark.parametrize("init_ms", [None, 4000.0])
def test_a_report_line_bills_a_main_function_in_place_of_its_own_clock(init_ms: float | None) -> None:
    made = make_receipt(answer((1.5,), call("a", 50, 1024)), PRICES, Loading(seconds=2.0, reads=30))
    billed = with_report(made, Report(1700.4, 5801, 3538, init_ms))
    assert (billed.main.basis, billed.main.seconds, billed.main.billed_ms, billed.main.invocations) == ("report", 5.801, 5801, 1)
    assert billed.main.cold_starts == (init_ms is not None)
    assert billed.cost is not None and made.cost is not None
    assert billed.cost.main_usd == pytest.approx(5.801 * 0.04 + 0.002 + 30 * 0.0001)
    assert billed.cost.functions_usd == made.cost.functions_usd
    # A deployment that gives it more memory than the plan is billed for that.
    known = PRICES.model_copy(update={"main": MAIN.model_copy(update={"memory_mb": 2048, "usd_per_gb_second": 0.02})})
    larger = with_report(make_receipt(answer((1.5,)), known), Report(1.0, 5801, 3072, None))
    assert larger.cost is not None and larger.cost.main_usd == pytest.approx(5.801 * (0.04 + 0.02) + 0.002)
    bare = unpriced_receipt(Report(10.0, 11, 128, init_ms), 0.5)
    assert (bare.main.billed_ms, bare.main.invocations, bare.billed_ms, bare.cost, bare.answered) == (11, 1, 0, None, False)


# The property: one price model


# Every token hits the functions of the first and the third layer, so that the mean of their calls is a whole number of them.
LAYERS = (
    LayerPlan(layer=1, remote=tuple(range(8)), memory_mb=3538, replicas=1),
    LayerPlan(layer=2, remote=(), memory_mb=0, replicas=0),
    LayerPlan(layer=3, remote=tuple(range(8)), memory_mb=1024, replicas=1),
)
BY_USE = MainSpec(name="lambda-10240", memory_mb=10240, vcpus=5.7886)
RENTED = MainSpec(name="ml.g6e.xlarge", memory_mb=32768, vcpus=4.0, gpu_memory_mb=49152, usd_per_hour=2.61)
ACCELERATED = AWS.model_copy(update={"main": AWS.main.model_copy(update={"usd_per_accelerator_gb_second": 5e-5})})


@cache
def profile() -> Profile:
    """With experts of 300 MB, which need more /tmp than is free."""
    made = synthetic_profile(Path(mkdtemp()), layers=3, experts=8)
    record = made.record.model_copy(update={"spec": made.record.spec.model_copy(update={"expert_bytes": 300 << 20})})
    return Profile(made.path, record, made.arrays)


def billed_calls(problem: Problem, placement: Placement, n_out: int) -> tuple[list[Invocation], dict[str, float]]:
    """The calls of a layer, taken together, billed as they are predicted to be: whole milliseconds."""
    calls, storage_mb, function = [], {}, prices.function_prices(problem.catalog)
    for index, layer in enumerate(placement.layers):
        if layer.parts:
            name = f"layer-{layer.layer}"
            storage_mb[name] = float(prices.function_storage_mb(problem.catalog, problem.spec.expert_bytes, len(layer.remote)))
            usd = layer_outcome(problem, placement, index).usd - (1 + n_out) * function.usd_per_call
            billed_ms = usd / float(prices.function_usd_per_s(function, layer.memory_mb, storage_mb[name])) * 1000
            assert billed_ms == pytest.approx(round(billed_ms), rel=1e-9)
            calls.append(Invocation(name, 0, 0, 0.0, 0.0, round(billed_ms), 1 + n_out, layer.memory_mb, None, 0))
    return calls, storage_mb


@settings(max_examples=60, deadline=None)
@given(
    main=st.sampled_from([BY_USE, RENTED]),
    catalog=st.sampled_from([AWS, ACCELERATED]),
    n_in=st.integers(4, 400),
    n_out=st.integers(1, 300),
    per_hour=st.none() | st.floats(0.01, 50),
    instances=st.integers(1, 4),
)
def test_a_receipt_whose_times_are_those_predicted_costs_what_is_predicted(
    main: MainSpec, catalog: Catalog, n_in: int, n_out: int, per_hour: float | None, instances: int
) -> None:
    asked = PlanRequest(n_in=n_in, n_out=n_out, requests_per_hour=per_hour, cold_share=0.0)
    problem = make_problem(profile(), catalog, asked)
    placement = Placement(main, LAYERS, instances if main is RENTED else 1)
    predicted = total(problem, placement, [layer_outcome(problem, placement, index) for index in range(len(LAYERS))])
    calls, storage_mb = billed_calls(problem, placement, n_out)
    times_s = tuple(predicted.ttft_s + i * predicted.tpot_s for i in range(n_out + 1))
    bought = main_function.prices_of(problem, Main(main, placement.instances))
    shown = Prices(catalog=catalog.name, main=bought, function=prices.function_prices(catalog), storage_mb=storage_mb)
    generated = Generated(tuple(range(n_in)), tuple(range(n_out + 1)), "", "length", times_s, tuple(calls))
    made = make_receipt(generated, shown)
    assert made.cost is not None
    assert made.cost.total_usd == pytest.approx(predicted.cost_usd_per_request, rel=1e-9)
    if main is RENTED:
        hours_usd = 2.61 / 3600 * times_s[-1] if per_hour is None else instances * 2.61 / per_hour
        assert made.cost.main_usd == pytest.approx(hours_usd) and (made.cost.main_idle_usd > 0) == (
            per_hour is not None and hours_usd > 2.61 / 3600 * times_s[-1]
        )


def test_people_read_what_is_billed_and_what_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_mode", output._Mode())
    made = make_receipt(answer((1.5, 1.6), call("a", 50, 1024)), PRICES)
    infer.show_receipt(made.model_dump(mode="json"))
    shown = capsys.readouterr().out
    assert "Costs are list prices; main function: measured time, expert functions: billed time (REPORT lines)." in " ".join(shown.split())
    assert all(len(line) <= 100 for line in shown.splitlines())
    infer.show_receipt(with_report(made, Report(1.0, 1700, 128, None)).model_dump(mode="json"))
    assert "main function: billed time (REPORT line)" in capsys.readouterr().out
    shared = prices.main_prices(AWS, RENTED, requests_per_hour=20)
    infer.show_receipt(make_receipt(answer((1.5, 1.6)), PRICES.model_copy(update={"main": shared})).model_dump(mode="json"))
    assert "idle hours, shared by all requests" in capsys.readouterr().out
    alone = PRICES.model_copy(update={"main": prices.main_prices(AWS, RENTED)})
    infer.show_receipt(make_receipt(answer((1.5, 1.6), call("a", 50, 1024, unreported=2)), alone).model_dump(mode="json"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Its idle hours are not in it, as the traffic is unknown. What 2 tries of calls were billed was not known" in shown
    error = InvokeError("It is gone.", "Look.")
    attach(error, failed_receipt(PRICES, 2.0, (call("a", 900, 1024),)))
    output.fail(error)
    assert "cost: 900 ms of 1 calls were billed, $0.173 in all." in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["remoe", "infer", "--json"])
    output.fail(error)
    assert json.loads(capsys.readouterr().out)["error"]["receipt"]["billed_ms"] == 900
