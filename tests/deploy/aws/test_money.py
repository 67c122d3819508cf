"""The bill of a deployment adds up with its plan, and its document and tables say the same."""

from __future__ import annotations

import json
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import artifacts
from remoe_cli.deploy.aws import main_function, preview, quotas
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.aws.money import Line, Money, bill
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.aws.template import templates
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import MainSpec, Plan, WorkloadRef
from remoe_cli.plan.wording import dollars
from tests.support import aws
from tests.support.paths import PLANS

AWS = read_catalog("aws-us-east-1")
GB = 2**30


def billed(endpoint: Endpoint, catalog: str = "aws-us-east-1", settings: dict[str, Any] | None = None, **update: Any) -> Money:
    plan = aws.plan(endpoint, **update)
    return bill(plan, read_catalog(catalog), aws.contents(plan), aws.settings(endpoint, **(settings or {})))


def line(bill: Money, start: str) -> Line:
    (found,) = [line for line in bill.lines if line.what.startswith(start)]
    return found


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_it_adds_up_with_every_plan(file: Path) -> None:
    plan = artifacts.read_json(file, Plan)
    settings = AwsSettings("example", "x86_64", "3.13", endpoint_of(plan.main.name))
    contents = expected(plan)
    total = bill(plan, read_catalog(plan.catalog.path), contents, settings)
    assert total.usd_per_request == pytest.approx(plan.cost_usd_per_request, rel=1e-9)
    by_layer: dict[int, float] = {}
    for function, row in zip(contents.functions, [row for row in total.lines if (row.resource or "").startswith("Layer")], strict=True):
        by_layer[function.layer] = by_layer.get(function.layer, 0.0) + row.usd_per_request
    for layer, usd in zip(plan.layers, plan.costs.layers_usd, strict=True):
        assert by_layer.get(layer.layer, 0.0) == pytest.approx(usd, rel=1e-9)
    assert total.idle_usd_per_month == pytest.approx(fsum(row.idle_usd_per_month for row in total.lines))
    if (per_hour := plan.workload.requests_per_hour) is not None:
        # What is kept whether used or not, and everything else by the request; a rented instance's hours are in the request already.
        kept = fsum(row.usd_per_month or 0.0 for row in total.lines if not row.planned)
        assert total.beside_usd_per_request == 0
        assert total.usd_per_month == pytest.approx(kept + plan.cost_usd_per_request * per_hour * 730, rel=1e-9)


def test_a_rented_main_function_costs_its_hours() -> None:
    instances, usd_per_hour = 3, 1.408
    total = billed(Endpoint.sagemaker, instances=instances)
    main = line(total, "main endpoint, 3 x ml.g5.xlarge")
    assert main.idle_usd_per_month == main.usd_per_month == pytest.approx(instances * usd_per_hour * 730)
    assert (
        (main.usd_per_request, main.resource) == (0.01, "MainEndpoint")
        and "$4.224 an hour" in main.note
        and "each of 20 requests an hour" in main.note
    )
    assert total.idle_usd_per_month == pytest.approx(fsum(row.idle_usd_per_month for row in total.lines))
    unknown = billed(Endpoint.sagemaker, instances=instances, workload=WorkloadRef(n_in=10, n_out=10))
    assert line(unknown, "main endpoint").usd_per_month is unknown.usd_per_month is None
    assert line(unknown, "main endpoint").idle_usd_per_month == main.idle_usd_per_month
    assert any("no traffic" in note for note in unknown.notes) and not any("no traffic" in note for note in total.notes)


def test_what_is_paid_by_use_costs_nothing_at_rest_but_storage() -> None:
    total = billed(Endpoint.aws_lambda)
    paid = {row.what: row.idle_usd_per_month for row in total.lines if row.idle_usd_per_month}
    assert [what.partition(",")[0] for what in paid] == ["S3", "image in ECR"]
    assert line(total, "main function").usd_per_month == pytest.approx(0.01 * 20 * 730)
    stored_gb = (7 * 1000 + 3 * 400 + (2 << 30) + (20 << 20)) / GB
    assert line(total, "S3").idle_usd_per_month == pytest.approx(stored_gb * 0.023)
    assert line(total, "image in ECR").idle_usd_per_month == pytest.approx(1e9 / GB * 0.10)


