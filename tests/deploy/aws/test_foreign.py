"""Stacks, buckets and objects that have the names of a deployment's and that remoe did not make."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.errors import DeployError, UsageError
from tests.support.aws_deployments import a_plan, deploy, destroy, keys, stands

TEMPLATE = {"Resources": {"Mine": {"Type": "AWS::SNS::Topic", "Properties": {}}}}


def bucket_of(account: Account, name: str) -> Bucket:
    return Bucket(account, names.bucket(name, account.id, account.region))


def test_an_object_of_the_users_stays_and_the_bucket_with_it(account: Account) -> None:
    deploy(account, "mine", a_plan())
    bucket = bucket_of(account, "mine")
    bucket.client.put_object(Bucket=bucket.name, Key="thesis.tex", Body=b"years of work")
    # Another plan, after which what the first one left is deleted.
    before = keys(account, "mine")
    deploy(account, "mine", a_plan(memory_mb=1024))
    assert "thesis.tex" in keys(account, "mine") and before - keys(account, "mine")
    document = destroy(account, "mine")
    assert document["kept"] == [f"s3://{bucket.name}/thesis.tex"] and document["left"] == []
    assert keys(account, "mine") == {"thesis.tex"} and bucket.read("thesis.tex") == b"years of work"
    assert stands(account, "mine") == {"buckets": [bucket.name]} and bucket.tags() == {}
    # It is not remoe's any more.
    for action in (lambda: deploy(account, "mine", a_plan()), lambda: destroy(account, "mine")):
        with pytest.raises(UsageError, match=r"holds objects that remoe did not make, such as thesis\.tex\."):
            action()
    assert keys(account, "mine") == {"thesis.tex"} and bucket.tags() == {}
    bucket.delete(["thesis.tex"])
    bucket.client.delete_bucket(Bucket=bucket.name)


def test_a_bucket_of_the_users_is_left_as_it_is(account: Account, calls: list[str]) -> None:
    bucket = bucket_of(account, "theirs")
    bucket.client.create_bucket(Bucket=bucket.name)
    bucket.client.put_object(Bucket=bucket.name, Key="thesis.tex", Body=b"years of work")
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=policy)
    calls.clear()
    actions: tuple[Callable[[], Any], ...] = (lambda: deploy(account, "theirs", a_plan()), lambda: destroy(account, "theirs"))
    for action in actions:
        with pytest.raises(UsageError, match="holds objects that remoe did not make"):
            action()
    assert not [call for call in calls if call.startswith(("Put", "Delete", "Create", "Tag"))]
    assert bucket.client.get_bucket_policy(Bucket=bucket.name)["Policy"] == policy
    bucket.delete(["thesis.tex"])
    # Empty and without a tag, it may be one that remoe began to make.
    deploy(account, "theirs", a_plan())
    assert destroy(account, "theirs")["kept"] == [] and stands(account, "theirs") == {}


def test_a_stack_of_the_users_is_left_as_it_is(account: Account) -> None:
    client = account.client("cloudformation")
    client.create_stack(StackName="remoe-stack", TemplateBody=json.dumps(TEMPLATE))
    actions: tuple[Callable[[], Any], ...] = (lambda: deploy(account, "stack", a_plan()), lambda: destroy(account, "stack"))
    for action in actions:
        with pytest.raises((UsageError, DeployError), match="The stack remoe-stack has no tag remoe:deployment: remoe did not make it"):
            action()
    assert client.describe_stacks(StackName="remoe-stack")["Stacks"][0]["StackStatus"] == "CREATE_COMPLETE"
    assert stands(account, "stack") == {"stacks": ["remoe-stack"]}
    client.delete_stack(StackName="remoe-stack")
