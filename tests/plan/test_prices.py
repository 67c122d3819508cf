"""The price model: worked out by hand, and the same for what is predicted and what is measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe_cli.function.s3 import CHUNK_BYTES
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.cost import prices
from remoe_cli.plan.document import MainSpec, ScenarioKind
from remoe_cli.plan.verify.check import verify
from remoe_cli.runtime.fetch import RANGE_BYTES
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

AWS = read_catalog("aws-us-east-1")
LOG_USD = 400 / 2**30 * 0.50


def main_spec(name: str) -> MainSpec:
    return next(spec for spec in AWS.main.menu if spec.name == name)


@pytest.mark.parametrize(("name", "usd_per_hour"), [("ml.g6e.xlarge", 2.61), ("ml.g4dn.xlarge", 0.7364), ("ml.g5.2xlarge", 1.515)])
def test_a_rented_gpu_costs_its_hours_busy_or_idle(name: str, usd_per_hour: float) -> None:
    alone = prices.main_cost(prices.main_prices(AWS, main_spec(name)), 30.0)
    assert (alone.usd, alone.idle_usd, alone.fees_usd) == (pytest.approx(usd_per_hour / 120), 0, 0)
    shared = prices.main_prices(AWS, main_spec(name), instances=3, requests_per_hour=20)
    cost = prices.main_cost(shared, 30.0)
    assert cost.busy_usd == pytest.approx(usd_per_hour / 120)
    assert cost.usd == pytest.approx(3 * usd_per_hour / 20) and cost.idle_usd == pytest.approx(cost.usd - usd_per_hour / 120)
    longer = prices.main_cost(shared, 7200.0)
    assert (longer.busy_usd, longer.idle_usd) == (pytest.approx(3 * usd_per_hour / 20), 0)


def test_a_main_function_on_lambda_costs_memory_tmp_fee_log_and_reads() -> None:
    """10 GB for 40 s: $0.0066667 of memory, 9.5 GB of /tmp beyond the free half, one fee, one log, 640 reads of 16 MB."""
    found = prices.main_prices(AWS, main_spec("lambda-10240"))
    assert found.usd_per_s == pytest.approx(10 * 0.0000166667 + 9.5 * 0.0000000309, rel=1e-12)
    assert prices.main_reads(AWS, main_spec("lambda-10240")) == 640 and prices.main_reads(AWS, main_spec("ml.g5.xlarge")) == 0
    cost = prices.main_cost(found, 40.0, reads=640)
    assert cost.busy_usd == pytest.approx(0.00666668 + 0.000011742, rel=1e-9) and cost.idle_usd == 0
    assert cost.fees_usd == pytest.approx(0.0000002 + LOG_USD + 640 * 0.0000004, rel=1e-12)


def test_an_expert_function_costs_memory_tmp_fee_log_and_reads() -> None:
    """1769 MB with 40 experts of 25 MB: 1000 MB and 64 to spare in /tmp, 552 of them paid for; 12 calls of 345 ms in all."""
    found = prices.function_prices(AWS)
    storage_mb = float(prices.function_storage_mb(AWS, 25 << 20, 40))
    reads = float(prices.function_reads(AWS, 25 << 20, 40))
    assert (storage_mb, reads) == (1064, 1 + 40 * 7)
    usd = prices.calls_usd(found, 1769, storage_mb, [300.0, 45.0], 12, 281)
    by_hand = 0.345 * (1769 / 1024 * 0.0000166667 + 552 / 1024 * 0.0000000309) + 12 * (0.0000002 + LOG_USD) + 281 * 0.0000004
    assert usd == pytest.approx(by_hand, rel=1e-12)
    assert prices.calls_usd(found, 1769, 500, [300.0, 45.0], 0) == pytest.approx(0.345 * 1769 / 1024 * 0.0000166667, rel=1e-12)


@pytest.mark.parametrize("per_hour", [None, 20.0])
def test_the_verifier_prices_everything_alike(per_hour: float | None, tmp_path: Path) -> None:
    """Also where expert functions are dearer or cheaper: the main function's /tmp, logs and reads stay."""
    storage = {"usd_per_1000_reads": 4e-3, "usd_per_log_gb": 1.0}
    function = {"usd_per_storage_gb_second": 1e-6, "storage_free_mb": 100.0, "bytes_per_read": 2.0**22, "log_bytes_per_call": 400.0}
    catalog = tiny_catalog({"usd_per_storage_gb_second": 1e-6, "bytes_per_read": 2.0**24}, storage, **function)
    profile = synthetic_profile(tmp_path, decode_tokens=60)
    plan = plan_of(profile, catalog, examine=True, remote_share=0.5, requests_per_hour=per_hour)
    assert verify(plan, profile, catalog) == ()
    assert {scenario.kind for scenario in plan.scenarios} >= {ScenarioKind.FUNCTION_PRICE, ScenarioKind.CALL_OVERHEAD}


def test_reads_are_as_long_as_the_code_makes_them() -> None:
    assert AWS.function.bytes_per_read == CHUNK_BYTES and AWS.main.bytes_per_read == RANGE_BYTES


@pytest.mark.parametrize("name", ["local", "paper"])
def test_a_catalog_without_s3_and_logs_prices_neither(name: str) -> None:
    catalog = read_catalog(name)
    spec = catalog.main.menu[-1]
    found, calls = prices.main_prices(catalog, spec), prices.function_prices(catalog)
    assert found.usd_per_s == pytest.approx(catalog.main_usd_per_gb_second * spec.memory_mb / 1024, rel=1e-12)
    assert (found.usd_per_request, found.usd_per_read, prices.main_reads(catalog, spec)) == (catalog.main.usd_per_request, 0, 0)
    assert (calls.usd_per_call, calls.usd_per_read, float(prices.function_reads(catalog, 1 << 30, 9))) == (
        catalog.function.usd_per_request,
        0,
        0,
    )


@given(st.floats(0, 1e5), st.floats(0.01, 1e4), st.integers(1, 64))
def test_busy_and_idle_share_are_the_hours_that_a_request_pays(seconds: float, per_hour: float, instances: int) -> None:
    found = prices.main_prices(AWS, main_spec("ml.g5.xlarge"), instances=instances, requests_per_hour=per_hour)
    cost = prices.main_cost(found, seconds)
    assert min(cost.busy_usd, cost.idle_usd) >= 0
    assert cost.usd == pytest.approx(instances * 1.408 / per_hour)


def test_nothing_else_multiplies_a_price() -> None:
    """The planner, receipts and the dry run have no price of their own: only the catalog, the price model, its editor, and the verifier."""
    package = Path(prices.__file__).parents[2]
    fields = ("usd_per_gb_second", "usd_per_storage_gb_second", "usd_per_accelerator_gb_second", "usd_per_1000_reads", "usd_per_log_gb")
    known = {"plan/catalog/catalog.py", "plan/catalog/update.py", "plan/cost/prices.py", "plan/verify/cost.py", "plan/verify/baselines.py"}
    known |= {"plan/verify/waking.py"}
    known |= {
        "plan/assess/baselines.py",  # accelerator memory that holds a whole model
        "plan/assess/robustness.py",  # changes prices
        "plan/assess/verdict.py",  # the price of memory by itself, in a sentence
        "plan/explain/why.py",
        "plan/cost/main_function.py",  # whether there are accelerators
        "plan/paper/heuristic.py",  # the paper's own equations
    }
    reads = re.compile(rf"\.({'|'.join(fields)})\b")
    using = {str(path.relative_to(package)) for path in package.rglob("*.py") if reads.search(path.read_text())}
    assert using - known == set()
