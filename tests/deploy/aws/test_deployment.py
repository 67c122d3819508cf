"""A deployment on AWS from nothing to nothing, against moto's server: what is called, what stands, and what goes on after what."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest

from remoe_cli.deploy.aws import deployment, functions, names, status, storage, template
from remoe_cli.deploy.aws.objects import object_of
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.console import NO_OVERVIEW, SILENT, Overview
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import DeployError, HeldError, PartialDeployError
from remoe_cli.progress import Report
from tests.support import aws_account as aws
from tests.support.aws_deployments import GPU, NOT_AT_MOTO, a_plan, deploy, destroy, made, stands

GO_BUCKET = "go-on"  # see tests/support/moto_server.py, which waits for it in the stack of the deployment "slow"


def test_a_plan_is_deployed_changed_and_destroyed(account: Account, calls: list[str]) -> None:
    first = deploy(account, "whole", a_plan())
    assert first["state"] == "running" and first["plan"] == functions.plan_sha256(a_plan())
    assert [f["name"] for f in first["functions"]] == ["whole-layer-000", "whole-layer-001"]
    assert all(f["memory_mb"] == 512 and f["drift"] == [] for f in first["functions"])
    assert account.caller in first["by"] and len(first["changes"]) == 11
    there = aws.pages(account.client("s3"), "list_objects_v2", "Contents", Bucket=f"remoe-whole-{account.id}-us-east-1")
    assert sorted(key["Key"].partition("/")[0] for key in there) == ["code", "functions", "functions", "main", "templates"]

    # Again: nothing is changed by any call.
    calls.clear()
    again = deploy(account, "whole", a_plan(), agree=lambda question, overview: pytest.fail("asked, though nothing is to be done"))
    assert again == {**first, "changes": []}
    assert aws.changing(calls) == [] and 0 < len(calls) < 20

    # Another plan: one function with its version and alias, and what names the plan.
    calls.clear()
    changed = deploy(account, "whole", a_plan(memory_mb=1024))
    version = [change["name"].partition("Version")[0] for change in changed["changes"] if change["kind"] == "AWS::Lambda::Version"]
    assert version == ["Layer001", "Layer001"]
    assert {change["name"] for change in changed["changes"] if change["action"] == "Modify"} == {"Layer001", "Layer001Alias"}
    assert [f["memory_mb"] for f in changed["functions"]] == [512, 1024]
    live = [account.client("lambda").get_alias(FunctionName=f["name"], Name="live")["FunctionVersion"] for f in changed["functions"]]
    assert live == ["1", "2"]
    assert calls.count("PutObject") == 2  # the template and the lock
    # CloudFormation has deleted the version that the alias named before: nothing can read what that one read.
    there = aws.pages(account.client("lambda"), "list_versions_by_function", "Versions", FunctionName="whole-layer-001")
    assert [each["Version"] for each in there] == ["$LATEST", "2"]

    assert destroy(account, "whole")["left"] == []
    assert stands(account, "whole") == {}
    gone = destroy(account, "whole")
    assert (gone["state"], gone["left"], gone["kept"]) == ("absent", [], [])


def test_what_was_changed_by_hand_is_told(account: Account) -> None:
    deploy(account, "drift", a_plan())
    functions_of = account.client("lambda")
    functions_of.update_function_configuration(FunctionName="drift-layer-000", MemorySize=128)
    version = functions_of.publish_version(FunctionName="drift-layer-000")["Version"]
    functions_of.update_alias(FunctionName="drift-layer-000", Name="live", FunctionVersion=version)
    functions_of.delete_function(FunctionName="drift-layer-001")
    first, second = status.read(account, "drift")["functions"]
    assert first["memory_mb"] == 128 and first["drift"] == ["MemorySize is 128, not 512"]
    assert second["state"] == "missing" and second["drift"] == ["it is missing"]
    stray = "/aws/lambda/stray"
    account.client("logs").create_log_group(logGroupName=stray, tags={names.DEPLOYMENT_TAG: "drift"})
    assert status.tagged(account, "drift", gone=["stray", "/aws/lambda", account.id]) == status.tagged(account, "drift")
    assert status.tagged(account, "drift", gone=[stray]) == [arn for arn in status.tagged(account, "drift") if stray not in arn]
    left = destroy(account, "drift")["left"]
    assert len(left) == 1 and left[0].endswith(stray)
    account.client("logs").delete_log_group(logGroupName=stray)


BY_HAND = {"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Action": "s3:GetObject", "Resource": "*"}]}


def test_what_cannot_be_deleted_is_named_and_the_rest_is_gone(account: Account) -> None:
    """Somebody has given a function's role a policy, so IAM does not delete the role."""
    deploy(account, "stuck", a_plan())
    iam = account.client("iam")
    (role,) = (r["RoleName"] for r in aws.pages(iam, "list_roles", "Roles") if "stuck-Layer001Role" in r["RoleName"])
    policy = iam.create_policy(PolicyName="by-hand", PolicyDocument=json.dumps(BY_HAND))["Policy"]["Arn"]
    iam.attach_role_policy(RoleName=role, PolicyArn=policy)
    with pytest.raises(PartialDeployError, match=f"1 resources could not be deleted.*AWS::IAM::Role {role}: ") as error:
        destroy(account, "stuck")
    assert error.value.exit_code == 6
    assert stands(account, "stuck") == {"roles": [role]}
    iam.detach_role_policy(RoleName=role, PolicyArn=policy)
    iam.delete_role(RoleName=role)