def test_functions_share_their_layers_cost_by_experts() -> None:
    total = billed(Endpoint.none)
    assert line(total, "layer-001,").usd_per_request == 0.002
    assert line(total, "layer-002-0").usd_per_request == line(total, "layer-002-1").usd_per_request == 0.0015
    assert line(total, "layer-002-1").resource == "Layer002Part1"
    uneven = aws.plan(Endpoint.none)
    contents = aws.contents(uneven)
    shares = ((1, 2, 3), (4,))
    contents = replace(
        contents, functions=(contents.functions[0], *(replace(p, experts=e) for p, e in zip(contents.functions[1:], shares, strict=True)))
    )
    total = bill(uneven, AWS, contents, aws.settings(Endpoint.none))
    assert [line(total, f"layer-002-{i}").usd_per_request for i in (0, 1)] == pytest.approx([0.00225, 0.00075])


def test_ones_own_machine_is_not_on_the_bill() -> None:
    total = billed(Endpoint.none)
    assert "not on AWS's bill" in line(total, "main function").note and line(total, "main function").resource is None
    stored_gb = (7 * 1000 + 3 * 400 + (20 << 20)) / GB  # nor is the main function's share stored
    assert line(total, "S3").idle_usd_per_month == pytest.approx(stored_gb * 0.023)
    assert total.usd_per_request == pytest.approx(0.015)


def test_a_request_costs_what_the_plan_says_and_beside_it_is_only_what_is_kept() -> None:
    total = billed(Endpoint.aws_lambda, ttft_s=5.0, tpot_s=0.5)
    assert (total.usd_per_request, total.beside_usd_per_request) == (pytest.approx(0.015), 0.0)
    calls = 1 + (2 + 1 + 1) + 3 * 10  # the main function, each replica in prefill, each function for each further token
    kept_months = 14 * 24 / 730
    row = line(total, "logs kept for 14 days")
    assert row.usd_per_month == pytest.approx(20 * 730 * calls * 400 / GB * kept_months * 0.03) and row.usd_per_request == 0
    longer = billed(Endpoint.aws_lambda, settings={"log_days": 365})
    assert (line(longer, "logs kept for 365 days").usd_per_month or 0.0) > (row.usd_per_month or 0.0)


@pytest.mark.parametrize(("memory_mb", "main_bytes", "storage_mb"), [(3072, 2 << 30, 3072), (128, 0, 512), (1024, 2 << 30, 2304)])
def test_the_main_functions_tmp_is_as_large_as_its_memory_as_it_is_priced(memory_mb: int, main_bytes: int, storage_mb: int) -> None:
    """It never is too small for its files, whatever the plan says."""
    plan = aws.plan(Endpoint.aws_lambda, main=MainSpec(name="lambda-x", memory_mb=memory_mb))
    assert main_function.storage_mb(plan, replace(aws.contents(plan), main_bytes=main_bytes)) == storage_mb


def test_a_budget_is_a_line() -> None:
    assert line(billed(Endpoint.none, settings={"monthly_alert_usd": 5.0}), "monthly alert").idle_usd_per_month == 0.0
    assert not [row for row in billed(Endpoint.none).lines if row.what == "monthly alert"]


@pytest.mark.parametrize(("catalog", "awss"), [("aws-us-east-1", True), ("paper", False), ("local", False)])
def test_prices_that_are_not_awss_are_said_so(catalog: str, awss: bool) -> None:
    notes = billed(Endpoint.none, catalog).notes
    assert any("are not AWS's" in note for note in notes) is not awss


