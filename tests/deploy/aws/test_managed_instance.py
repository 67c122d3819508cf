"""A main function on a GPU instance that scales to zero: its template, what is refused, what it costs, and how it is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from remoe_cli.artifacts import write_json
from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import access, checks, managed_instance, preview, quotas, status
from remoe_cli.deploy.aws.money import bill
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.aws.target import AwsTarget
from remoe_cli.deploy.aws.template import templates
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.package import locks
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import MainKind
from remoe_cli.runtime import client
from tests.support import aws
from tests.support.aws_deployments import a_plan, deploy, destroy, stands

AWS = read_catalog("aws-us-east-1")
ZERO = [spec for spec in AWS.main.menu if spec.scales_to_zero]
NETWORK = AccountRules(subnets=("subnet-0123456789abcdef0", "subnet-0123456789abcdef1"), security_groups=("sg-0123456789abcdef0",))


def made(rules: AccountRules = NETWORK, **update: Any) -> dict[str, Any]:
    """Properties of the resources, by logical id; a version's id has no digest."""
    plan = aws.plan(Endpoint.lambda_gpu, **update)
    root = templates(plan, aws.contents(plan), aws.settings(Endpoint.lambda_gpu, rules=rules)).root
    return {"MainVersion" if id.startswith("MainVersion") else id: r["Properties"] for id, r in root["Resources"].items()}


def filled(value: Any) -> Any:
    """A template's value as an API call would have it."""
    match value:
        case {"Fn::GetAtt": [str(id), "Arn"]}:
            kind = "capacity-provider:p" if id == managed_instance.PROVIDER else "role/r"
            return f"arn:aws:{'lambda:eu-west-1' if 'provider' in kind else 'iam:'}:123456789012:{kind}"
        case {"Fn::Sub": str(text)}:
            return text
        case dict():
            return {key: filled(item) for key, item in value.items()}
    return [filled(item) for item in value] if isinstance(value, list) else value


def test_lambdas_api_knows_every_property() -> None:
    """CloudFormation's properties are those of these calls; botocore checks names, types and ranges."""
    resources, service = made(), botocore.session.get_session().get_service_model("lambda")
    function, provider = filled(resources["Main"]), filled(resources["MainProvider"])
    function["Tags"], provider["Tags"] = ({tag["Key"]: tag["Value"] for tag in each["Tags"]} for each in (function, provider))
    spread = provider["PropagateTags"]
    spread["ExplicitTags"] = {tag["Key"]: tag["Value"] for tag in spread["ExplicitTags"]}
    version = {"FunctionName": "f", "Qualifier": "1", "FunctionScalingConfig": resources["MainVersion"]["FunctionScalingConfig"]}
    calls = {
        "CreateFunction": function,
        "CreateCapacityProvider": provider | {"CapacityProviderName": "p"},
        "PutFunctionScalingConfig": version,
    }
    for operation, given in calls.items():
        report = ParamValidator().validate(given, service.operation_model(operation).input_shape)
        assert not report.has_errors(), report.generate_report()


def test_it_rests_at_zero_and_never_has_more_than_the_plan() -> None:
    resources = made(instances=2)
    assert resources["MainVersion"]["FunctionScalingConfig"] == {"MinExecutionEnvironments": 0, "MaxExecutionEnvironments": 2}
    # Three environments of a version that is published, of 4 vCPUs each; more for more instances.
    scaling = [made(instances=n)["MainProvider"]["CapacityProviderScalingConfig"]["MaxVCpuCount"] for n in (1, 3, 5)]
    assert scaling == [12, 12, 20]
    assert "ReservedConcurrentExecutions" not in resources["Main"] and resources["Main"]["Architectures"] == ["x86_64"]


@pytest.mark.parametrize("spec", ZERO, ids=lambda spec: spec.name)
def test_every_instance_of_the_catalog_is_one_that_lambda_takes(spec: Any) -> None:
    resources = made(main=spec)
    managed = resources["Main"]["CapacityProviderConfig"]["LambdaManagedInstancesCapacityProviderConfig"]
    assert managed["ExecutionEnvironmentMemoryGiBPerVCpu"] in (2, 4, 8) and managed["PerExecutionEnvironmentMaxConcurrency"] == 1
    assert resources["Main"]["AcceleratorConfig"]["AcceleratorMemorySize"] == (48 if "g6e" in spec.name else 24)
    assert resources["MainProvider"]["InstanceRequirements"]["AllowedInstanceTypes"] == [spec.name.removeprefix("lambda-gpu.")]
    host_gib = resources["MainProvider"]["CapacityProviderScalingConfig"]["MaxVCpuCount"] / 3 * (8 if "g6e" in spec.name else 4)
    assert resources["Main"]["MemorySize"] < host_gib * 1024  # the host needs some too
    assert endpoint_of(spec.name) is Endpoint.lambda_gpu


