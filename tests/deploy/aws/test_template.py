"""Templates for AWS: what they say, that they grant no more than they must, and that real resource schemas take them.

REMOE_WRITE_GOLDEN=1 writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER
from hypothesis import example, given
from hypothesis import settings as hypothesis

from remoe_cli import artifacts
from remoe_cli.deploy.aws import functions, names, policies
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents, expected
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.aws.template import Templates, body, templates
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError
from remoe_cli.package import locks
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import Plan
from tests.support import aws
from tests.support.linted import complaints, thin
from tests.support.paths import PLANS

GOLDEN = Path(__file__).parent / "golden"
PSEUDO = {"AWS::AccountId"}
CHECK = hypothesis(max_examples=20, deadline=None)
MANY = aws.many_functions()
Deployment = tuple[Plan, Contents, AwsSettings]


def tiny(endpoint: Endpoint, **update: Any) -> Templates:
    plan = aws.plan(endpoint)
    return templates(plan, aws.contents(plan), aws.settings(endpoint, **update))


@pytest.mark.parametrize("endpoint", Endpoint)
def test_golden(endpoint: Endpoint) -> None:
    made = tiny(endpoint, monthly_alert_usd=20.0, alert_email="owner@example.org")
    assert not made.nested
    text = json.dumps(made.root, indent=1) + "\n"
    file = GOLDEN / f"{endpoint.value}.json"
    if os.environ.get("REMOE_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), "REMOE_WRITE_GOLDEN=1 writes it anew; look at the difference"


# What any deployment keeps to


@CHECK
@given(aws.deployments())
@example(MANY)
def test_nothing_is_granted_beyond_the_deployment(deployment: Deployment) -> None:
    plan, contents, settings = deployment
    made = templates(plan, contents, settings)
    bucket = f"remoe-{settings.name}-${{AWS::AccountId}}-${{AWS::Region}}/"
    own = rf"arn:\${{AWS::Partition}}:(s3:::{re.escape(bucket)}[a-z0-9/-]+/\*|logs:.*:log-group:/aws/(lambda|sagemaker/Endpoints)/"
    own += rf"{settings.name}-[^*?]*:\*|lambda:.*:function:{settings.name}-layer-[0-9?-]+:live|ecr:eu-west-1:123456789012:repository/remoe)"
    for statement in aws.statements(made):
        assert statement["Effect"] == "Allow" and statement.keys() == {"Sid", "Effect", "Action", "Resource"}
        assert not any("*" in action or "?" in action for action in statement["Action"])
        for resource in statement["Resource"]:
            if resource == "*":
                assert statement["Action"] == ["ecr:GetAuthorizationToken"]
            else:
                assert re.fullmatch(own, resource["Fn::Sub"]), resource
    trusts = [role["Properties"]["AssumeRolePolicyDocument"] for role in aws.of_type(made, "IAM::Role").values()]
    for trust in trusts:
        (statement,) = trust["Statement"]
        assert re.fullmatch(r"(lambda|sagemaker)\.amazonaws\.com", statement["Principal"]["Service"]) and len(statement["Principal"]) == 1
        assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}
    kinds = {resource["Type"] for template in aws.each(made) for resource in template["Resources"].values()}
    assert not kinds & {"AWS::Lambda::Url", "AWS::Lambda::Permission", "AWS::S3::BucketPolicy"}


@CHECK
@given(aws.deployments())
@example(MANY)
def test_every_function_has_a_role_log_version_and_alias_of_its_own(deployment: Deployment) -> None:
    plan, contents, settings = deployment
    made = templates(plan, contents, settings)
    deployed = aws.of_type(made, "Lambda::Function")
    roles = aws.of_type(made, "IAM::Role")
    takers = Counter(function["Properties"]["Role"]["Fn::GetAtt"][0] for function in deployed.values())
    assert set(takers.values()) == {1}
    beside = {Endpoint.sagemaker: {"MainRole"}, Endpoint.lambda_gpu: {"MainOperatorRole"}}  # which no function takes
    assert set(takers) == set(roles) - beside.get(settings.endpoint, set())
    names_of = {id: function["Properties"]["FunctionName"] for id, function in deployed.items()}
    experts = {names.logical_id(function.entry): function for function in contents.functions}
    assert set(experts) == set(deployed) - {"Main"} and len(experts) == len(contents.functions)
    for id, function in experts.items():
        assert names_of[id] == f"{settings.name}-{function.entry}" and len(names_of[id]) <= 64
        variables = deployed[id]["Properties"]["Environment"]["Variables"]
        key = variables["REMOE_SHARD"]["Fn::Sub"].removeprefix("s3://")
        read, log = roles[f"{id}Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
        assert key.endswith(names.shard_key(function.entry, function.shard_sha256)) and "*" not in key
        assert [r["Fn::Sub"] for r in read["Resource"]] == [f"arn:${{AWS::Partition}}:s3:::{key.rpartition('/')[0]}/*"]
        assert [r["Fn::Sub"].split(":log-group:")[1] for r in log["Resource"]] == [f"/aws/lambda/{names_of[id]}:*"]
        assert variables["REMOE_SHARD_HEADER"] == f"{function.head_bytes}:{function.head_sha256}"
    for of, count in Counter(
        version["Properties"]["FunctionName"]["Ref"] for version in aws.of_type(made, "Lambda::Version").values()
    ).items():
        assert count == 1 and of in deployed
    aliases = aws.of_type(made, "Lambda::Alias").values()
    assert sorted(alias["Properties"]["FunctionName"]["Ref"] for alias in aliases) == sorted(deployed)
    groups = [group["Properties"]["LogGroupName"] for group in aws.of_type(made, "Logs::LogGroup").values()]
    assert set(groups) >= {f"/aws/lambda/{name}" for name in names_of.values()} and len(groups) == len(takers) + (
        settings.endpoint is Endpoint.sagemaker
    )


@pytest.mark.parametrize("file", [file for file in PLANS if "aws" in file.stem], ids=lambda file: file.stem)
def test_a_functions_storage_holds_its_shard_and_is_what_the_plan_is_priced_for(file: Path) -> None:
    """With what the catalog says: the cost model is not asked. Most of these plans' functions need more than is free."""
    plan = artifacts.read_json(file, Plan)
    side, contents = read_catalog(plan.catalog.path).function, expected(plan)
    made = aws.of_type(templates(plan, contents, aws.settings(endpoint_of(plan.main.name))), "Lambda::Function")
    fullest = {layer.layer: max(map(len, layer.parts), default=0) for layer in plan.layers}
    for function in contents.functions:
        size_mb = made[names.logical_id(function.entry)]["Properties"]["EphemeralStorage"]["Size"]
        experts_mb = -(-fullest[function.layer] * (plan.model.read_expert_bytes or plan.model.expert_bytes) // 2**20)
        assert size_mb == max(experts_mb + side.storage_spare_mb, side.storage_free_mb)
        assert function.shard_bytes + 2**20 < size_mb * 2**20


def test_a_quantised_plan_stores_what_the_checkpoint_stores() -> None:
    plan = artifacts.read_json(next(file for file in PLANS if "gpt-oss" in file.stem), Plan)
    figures = {"expert_bytes": 49_783_680, "nonexpert_bytes": 3_595_648_128, "read_expert_bytes": None, "read_nonexpert_bytes": None}
    read = {"read_expert_bytes": 13_236_480, "read_nonexpert_bytes": 3_000_000_000}
    dequantised, quantised = (plan.model_copy(update={"model": plan.model.model_copy(update=more)}) for more in (figures, figures | read))
    side, settings = read_catalog(plan.catalog.path).function, aws.settings(endpoint_of(plan.main.name))
    for made, each, rest in ((dequantised, 49_783_680, 3_595_648_128), (quantised, 13_236_480, 3_000_000_000)):
        contents = expected(made)
        template = templates(made, contents, settings)
        functions = aws.of_type(template, "Lambda::Function")
        local = sum(plan.model.experts_per_layer - len(layer.remote) for layer in plan.layers)
        assert contents.main_bytes == rest + local * each
        fullest = {layer.layer: max(map(len, layer.parts), default=0) for layer in plan.layers}
        for function in contents.functions:
            assert function.shard_bytes == len(function.experts) * each
            wanted_mb = -(-fullest[function.layer] * each // 2**20) + side.storage_spare_mb
            size_mb = functions[names.logical_id(function.entry)]["Properties"]["EphemeralStorage"]["Size"]
            assert size_mb == max(wanted_mb, side.storage_free_mb)
        assert complaints(thin(template.root)) == []


def test_functions_are_told_to_compute_from_the_stored_bytes_where_the_plan_says_so() -> None:
    plan = artifacts.read_json(next(file for file in PLANS if "gpt-oss" in file.stem), Plan)
    for packed in (False, True):
        made = plan.model_copy(update={"model": plan.model.model_copy(update={"packed": packed})})
        template = templates(made, expected(made), aws.settings(endpoint_of(plan.main.name)))
        functions = aws.of_type(template, "Lambda::Function")
        told = {
            functions[names.logical_id(f.entry)]["Properties"]["Environment"]["Variables"].get("REMOE_EXPERTS")
            for f in expected(made).functions
        }
        assert told == {"packed" if packed else None}


def test_a_small_functions_storage_is_the_free_part() -> None:
    plan, contents, settings = MANY
    small = aws.of_type(templates(plan, contents, settings), "Lambda::Function").values()
    assert {made["Properties"]["EphemeralStorage"]["Size"] for made in small} == {read_catalog("aws-us-east-1").function.storage_free_mb}


@CHECK
@given(aws.deployments())
@example(MANY)
def test_references_lead_somewhere_and_sizes_are_within_limits(deployment: Deployment) -> None:
    made = templates(*deployment)
    assert made == templates(*deployment) and made.bodies == templates(*deployment).bodies
    for template in aws.each(made):
        ids = set(template["Resources"])
        assert len(ids) <= 500 and len(body(template)) <= 1_000_000
        for found in aws.dictionaries(template):
            if "Ref" in found:
                assert found["Ref"] in ids | PSEUDO
            if "Fn::GetAtt" in found:
                assert found["Fn::GetAtt"][0] in ids
            assert set(found.get("DependsOn", ())) <= ids
            if "Fn::Sub" in found:
                assert set(re.findall(r"\$\{(.*?)\}", found["Fn::Sub"])) <= {
                    f"AWS::{p}" for p in ("AccountId", "Region", "Partition", "URLSuffix")
                }
    assert not re.search(r":\d{12}:|us-east-1", json.dumps(made.root).replace(":123456789012:", ""))
    stacks = aws.of_type(made, "CloudFormation::Stack")
    urls = [stack["Properties"]["TemplateURL"]["Fn::Sub"].partition(".${AWS::URLSuffix}/")[2] for stack in stacks.values()]
    assert list(stacks) == list(made.nested) and urls == list(made.bodies)[:-1]
    # What costs by the hour, or is called by the others, comes last.
    main = made.root["Resources"].get("Main") or made.root["Resources"].get("MainEndpoint")
    if main:
        assert set(main["DependsOn"]) - {"MainLog"} == (set(stacks) or set(aws.of_type(made, "Lambda::Alias")) - {"MainAlias"})


@CHECK
@given(aws.deployments())
@example(MANY)
def test_the_main_function_may_call_these_functions_and_none_of_another_deployment(deployment: Deployment) -> None:
    plan, contents, settings = deployment
    calls = [s["Resource"] for s in aws.statements(templates(plan, contents, settings)) if s["Action"] == ["lambda:InvokeFunction"]]
    assert len(calls) == 1
    allowed = [resource["Fn::Sub"].split(":function:")[1] for resource in calls[0]]
    own = [f"{settings.name}-{function.entry}:live" for function in contents.functions]
    assert all(any(fnmatchcase(function, form) for form in allowed) for function in own)
    others = [
        f"{settings.name}{more}-{function.entry}:live"
        for function in contents.functions
        for more in ("x", "-layer", "-layer-000", "-layer-000-1")
    ]
    others += [f"{settings.name}-main:live", *(function.replace(":live", ":1") for function in own), *(f"x{function}" for function in own)]
    assert not [function for function in others for form in allowed if fnmatchcase(function, form)]
    limit = (
        aws_reference().iam.managed_policy_characters if settings.endpoint is Endpoint.none else aws_reference().iam.role_policy_characters
    )
    for template in aws.of_type(templates(plan, contents, settings), "IAM::Role").values():
        for policy in template["Properties"].get("Policies", ()):
            assert policies.characters(policy["PolicyDocument"]) <= aws_reference().iam.role_policy_characters
    if len(own) < limit // 130:
        assert allowed == sorted(own)


# Versions, stacks, tags


@pytest.mark.parametrize(
    ("change", "published"),
    [
        ({}, False),
        ({"replicas": 3}, False),
        ({"memory_mb": 640}, True),
        ({"shard_sha256": "f" * 64}, True),
        ({"head_sha256": "f" * 64}, True),
    ],
)
def test_a_version_is_published_just_when_something_in_it_changed(change: dict[str, Any], published: bool) -> None:
    plan = aws.plan(Endpoint.none)
    contents, settings = aws.contents(plan), aws.settings(Endpoint.none)
    changed = replace(contents, functions=(replace(contents.functions[0], **change), *contents.functions[1:]))
    before, after = (set(aws.of_type(templates(plan, part, settings), "Lambda::Version")) for part in (contents, changed))
    assert {id[:8] for id in before - after} == {id[:8] for id in after - before} == ({"Layer001"} if published else set())
    new_code = templates(plan, replace(contents, code_sha256="f" * 64), settings)
    assert not before & set(aws.of_type(new_code, "Lambda::Version"))


def test_another_plan_of_the_same_functions_changes_none_of_them() -> None:
    plan = aws.plan(Endpoint.sagemaker)
    other = plan.model_copy(update={"notes": ("another",)})
    contents, settings = aws.contents(plan), aws.settings(Endpoint.sagemaker)
    one, two = (templates(p, contents, settings).root for p in (plan, other))
    changed = {id for id in one["Resources"] if one["Resources"][id] != two["Resources"][id]}
    assert changed == {"MainRole", "MainLog", "MainModel", "MainConfig", "MainEndpoint"}
    assert one["Outputs"]["Plan"]["Value"] != two["Outputs"]["Plan"]["Value"]


def test_the_tag_is_the_digest_of_the_plans_file(tmp_path: Path) -> None:
    plan = aws.plan(Endpoint.aws_lambda)
    artifacts.write_json(tmp_path / "plan.json", plan)
    digest = artifacts.sha256_file(tmp_path / "plan.json")
    assert digest == functions.plan_sha256(plan) == functions.plan_sha256(artifacts.read_json(tmp_path / "plan.json", Plan))
    tags = tiny(Endpoint.aws_lambda).root["Resources"]["Main"]["Properties"]["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"remoe:deployment": "tiny", "remoe:plan": digest}


def test_everything_that_takes_tags_is_tagged() -> None:
    made = [tiny(endpoint, monthly_alert_usd=20.0) for endpoint in Endpoint] + [templates(*MANY)]
    resources = [r for each in made for template in aws.each(each) for r in template["Resources"].values()]
    for kind in {resource["Type"] for resource in resources}:
        tagging = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", kind).schema["tagging"]
        field = tagging.get("tagProperty", "/properties/Tags").rpartition("/")[2]
        tagged = [
            {"Key": "remoe:deployment", "Value": "tiny"} in resource["Properties"].get(field, [])
            for resource in resources
            if resource["Type"] == kind
        ]
        assert tagged == [tagging["taggable"]] * len(tagged), kind


def test_more_functions_than_a_template_holds_are_split_by_layer() -> None:
    made = templates(*MANY)
    assert list(made.nested) == [f"Layers{first:03d}To{first + 7:03d}" for first in range(0, 64, 8)]
    assert [len(t["Resources"]) for t in made.nested.values()] == [5 * 8 * n for n in (5, 8, 8, 8, 8, 8, 8, 5)]
    assert len(aws.of_type(made, "Lambda::Function")) == 464
    # Fewer functions in a layer do not move another layer's.
    stack_of = {id: stack for stack, template in made.nested.items() for id in template["Resources"]}
    for stack, template in templates(*aws.many_functions(owners=7)).nested.items():
        assert all(stack_of[id] == stack for id, r in template["Resources"].items() if r["Type"] == "AWS::Lambda::Alias")


# What cannot be


@pytest.mark.parametrize(
    ("endpoint", "main", "image", "message"),
    [
        (Endpoint.sagemaker, Endpoint.aws_lambda, aws.IMAGE, "lambda-3072 is not a SageMaker instance"),
        (Endpoint.aws_lambda, Endpoint.sagemaker, aws.IMAGE, "ml.g5.xlarge is not a Lambda function"),
        (Endpoint.aws_lambda, Endpoint.aws_lambda, "docker.io/me/remoe:1", "docker.io/me/remoe:1 is not in Amazon ECR"),
    ],
)
def test_endpoints_that_cannot_be(endpoint: Endpoint, main: Endpoint, image: str, message: str) -> None:
    plan = aws.plan(main)
    with pytest.raises(UsageError, match=message):
        templates(plan, aws.contents(plan), aws.settings(endpoint, image_uri=image))


def test_instances_with_a_gpu_have_an_ami_whose_driver_runs_the_images_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of g5 without one is of CUDA 11.4, and the image's torch is built for 13.0."""

    def variant(**update: Any) -> dict[str, Any]:
        plan = aws.plan(Endpoint.sagemaker, main=aws.MAINS[Endpoint.sagemaker].model_copy(update=update))
        made = templates(plan, aws.contents(plan), aws.settings(Endpoint.sagemaker)).root["Resources"]["MainConfig"]
        return dict(made["Properties"]["ProductionVariants"][0])

    shape = botocore.session.get_session().get_service_model("sagemaker").shape_for("ProductionVariant").members["InferenceAmiVersion"]
    ami = variant()["InferenceAmiVersion"]
    described = re.search(rf"<dt>{ami}</dt>.*?CUDA version: ([\d.]+)", shape.documentation)
    assert ami in shape.enum and described is not None and described[1] == locks.cuda_of_image() == "13.0"
    assert "InferenceAmiVersion" not in variant(name="ml.m5.xlarge", gpu_memory_mb=None)
    families = {main.name.rpartition(".")[0] for main in read_catalog("aws-us-east-1").main.menu if main.name.startswith("ml.")}
    assert all(variant(name=f"{family}.xlarge")["InferenceAmiVersion"] == ami for family in families)
    with pytest.raises(UsageError, match=r"needs CUDA 13\.0, and no driver that ml\.p3\.2xlarge can have"):
        variant(name="ml.p3.2xlarge")
    monkeypatch.setattr(locks, "cuda_of_image", lambda: "13.2")
    with pytest.raises(UsageError, match=r"needs CUDA 13\.2"):
        variant()


def test_names_and_plans_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        tiny(Endpoint.none, name="Tiny")
    plan = aws.plan(Endpoint.none, aws.LAYERS[:1])
    with pytest.raises(UsageError, match=rf"Nothing of this plan runs on AWS: .* main function, {plan.main.name}, is on no AWS platform\."):
        templates(plan, aws.contents(plan), aws.settings(Endpoint.none))
    plan = aws.plan(Endpoint.aws_lambda, aws.LAYERS[:1])
    with pytest.raises(UsageError, match=r"--endpoint none leaves its main function out\."):
        templates(plan, aws.contents(plan), aws.settings(Endpoint.none))