def test_an_architecture_that_the_plan_is_not_priced_for_is_named() -> None:
    assert any("priced for x86_64, the functions are arm64" in note for note in billed(Endpoint.none).notes)
    assert not any("priced for" in note for note in billed(Endpoint.none, settings={"architecture": "x86_64"}).notes)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_document_of_a_dry_run(endpoint: Endpoint) -> None:
    plan = aws.plan(endpoint)
    contents, settings = aws.contents(plan), aws.settings(endpoint, monthly_alert_usd=5.0)
    made, rows, total = templates(plan, contents, settings), quotas.check(plan, contents, settings), bill(plan, AWS, contents, settings)
    document = json.loads(json.dumps(preview.dry_run(plan, made, contents, rows, total), allow_nan=False))
    assert document["template"] == made.root and document["nested"] == {} and document["packaged"] is True
    assert [row["logical_id"] for row in document["resources"]] == list(made.root["Resources"])
    assert document["changes"] == [
        {"action": "add"} | {key: row[key] for key in ("stack", "logical_id", "type", "name")} for row in document["resources"]
    ]
    # The money stands with the resource that it is paid for; what stands nowhere is storage, and one's own machine.
    by_resource = fsum(row["usd_per_request"] for row in document["resources"])
    assert by_resource == pytest.approx(0.005 if endpoint is Endpoint.none else 0.015)
    named = {row["logical_id"]: row["name"] for row in document["resources"]}
    assert (named["Layer001"], named["Layer001Log"], named["Layer001Role"]) == ("tiny-layer-001", "/aws/lambda/tiny-layer-001", None)
    assert [row["ok"] for row in document["quotas"]] == [row.ok for row in rows] and document["cost"]["usd_per_request"] == pytest.approx(
        0.015
    )
    assert preview.dry_run(plan, made, expected(plan), rows, total)["packaged"] is False


def test_the_document_names_the_nested_stack() -> None:
    plan, contents, settings = aws.many_functions()
    made = templates(plan, contents, settings)
    document = preview.dry_run(plan, made, contents, (), bill(plan, AWS, contents, settings))
    assert set(document["nested"]) == {row["stack"] for row in document["resources"]} - {None}
    assert len(document["resources"]) == 464 * 5 + 8 + 5
    assert fsum(row["usd_per_request"] for row in document["resources"]) == pytest.approx(plan.cost_usd_per_request)


def test_tables_for_people() -> None:
    plan = aws.plan(Endpoint.sagemaker, tpot_s=100.0)
    contents, settings = aws.contents(plan), aws.settings(Endpoint.sagemaker)
    rows, total = quotas.check(plan, contents, settings), bill(plan, AWS, contents, settings)
    kinds, usd, quota = preview.tables(templates(plan, contents, settings), rows, total)
    assert ("Lambda::Function", "3") in kinds.rows and ("SageMaker::Endpoint", "1") in kinds.rows
    assert [row[0].partition(",")[0] for row in usd.rows] == [
        "main endpoint",
        "3 expert functions",
        "S3",
        "image in ECR",
        "logs kept for 14 days",
        "total",
    ]
    assert usd.rows[1][2] == "$0.005"
    assert usd.rows[-1][2] == dollars(total.usd_per_request + total.beside_usd_per_request)
    assert quota.rows[0] == ("time of a mean request", "1,001", "480", "s", "warning")
    assert all(len(row) == len(table.columns) for table in (kinds, usd, quota) for row in table.rows)
    assert any(remark.startswith("time of a mean request: Plan for a lower") for remark in preview.remarks(plan, rows, total))


def test_the_verdict_is_said_first() -> None:
    plan = aws.plan(Endpoint.none)
    contents, settings = aws.contents(plan), aws.settings(Endpoint.none)
    rows, total = quotas.check(plan, contents, settings), bill(plan, AWS, contents, settings)
    worth, not_worth = (
        preview.remarks(plan.model_copy(update={"verdict": verdict, "reason": "It is dear."}), rows, total)
        for verdict in ("recommended", "not-recommended")
    )
    assert worth[0] == "Moving experts out: worth it. It is dear." and not_worth[0] == "Moving experts out: not worth it. It is dear."
    assert worth[1:] == not_worth[1:]
