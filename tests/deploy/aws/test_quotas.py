"""Quotas of AWS: what is beyond one is named before anything is sent, what is within is let through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from remoe_cli import lambda_limits
from remoe_cli.deploy.aws import functions, main_function, quotas, template
from remoe_cli.deploy.aws.aws_reference import AwsReference, aws_reference
from remoe_cli.deploy.aws.contents import Contents, expected
from remoe_cli.deploy.aws.functions import requests_at_once
from remoe_cli.deploy.aws.quotas import QuotaCheck, check
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import MainSpec, Plan, WorkloadRef
from tests.support import aws


def checked(plan: Plan, contents: Contents | None = None, **settings: Any) -> dict[str, QuotaCheck]:
    """The rows by name."""
    endpoint = settings.pop("endpoint", Endpoint.none)
    rows = check(plan, contents or aws.contents(plan), aws.settings(endpoint, **settings))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        beyond = row.limit is not None and row.used > row.limit
        assert row.ok is not beyond or row.name.startswith("least") or row.name == "reserved concurrency"
        assert row.hint or row.severity in ("ok", "error")
    return {row.name: row for row in rows}


def one_function(**change: Any) -> tuple[Plan, Contents]:
    plan = aws.plan(Endpoint.none, aws.LAYERS[:2])
    contents = aws.contents(plan)
    return plan, replace(contents, functions=(replace(contents.functions[0], **change),))


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_small_deployment_fits(endpoint: Endpoint) -> None:
    rows = checked(aws.plan(endpoint), endpoint=endpoint)
    assert all(row.ok for row in rows.values())
    # 3 functions with 2 replicas in one layer and 1 in each of the others, for as many requests as come at once.
    assert rows["reserved concurrency"].used == (4 if endpoint is not Endpoint.aws_lambda else 5)
    assert (
        rows["resources of a template"].used
        == 15 + {Endpoint.none: 1, Endpoint.aws_lambda: 5, Endpoint.sagemaker: 5, Endpoint.lambda_gpu: 7}[endpoint]
    )
    assert rows["IAM roles"].used == 3 + (endpoint is not Endpoint.none) + (endpoint is Endpoint.lambda_gpu)
    assert rows["longest name of a function"].used == len("tiny-layer-002-0")
    calls = 4 * (3 + endpoint.on_lambda)
    assert rows["time for API calls"].used == pytest.approx(calls / 15) and f"{calls} calls" in rows["time for API calls"].hint
    assert rows["code of all versions"].used == calls / 4 * 2 * 20 * 2**20


@pytest.mark.parametrize(
    ("memory_mb", "name", "severity", "hint"),
    [
        (127, "least memory of an expert function", "error", "Lambda's sizes"),
        (128, "memory of an expert function", "ok", ""),
        (3008, "memory of an expert function", "ok", ""),
        (3009, "memory of an expert function", "note", "3,008 MB"),
        (10240, "memory of an expert function", "note", "10,240"),
        (10241, "memory of an expert function", "error", "Lambda's sizes"),
    ],
)
def test_memory(memory_mb: int, name: str, severity: str, hint: str) -> None:
    row = checked(*one_function(memory_mb=memory_mb))[name]
    assert (row.used, row.severity) == (memory_mb, severity) and hint in row.hint


def test_packages() -> None:
    plan, contents = one_function()
    assert checked(plan, replace(contents, code_unpacked_bytes=250 << 20))["unpacked code"].severity == "ok"
    assert checked(plan, replace(contents, code_unpacked_bytes=(250 << 20) + 1))["unpacked code"].severity == "error"
    assert "Not packaged yet" in checked(plan, expected(plan))["unpacked code"].hint
    assert checked(plan, replace(contents, code_bytes=75 << 29))["code of all versions"].severity == "ok"
    assert checked(plan, replace(contents, code_bytes=(75 << 29) + 1))["code of all versions"].severity == "warning"


def test_no_payload_is_larger_than_lambda_takes() -> None:
    planned = {name: read_catalog(name).function.payload_limit_bytes for name in ("aws-us-east-1", "local")}
    assert {**planned, "quota": aws_reference().function.payload_bytes} == dict.fromkeys([*planned, "quota"], PAYLOAD_LIMIT_BYTES)


def test_the_limits_that_the_code_knows_are_those_of_the_data() -> None:
    quota, catalogs = aws_reference().function, [read_catalog(name).function for name in ("aws-us-east-1", "local")]
    assert (quota.memory_least_mb, quota.memory_most_mb) == (lambda_limits.MIN_MEMORY_MB, lambda_limits.MAX_MEMORY_MB)
    assert quota.timeout_s == lambda_limits.MAX_TIMEOUT_S
    for function in catalogs:
        assert function.mb_per_vcpu == lambda_limits.MB_PER_VCPU
        assert lambda_limits.MIN_MEMORY_MB <= min(function.memory_menu_mb) < max(function.memory_menu_mb) <= lambda_limits.MAX_MEMORY_MB


@pytest.mark.parametrize(
    ("replicas", "concurrency", "used", "severity"),
    [(900, 1000, 900, "note"), (901, 1000, 0, "warning"), (901, 1001, 901, "note"), (1, 10, 0, "warning"), (1, 101, 1, "note")],
)
def test_concurrency_leaves_a_hundred_to_others(replicas: int, concurrency: int, used: int, severity: str) -> None:
    row = checked(*one_function(replicas=replicas), concurrency=concurrency)["reserved concurrency"]
    assert (row.used, row.limit, row.severity) == (used, max(0, concurrency - 100), severity)
    if severity == "warning":
        assert f"Ask for {max(1000, replicas + 100):,} 'Concurrent executions'" in row.hint


def test_concurrency_is_for_all_requests_at_once_as_far_as_it_goes() -> None:
    plan = aws.plan(Endpoint.sagemaker, instances=6)
    assert checked(plan, endpoint=Endpoint.sagemaker)["reserved concurrency"].used == 6 * 4
    row = checked(plan, endpoint=Endpoint.sagemaker, concurrency=100 + 23)["reserved concurrency"]
    assert (row.used, row.severity) == (5 * 4, "warning") and "5 of the 6 requests" in row.hint


@pytest.mark.parametrize(
    ("per_hour", "request_s", "at_once"),
    # Poisson: 4 at once in the mean with a standard deviation of 2; 0.25 with one of 0.5.
    [(None, 100.0, 1), (60.0, 240.0, 10), (9.0, 100.0, 2), (0.001, 1.0, 1)],
)
def test_requests_at_once_are_those_that_come_together(per_hour: float | None, request_s: float, at_once: int) -> None:
    workload = WorkloadRef(n_in=10, n_out=9, requests_per_hour=per_hour)
    plan = aws.plan(Endpoint.aws_lambda, workload=workload, ttft_s=request_s / 10, tpot_s=request_s / 10)
    assert requests_at_once(plan) == at_once


@pytest.mark.parametrize(
    ("endpoint", "limit_s", "beyond"),
    [(Endpoint.aws_lambda, 900, "warning"), (Endpoint.sagemaker, 480, "warning")],
)
def test_answers_that_are_cut_short(endpoint: Endpoint, limit_s: float, beyond: str) -> None:
    for tpot_s, severity in ((limit_s / 10, "ok"), (limit_s / 10 + 0.01, beyond)):
        plan = aws.plan(endpoint, ttft_s=0.0, tpot_s=tpot_s)
        row = checked(plan, endpoint=endpoint)["time of a mean request"]
        assert (row.limit, row.severity) == (limit_s, severity)
    assert "time of a mean request" not in checked(aws.plan(Endpoint.none, tpot_s=1e6))


def test_the_main_function_on_lambda() -> None:
    plan = aws.plan(Endpoint.aws_lambda, main=MainSpec(name="lambda-16384", memory_mb=16384))
    assert checked(plan, endpoint=Endpoint.aws_lambda)["memory of the main function"].severity == "error"
    plan = aws.plan(Endpoint.aws_lambda)
    for share_mb, severity in ((10240 - 256, "ok"), (10240 - 255, "error")):
        contents = replace(aws.contents(plan), main_bytes=share_mb << 20)
        row = checked(plan, contents, endpoint=Endpoint.aws_lambda)["/tmp of the main function"]
        assert (row.used, row.severity) == (share_mb + 256, severity)


def test_instances_have_to_be_asked_for() -> None:
    row = checked(aws.plan(Endpoint.sagemaker, instances=6), endpoint=Endpoint.sagemaker)["instances ml.g5.xlarge"]
    assert (row.used, row.limit, row.severity) == (6, None, "note") and "6 of 'ml.g5.xlarge for endpoint usage'" in row.hint


def test_a_time_for_api_calls_that_rounds_to_nothing_is_not_worth_a_remark() -> None:
    plan, contents = one_function()
    row = {row.name: row for row in check(plan, contents, aws.settings(Endpoint.none))}["time for API calls"]
    assert row.used == pytest.approx(4 / 15) and row.hint == ""


def test_as_many_functions_as_deepseek_v3_has_fit_in_nested_stacks() -> None:
    plan, contents, settings = aws.many_functions()
    rows = {row.name: row for row in check(plan, contents, settings)}
    assert not [row for row in rows.values() if row.severity == "error"]
    assert rows["resources of a template"].used == 320 and rows["resources of all nested stacks"].used == 464 * 5 + 8 + 5
    assert rows["stacks"].used == 9 and rows["IAM roles"].used == 465
    assert rows["time for API calls"].used == pytest.approx(464 * 4 / 15)


def test_too_many_functions_are_named() -> None:
    rows = {row.name: row for row in check(*aws.many_functions(layers=8, owners=24))}
    assert rows["resources of a template"].severity == "error"  # 8 layers of 24 functions in one nested stack
    rows = {row.name: row for row in check(*aws.many_functions(layers=63))}
    assert rows["resources of all nested stacks"].severity == "error"  # 2,520 and more
    rows = {row.name: row for row in check(*aws.many_functions(layers=65, owners=8))}
    assert rows["IAM roles"].severity == "note"


def test_every_quota_of_the_file_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each, made as strict as can be, changes a verdict on some deployment."""
    deployments = [(plan := aws.plan(endpoint), aws.contents(plan), aws.settings(endpoint)) for endpoint in Endpoint]
    deployments.append(aws.many_functions(layers=13))

    def verdicts() -> list[list[str]]:
        return [[row.severity for row in check(*deployment)] for deployment in deployments]

    before = verdicts()
    tables = {side: getattr(aws_reference(), side) for side in ("function", "stack", "iam", "endpoint")}
    for side, quota in [(side, quota) for side, table in tables.items() for quota in type(table).model_fields]:
        if quota in ("concurrency", "concurrency_new_account", "control_calls_per_s", "start_s", "storage_least_mb", "payload_bytes"):
            continue  # what hints say, what templates take, and what the dispatcher divides calls by
        strictest = 10**6 if "least" in quota or "unreserved" in quota else 1
        with monkeypatch.context() as patch:
            _use(patch, aws_reference().model_copy(update={side: tables[side].model_copy(update={quota: strictest})}))
            assert verdicts() != before, quota


def _use(monkeypatch: pytest.MonkeyPatch, changed: AwsReference) -> None:
    for where in (main_function, functions, quotas, template):
        monkeypatch.setattr(where, "aws_reference", lambda: changed)


def test_parts_of_a_plan_alone_are_those_that_are_packaged_later() -> None:
    plan = aws.plan(Endpoint.none)
    shape = [(p.entry, p.layer, p.experts, p.memory_mb, p.replicas) for p in aws.contents(plan).functions]
    assert [(p.entry, p.layer, p.experts, p.memory_mb, p.replicas) for p in expected(plan).functions] == shape
    assert not expected(plan).known and aws.contents(plan).known
