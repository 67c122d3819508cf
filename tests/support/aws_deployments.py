"""Deployments on moto's server without a model: plans of two functions, and what stands of them."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from typing import Any

from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import deployment, names, status, template
from remoe_cli.deploy.aws.contents import Contents, ExpertFunction
from remoe_cli.deploy.aws.objects import Object, object_of
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.plan.document import LayerPlan, MainSpec, Plan
from tests.support import aws_account as aws
from tests.support.synthetic import plan_by_hand

GPU = MainSpec(name="ml.g4dn.xlarge", memory_mb=16384, gpu_memory_mb=16384, usd_per_hour=0.7)
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/remoe:1"
NOT_AT_MOTO = GPU.model_copy(update={"name": "ml.g6.xlarge"})  # nor in some regions
MANIFEST = object_of(names.main_manifest_key("a" * 64), b"{}")


def a_plan(memory_mb: int = 512, **update: Any) -> Plan:
    layers = tuple(LayerPlan(layer=layer, remote=(1, 2), memory_mb=memory_mb if layer else 512, replicas=1) for layer in range(2))
    return plan_by_hand(layers, **update)


def made(name: str, plan: Plan, endpoint: Endpoint = Endpoint.none, rules: AccountRules | None = None) -> tuple[Templates, list[Object]]:
    """Templates and objects of a plan as if it had been packaged."""
    code = object_of(names.code_key("c" * 64), _zip())
    contents, objects = [], [code, MANIFEST]
    for layer in plan.layers:
        entry = f"layer-{layer.layer:03d}"
        shard = object_of("", f"shard of {entry}".encode())
        shard = replace(shard, key=names.shard_key(entry, shard.sha256))
        objects.append(shard)
        part = ExpertFunction(
            entry,
            layer.layer,
            layer.remote,
            layer.memory_mb,
            layer.replicas,
            layer.timeout_s,
            shard.size_bytes,
            shard.sha256,
            10,
            "b" * 64,
        )
        contents.append(part)
    whole = Contents(tuple(contents), code.size_bytes, code.size_bytes, 2, "c" * 64, "a" * 64)
    image = None if endpoint is Endpoint.none else IMAGE
    settings = AwsSettings(name, "x86_64", "3.13", endpoint, image, rules=rules or AccountRules())
    return template.templates(plan, whole, settings), objects


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("function/handler.py"), "def handle(event, context): ...")
    return buffer.getvalue()


def deploy(account: Account, name: str, plan: Plan, endpoint: Endpoint = Endpoint.none, *more: Object, **how: Any) -> dict[str, Any]:
    rules = how.pop("rules", AccountRules()).over(deployment.recorded_rules(account, name))
    templates, objects = made(name, plan, endpoint, rules)
    return deployment.apply(account, name, templates, [*objects, *more], replace(SILENT, **how))


def destroy(account: Account, name: str) -> dict[str, Any]:
    return deployment.destroy(account, name, SILENT)


def stands(account: Account, name: str) -> dict[str, Any]:
    """Everything of a deployment's name that there is, whoever made it."""
    client = account.client
    roles = aws.pages(client("iam"), "list_roles", "Roles")
    found: dict[str, Any] = {
        "functions": [f["FunctionName"] for f in aws.pages(client("lambda"), "list_functions", "Functions")],
        "log groups": [g["logGroupName"] for g in aws.pages(client("logs"), "describe_log_groups", "logGroups")],
        "roles": [role["RoleName"] for role in roles],
        "buckets": [bucket["Name"] for bucket in client("s3").list_buckets()["Buckets"]],
        "stacks": [s["StackName"] for s in aws.pages(client("cloudformation"), "describe_stacks", "Stacks")],
        "tagged": status.tagged(account, name),
    }
    return {kind: mine for kind, some in found.items() if (mine := [each for each in some if f"{name}-" in f"{each}-"])}


def keys(account: Account, name: str) -> set[str]:
    pages = aws.pages(account.client("s3"), "list_objects_v2", "Contents", Bucket=f"remoe-{name}-{account.id}-us-east-1")
    return {each["Key"] for each in pages}


def needed(name: str, plan: Plan, *more: Object) -> set[str]:
    templates, objects = made(name, plan)
    return {*templates.bodies, *(each.key for each in (*objects, *more))}