def test_the_instance_is_in_the_vpc_and_the_function_by_it() -> None:
    key = "arn:aws:kms:us-east-1:123456789012:key/1"
    resources = made(replace(NETWORK, kms_key=key))
    assert resources["MainProvider"]["KmsKeyArn"] == resources["Main"]["KmsKeyArn"] == key
    assert resources["MainProvider"]["VpcConfig"] == {"SubnetIds": list(NETWORK.subnets), "SecurityGroupIds": list(NETWORK.security_groups)}
    assert "VpcConfig" not in resources["Main"] and "VpcConfig" in resources["Layer001"]
    statements = resources["MainRole"]["Policies"][0]["PolicyDocument"]["Statement"]
    assert "JoinNetwork" not in {statement["Sid"] for statement in statements}
    assert resources["MainProvider"]["PropagateTags"]["ExplicitTags"] == [{"Key": "remoe:deployment", "Value": "tiny"}]


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ({"name": "lambda-gpu.g4dn.xlarge"}, "lambda-gpu.g4dn.xlarge is no instance that AWS names"),
        ({"name": "ml.g6.xlarge", "scales_to_zero": False}, "ml.g6.xlarge is no instance that AWS names"),
        ({"gpu_memory_mb": 20 * 1024}, "3, 6, 12, 16, 24, 48 GB of GPU memory, and lambda-gpu.g6.xlarge has 20"),
    ],
)
def test_instances_that_aws_does_not_name_are_refused(main: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(main=aws.MAINS[Endpoint.lambda_gpu].model_copy(update=main))


def test_an_image_that_the_hosts_may_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made() and locks.cuda_of_image() == "13.0"
    monkeypatch.setattr(locks, "cuda_of_image", lambda: "13.2")
    with pytest.raises(UsageError, match=r"needs CUDA 13\.2, and AWS's own images for such functions have 13\.0"):
        made()


def test_what_needs_no_account_is_checked_first() -> None:
    settings = AwsSettings("tiny", "x86_64", "3.13", Endpoint.lambda_gpu)
    with pytest.raises(UsageError, match="no subnet is named") as refused:
        managed_instance.require_network(settings)
    assert "--subnet ID and --security-group ID" in refused.value.hint
    assert "give --subnet and --security-group" in checks.remarks(settings)[0]
    assert "interface endpoint for CloudWatch Logs" in checks.remarks(replace(settings, rules=NETWORK))[0]
    checks.check_region(settings, "us-east-1")
    with pytest.raises(UsageError, match="no instances in me-south-1"):
        checks.check_region(settings, "me-south-1")
    with pytest.raises(UsageError, match="no instance of Lambda with a GPU"):
        LocalTarget(SILENT).deploy(Path("none"), "n", DeployOptions(endpoint=Endpoint.lambda_gpu))


def test_its_quotas() -> None:
    plan = aws.plan(Endpoint.lambda_gpu)
    contents, settings = aws.contents(plan), aws.settings(Endpoint.lambda_gpu)
    rows = {row.name: row for row in quotas.check(plan, contents, settings)}
    assert (rows["vCPUs of GPU instances"].used, rows["vCPUs of GPU instances"].severity) == (12, "note")
    assert "'Running On-Demand G and VT instances'" in rows["vCPUs of GPU instances"].hint
    assert rows["memory of the main function"].limit == 32768 and rows["/tmp of the main function"].used == 2048 + 256
    large = {row.name: row for row in quotas.check(plan, replace(contents, main_bytes=10 << 30), settings)}
    assert large["/tmp of the main function"].severity == "error"


def test_its_money_at_rest_while_up_and_in_a_month() -> None:
    plan = aws.plan(Endpoint.lambda_gpu)
    contents, settings = aws.contents(plan), aws.settings(Endpoint.lambda_gpu)
    money = bill(plan, AWS, contents, settings)
    (main,) = [line for line in money.lines if line.resource == "Main"]
    assert (main.idle_usd_per_month, main.usd_per_month) == (0.0, pytest.approx(0.01 * 20 * 730))
    assert (
        main.note == "$0.9255 an hour while it is up, nothing at rest: up 99.0% of the time at 20 requests an hour, 1.0% of which wake it."
    )
    assert f"The main function costs {main.note}" in money.notes  # which people see
    # At rest only what is stored costs anything: no instance.
    assert {line.what.partition(",")[0] for line in money.lines if line.idle_usd_per_month} == {"S3", "image in ECR"}


def test_a_dry_run_shows_the_kinds_beside_each_other(tmp_path: Path) -> None:
    figures = {"ttft_s": 1.0, "tpot_s": 0.1, "instances": 1, "remote_experts": 3, "cold_start_s": 5.0}
    kinds = [
        {"kind": kind, "spec": spec, "cost_usd_per_request": usd, **figures}
        for kind, spec, usd in ((MainKind.BY_USE, "lambda-3072", 0.03), (MainKind.TO_ZERO, "lambda-gpu.g6.xlarge", 0.011))
    ]
    plan = aws.plan(Endpoint.lambda_gpu)
    plan = type(plan).model_validate(plan.model_dump() | {"kinds": kinds, "catalog": AWS.file.model_dump()})
    (table,) = preview.kinds_table(plan)
    assert table.title.endswith("at 20 requests an hour")
    assert [row[:3] for row in table.rows] == [
        ("paid by use", "lambda-3072", "$438"),
        ("scaled to zero between requests, this plan", "lambda-gpu.g6.xlarge", "$161"),
    ]
    assert preview.kinds_table(aws.plan(Endpoint.sagemaker)) == ()
    write_json(tmp_path / "p.json", plan)

    def none() -> Any:
        raise AssertionError("a dry run without options of the account asks for none")

    document, overview = AwsTarget(none, SILENT).preview(tmp_path / "p.json", "tiny", DeployOptions())
    assert [one["kind"] for one in document["kinds"]] == ["by-use", "scales-to-zero"]
    assert any(row["type"] == "AWS::Lambda::CapacityProvider" for row in document["resources"])
    assert table in overview.tables and any("give --subnet and --security-group" in remark for remark in overview.remarks)


class Refusing:
    """A Lambda client that keeps what it was asked, and answers or refuses."""

    def __init__(self, code: str | None = None) -> None:
        self.code, self.asked = code, list[dict[str, Any]]()

    def invoke_with_response_stream(self, **given: Any) -> dict[str, Any]:
        return self.invoke(**given)

    def invoke(self, **given: Any) -> dict[str, Any]:
        self.asked.append(given)
        if self.code is not None:
            raise ClientError({"Error": {"Code": self.code, "Message": "none"}}, "Invoke")
        return {"Payload": _Stream(json.dumps({"text": "hi", "tokens": 1}).encode())}


class _Stream:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, size: int | None = None) -> bytes:
        content, self._content = self._content, b""
        return content


