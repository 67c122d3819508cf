"""The CloudFormation resources of expert functions, and what every Lambda function needs. Pure.

Every function has a role, a log group, a version and an alias. template.py puts them into stacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any

from remoe_cli import artifacts, lambda_limits
from remoe_cli.deploy.aws import names, policies
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents, ExpertFunction
from remoe_cli.deploy.aws.policies import sub
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.package.bundle import HANDLER, expert_form
from remoe_cli.plan.document import Plan

Resource = dict[str, Any]
_SPARE_STORAGE_MB = 64  # of /tmp beside experts: the catalog's, as the plan is priced
DELETE = {"DeletionPolicy": "Delete", "UpdateReplacePolicy": "Delete"}  # nothing outlives the deployment


def requests_at_once(plan: Plan) -> int:
    """Return how many requests the plan answers at the same time.

    Each rented instance answers one. Otherwise it is as many as come together at the plan's traffic: the mean and three standard deviations
    of requests that come at random. Where the traffic is unknown, it is one.
    """
    if plan.main.usd_per_hour is not None:
        return plan.instances
    request_s = plan.ttft_s + plan.workload.n_out * plan.tpot_s
    mean = (plan.workload.requests_per_hour or 0.0) * request_s / 3600
    return max(1, ceil(mean + 3 * sqrt(mean)))


def instances_each(contents: Contents, settings: AwsSettings) -> int:
    """Return the instances of all functions that one request may keep busy."""
    return sum(function.replicas for function in contents.functions) + (settings.endpoint is Endpoint.aws_lambda)


def served_at_once(plan: Plan, contents: Contents, settings: AwsSettings) -> int:
    """Return how many of those requests the account's concurrency has room for; 0 when not for one."""
    each = instances_each(contents, settings)
    room = max(0, settings.concurrency - aws_reference().function.concurrency_unreserved)
    return min(requests_at_once(plan), room // max(1, each))


def storage_mb(plan: Plan, function: ExpertFunction) -> int:
    """Return the size of a function's /tmp, to which it fetches its experts.

    All functions of a layer have as much as the fullest needs, as the plan is priced. No plan reaches Lambda's maximum, which equals that
    of memory.
    """
    experts = max(len(group) for layer in plan.layers if layer.layer == function.layer for group in layer.parts)
    fetched_mb = ceil(experts * plan.model.fetched_expert_bytes / 2**20)
    return max(aws_reference().function.storage_least_mb, fetched_mb + _SPARE_STORAGE_MB)


def expert_function(plan: Plan, function: ExpertFunction, contents: Contents, settings: AwsSettings, served: int) -> dict[str, Resource]:
    """Make the resources of an expert function, with replicas for `served` requests at once."""
    shard = names.shard_key(function.entry, function.shard_sha256)
    configuration = {
        "Description": f"{len(function.experts)} experts of layer {function.layer}",
        "Runtime": f"python{settings.python}",
        "Handler": HANDLER,
        "Code": {"S3Bucket": sub(settings.bucket), "S3Key": settings.key(names.code_key(contents.code_sha256))},
        "MemorySize": function.memory_mb,
        "Timeout": function.timeout_s,
        "EphemeralStorage": {"Size": storage_mb(plan, function)},
        "Environment": {
            "Variables": {
                "REMOE_SHARD": object_uri(settings, shard),
                "REMOE_SHARD_HEADER": f"{function.head_bytes}:{function.head_sha256}",
                **expert_form(plan.model.expert_form),
                **lambda_limits.thread_environment(function.memory_mb),
            }
        },
    }
    return lambda_function(
        names.logical_id(function.entry),
        names.function(settings.name, function.entry),
        configuration,
        settings,
        policy=policies.expert(settings, function.entry),
        reserved=function.replicas * served,
        tags=tags(settings),
    )


def lambda_function(
    id: str, name: str, configuration: Mapping[str, Any], settings: AwsSettings, *, policy: Resource, reserved: int, tags: list[Any]
) -> dict[str, Resource]:
    """Make a Lambda function `name` with its role, log group, version and alias.

    `configuration` is what a version freezes. The function never has more than `reserved` instances, so it cannot cost more than they do,
    whatever calls it. An account that cannot reserve (0) has so few instances that they are the limit.
    """
    rules = settings.rules
    versioned = {
        **configuration,
        "Role": {"Fn::GetAtt": [f"{id}Role", "Arn"]},
        "Architectures": [settings.architecture],
        **({"KmsKeyArn": rules.kms_key} if rules.kms_key else {}),
        **({"VpcConfig": {"SubnetIds": list(rules.subnets), "SecurityGroupIds": list(rules.security_groups)}} if rules.subnets else {}),
    }
    # A version is published when there is a new one in the template. Lambda refuses one of what is published already.
    version = f"{id}Version{artifacts.sha256_bytes(json.dumps(versioned, sort_keys=True).encode())[:12]}"
    return {
        f"{id}Role": role("lambda", policy, settings, tags),
        f"{id}Log": log_group(names.log_group(name), settings, tags),
        id: {
            "Type": "AWS::Lambda::Function",
            "DependsOn": [f"{id}Log"],
            "Properties": {
                "FunctionName": name,
                **versioned,
                **({"ReservedConcurrentExecutions": reserved} if reserved else {}),
                "Tags": tags,
            },
        },
        version: {"Type": "AWS::Lambda::Version", "Properties": {"FunctionName": {"Ref": id}}},
        f"{id}Alias": {
            "Type": "AWS::Lambda::Alias",
            "Properties": {"FunctionName": {"Ref": id}, "FunctionVersion": {"Fn::GetAtt": [version, "Version"]}, "Name": names.ALIAS},
        },
    }


def role(service: str, policy: Resource, settings: AwsSettings, tags: list[Any]) -> Resource:
    rules = settings.rules
    return {
        "Type": "AWS::IAM::Role",
        "Properties": {
            **({"Path": rules.role_path} if rules.role_path else {}),
            **({"PermissionsBoundary": rules.permissions_boundary} if rules.permissions_boundary else {}),
            "AssumeRolePolicyDocument": policies.trust(service),
            "Policies": [{"PolicyName": "remoe", "PolicyDocument": policy}],
            "Tags": tags,
        },
    }


def log_group(group: str, settings: AwsSettings, tags: list[Any]) -> Resource:
    return {
        "Type": "AWS::Logs::LogGroup",
        **DELETE,
        "Properties": {
            "LogGroupName": group,
            "RetentionInDays": settings.log_days,
            **({"KmsKeyId": settings.rules.kms_key} if settings.rules.kms_key else {}),
            "Tags": tags,
        },
    }


def object_uri(settings: AwsSettings, key: str) -> Any:
    return sub(f"s3://{settings.bucket}/{settings.key(key)}")


def tags(settings: AwsSettings, plan: Plan | None = None) -> list[dict[str, str]]:
    """Make the tags of a resource: the user's, the deployment's, and with a `plan` the plan's too.

    Only resources that stand for the whole deployment have the plan's tag. On expert functions it would change all of them with every plan.
    """
    pairs = dict(settings.rules.tags) | {names.DEPLOYMENT_TAG: settings.name} | ({names.PLAN_TAG: plan_sha256(plan)} if plan else {})
    return [{"Key": key, "Value": value} for key, value in pairs.items()]


def plan_sha256(plan: Plan) -> str:
    """Return the digest of the plan's file as remoe writes it, by which a tag and an output name it."""
    return artifacts.sha256_bytes(artifacts.json_text(plan).encode())