def test_a_create_that_fails_is_taken_back_and_made_anew(account: Account) -> None:
    messages: list[str] = []
    gpu = a_plan(main=NOT_AT_MOTO)
    with pytest.raises(DeployError, match=r"MainConfig \(AWS::SageMaker::EndpointConfig\) failed: .*ml.g6.xlarge.* rolled back") as error:
        deploy(account, "fails", gpu, Endpoint.sagemaker, say=messages.append)
    assert error.value.exit_code == 1 and "run the command again" in error.value.hint
    assert status.read(account, "fails")["state"] == "failed"
    assert set(stands(account, "fails")) == {"buckets", "stacks", "tagged"}
    done = deploy(account, "fails", a_plan(main=GPU), Endpoint.sagemaker, say=messages.append)
    assert done["main"] == {"kind": "sagemaker", "name": "fails-main", "state": "InService"}
    assert "removing it first" in "".join(messages)
    # An update that fails leaves what stands.
    with pytest.raises(DeployError, match="is what it was before"):
        deploy(account, "fails", gpu, Endpoint.sagemaker)
    assert deploy(account, "fails", a_plan(main=GPU), Endpoint.sagemaker)["changes"] == []
    destroy(account, "fails")
    assert stands(account, "fails") == {}


def test_no_is_no(account: Account, calls: list[str]) -> None:
    with pytest.raises(DeployError, match="you did not agree"):
        deploy(account, "no", a_plan(), agree=lambda question, overview: False)
    assert stands(account, "no") == {}
    deploy(account, "no", a_plan())
    with pytest.raises(KeyboardInterrupt):
        deploy(account, "no", a_plan(1024), agree=lambda question, overview: (_ for _ in ()).throw(KeyboardInterrupt))
    calls.clear()
    assert deploy(account, "no", a_plan())["changes"] == []
    with pytest.raises(DeployError, match="you did not agree"):
        deployment.destroy(account, "no", replace(SILENT, agree=lambda question, overview=NO_OVERVIEW: False))
    assert status.read(account, "no")["state"] == "running"
    destroy(account, "no")


def test_of_two_who_deploy_one_wins(account: Account, moto_url: str) -> None:
    other = aws.connect()

    def while_the_other_does(question: str, overview: Overview) -> bool:
        deploy(other, "race", a_plan(1024))
        return True

    with pytest.raises(HeldError, match=f"held by {account.caller} on .*, since 20") as error:
        deploy(account, "race", a_plan(), agree=while_the_other_does)
    assert error.value.exit_code == 5
    assert status.read(account, "race")["functions"][1]["memory_mb"] == 1024
    destroy(account, "race")