@pytest.mark.parametrize("code", ["TooManyRequestsException", "ResourceNotReadyException", "ServiceException"])
def test_a_request_that_finds_it_asleep_is_told_so(code: str) -> None:
    with pytest.raises(DeployError, match=rf"function f is being woken or is busy, or AWS has no such instance now \({code}\)") as told:
        client.answer(client.LambdaMain("f", Refusing(code), scales_to_zero=True), "w1", 4, print)
    assert "Waking takes minutes" in told.value.hint
    with pytest.raises(DeployError) as other:
        client.answer(client.LambdaMain("f", Refusing(code)), "w1", 4, print)
    assert "woken" not in other.value.message


def test_the_end_of_its_log_is_not_asked_for() -> None:
    for sleeps in (True, False):
        refusing = Refusing("AccessDenied")
        with pytest.raises(DeployError):
            client.answer(client.LambdaMain("f", refusing, scales_to_zero=sleeps), "w1", 4, print)
        assert ("LogType" in refusing.asked[0]) is not sleeps


def test_it_is_deployed_seen_and_destroyed(account: Account) -> None:
    """From nothing to nothing on moto's server, whose capacity provider launches nothing."""
    plan = a_plan(main=aws.MAINS[Endpoint.lambda_gpu])
    first = deploy(account, "zero", plan, Endpoint.lambda_gpu, rules=NETWORK)
    assert first["state"] == "running" and first["endpoint"] == "zero-main:live"
    assert first["main"] == {"kind": "lambda-gpu", "name": "zero-main", "state": "Active"}
    assert [f["name"] for f in first["functions"]] == ["zero-layer-000", "zero-layer-001"]
    assert {"AWS::Lambda::CapacityProvider", "AWS::Lambda::Alias"} <= {change["kind"] for change in first["changes"]}
    assert set(status.logs(account, "zero", None, 5)) == {"zero-layer-000", "zero-layer-001", "main"}
    address = access.main_address(account, "zero")
    assert isinstance(address, client.LambdaMain) and (address.function, address.scales_to_zero) == ("zero-main:live", True)
    assert deploy(account, "zero", plan, Endpoint.lambda_gpu)["changes"] == []  # its network is recorded
    larger = plan.main.model_copy(update={"name": "lambda-gpu.g6.2xlarge", "memory_mb": 28672, "vcpus": 7.0})
    changed = deploy(account, "zero", plan.model_copy(update={"main": larger}), Endpoint.lambda_gpu)["changes"]
    assert {"Main", "MainProvider"} <= {change["name"] for change in changed} and "Layer001" not in {change["name"] for change in changed}
    assert destroy(account, "zero")["left"] == [] and stands(account, "zero") == {}