def test_an_interrupt_leaves_the_operation_running(account: Account) -> None:
    """Who deploys something else meanwhile is told who is at work; who deploys the same follows it."""
    messages: list[str] = []

    def interrupted(title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]:
        if title == "Uploading":
            raise KeyboardInterrupt
        return SILENT.progress(title)

    def interrupt(done: int, total: int | None, what: str = "") -> None:
        if "CREATE_COMPLETE" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(account, "slow", a_plan(), say=messages.append, progress=interrupted)
    assert messages == ["Uploaded files stay. The same command continues; 'remoe destroy slow --target aws' removes it."]
    with pytest.raises(KeyboardInterrupt):
        deploy(account, "slow", a_plan(), say=messages.append, progress=lambda title, *, of_bytes=False: nullcontext(interrupt))
    assert "remoe status slow --target aws" in messages[-1] and "remoe destroy slow --target aws" in messages[-1]
    assert status.read(account, "slow")["state"] == "deploying"
    with pytest.raises(HeldError, match="CREATE_IN_PROGRESS"):
        deploy(account, "slow", a_plan(1024))
    messages.clear()

    def let_it_go(message: str) -> None:
        messages.append(message)
        if "waiting for it to end" in message:
            account.client("s3").create_bucket(Bucket=GO_BUCKET)

    done = deploy(account, "slow", a_plan(), say=let_it_go)
    assert done["state"] == "running" and done["changes"] == [] and "waiting for it to end" in messages[0]
    destroy(account, "slow")
    account.client("s3").delete_bucket(Bucket=GO_BUCKET)


def test_after_kill_9_the_same_command_goes_on(account: Account, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten points, each with a deployment of its own: killed there, deployed again, complete, destroyed without remains."""
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    big = object_of(names.main_file_key("e" * 64, "big"), bytes(5 * 2**20 + 1))
    calls.clear()
    deploy(account, "kill", a_plan(), Endpoint.none, big)
    destroy(account, "kill")
    whole = calls.index("ExecuteChangeSet") + 6  # how often the stack's end is asked for after that depends
    again = ["CreateBucket", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "CreateChangeSet", "ExecuteChangeSet"]
    points = {calls.index(name) + 1 for name in again}
    points |= set(random.Random(9).sample([point for point in range(1, whole) if point not in points], 10 - len(points)))
    answered: list[str] = []

    def kill(name: str) -> None:
        answered.append(name)
        if len(answered) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    victim = aws.connect(on_answer=kill)
    for service in ("s3", "cloudformation", "lambda"):
        victim.client(service)  # made here, but connected only in the child
    for point in sorted(points):
        name = f"kill-{point}"
        answered.clear()
        child = multiprocessing.get_context("fork").Process(target=deploy, args=(victim, name, a_plan(), Endpoint.none, big))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, f"at call {point}"
        calls.clear()
        done = deploy(account, name, a_plan(), Endpoint.none, big)
        assert done["state"] == "running" and [f["state"] for f in done["functions"]] == ["Active", "Active"]
        there = aws.pages(account.client("s3"), "list_objects_v2", "Contents", Bucket=f"remoe-{name}-{account.id}-us-east-1")
        assert len(there) == 6 and big.size_bytes in {each["Size"] for each in there}
        destroy(account, name)
        assert stands(account, name) == {}


def test_nested_stacks(account: Account) -> None:
    """As in `template.templates`, for a plan that is small enough to deploy here."""
    templates, objects = made("nest", a_plan())
    root, nested = dict(templates.root), {}
    resources = dict(root["Resources"])
    for layer in ("Layer000", "Layer001"):
        own = {id: resources.pop(id) for id in list(resources) if id.startswith(layer)}
        nested[f"{layer}Stack"] = template._template("nest", own)
        resources[f"{layer}Stack"] = template._nested_stack(nested[f"{layer}Stack"], AwsSettings("nest", "x86_64", "3.13", Endpoint.none))
    split = Templates({**root, "Resources": resources}, nested)
    messages: list[str] = []
    done = deployment.apply(account, "nest", split, objects, replace(SILENT, say=messages.append))
    assert [f["state"] for f in done["functions"]] == ["Active", "Active"]
    assert deployment.apply(account, "nest", split, objects, SILENT)["changes"] == []
    with pytest.raises(DeployError, match="cannot move between stacks"):
        deployment.apply(account, "nest", templates, objects, SILENT)
    destroy(account, "nest")
    assert stands(account, "nest") == {}
