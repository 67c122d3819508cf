"""Make the CloudFormation templates of a deployment from plan, contents and settings. Pure.

The templates know no account, no region and no credentials. The bucket is not in them, because it must hold what they refer to before the
stack is made (storage.py). Resources that CloudFormation can only replace (roles, models, endpoint configurations, policies) have no names
of their own, so that the new one can exist beside the old one. Functions have names, which the main function calls.

One template holds 500 resources. Above that, functions go to nested stacks by their layer, so that no plan of a model moves a function from
one nested stack to another: its name cannot be in two stacks at once. For the same reason a deployment of one template cannot be updated to
nested stacks, nor back (`Templates.nested` tells which it is).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remoe_cli import artifacts
from remoe_cli.deploy.account_rules import RECORD
from remoe_cli.deploy.aws import functions, main_function, names
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents
from remoe_cli.deploy.aws.functions import DELETE, Resource, plan_sha256, tags
from remoe_cli.deploy.aws.names import REGION
from remoe_cli.deploy.aws.policies import SUFFIX, sub
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError
from remoe_cli.plan.document import Plan

LAYERS_PER_STACK = 8

Template = dict[str, Any]


@dataclass(frozen=True)
class Templates:
    """The template of the stack, and those of its nested stacks by their logical ids."""

    root: Template
    nested: Mapping[str, Template]

    @property
    def bodies(self) -> dict[str, bytes]:
        """Return what the bucket must hold before the stack is made, by key: nested templates, then the root."""
        return {key(template): body(template) for template in (*self.nested.values(), self.root)}


def body(template: Template) -> bytes:
    return json.dumps(template, separators=(",", ":")).encode()


def key(template: Template) -> str:
    """Return a template's key in the bucket."""
    return names.template_key(artifacts.sha256_bytes(body(template)))


def templates(plan: Plan, contents: Contents, settings: AwsSettings) -> Templates:
    """Make the templates.

    Raises: UsageError when the main function cannot run on this kind of endpoint, or there is nothing to deploy.
    """
    names.check_name(settings.name)
    if settings.endpoint is Endpoint.none and not contents.functions:
        unsold = endpoint_of(plan.main.name) is Endpoint.none
        main = f"its main function, {plan.main.name}, is on no AWS platform" if unsold else "--endpoint none leaves its main function out"
        raise UsageError(
            f"Nothing of this plan runs on AWS: all its experts are local, and {main}.",
            "Plan with --catalog aws-us-east-1, or deploy it on this machine: leave --target aws out.",
        )
    served = functions.served_at_once(plan, contents, settings)
    experts = {function: functions.expert_function(plan, function, contents, settings, served) for function in contents.functions}
    root = _root(plan, contents, settings, {id: resource for made in experts.values() for id, resource in made.items()})
    if len(root["Resources"]) <= aws_reference().stack.resources:
        return Templates(root, {})
    nested: dict[str, Template] = {}
    for function, made in experts.items():
        first = function.layer // LAYERS_PER_STACK * LAYERS_PER_STACK
        stack = f"Layers{first:03d}To{first + LAYERS_PER_STACK - 1:03d}"
        nested.setdefault(stack, _template(settings.name, {}))["Resources"] |= made
    return Templates(_root(plan, contents, settings, {id: _nested_stack(made, settings) for id, made in nested.items()}), nested)


def _root(plan: Plan, contents: Contents, settings: AwsSettings, experts: dict[str, Resource]) -> Template:
    """Make the root template. The main function comes last, so that a failure before it costs no instance."""
    after = [id for id, made in experts.items() if made["Type"] in ("AWS::Lambda::Alias", "AWS::CloudFormation::Stack")]
    main = main_function.resources(plan, contents, settings, after)
    made = _template(settings.name, experts | main | _budget(settings), _outputs(plan, contents, settings))
    return made | ({"Metadata": {RECORD: settings.rules.document}} if settings.rules.document else {})


def _template(name: str, resources: dict[str, Resource], outputs: dict[str, Any] | None = None) -> Template:
    template = {"AWSTemplateFormatVersion": "2010-09-09", "Description": f"remoe: {name}", "Resources": resources}
    return template | ({"Outputs": outputs} if outputs else {})


def _nested_stack(template: Template, settings: AwsSettings) -> Resource:
    url = sub(f"https://{settings.bucket}.s3.{REGION}.{SUFFIX}/{settings.key(key(template))}")
    return {"Type": "AWS::CloudFormation::Stack", **DELETE, "Properties": {"TemplateURL": url, "Tags": tags(settings)}}


def _budget(settings: AwsSettings) -> dict[str, Resource]:
    if settings.monthly_alert_usd is None:
        return {}
    alarm = {"NotificationType": "ACTUAL", "ComparisonOperator": "GREATER_THAN", "Threshold": 100, "ThresholdType": "PERCENTAGE"}
    reader = {"SubscriptionType": "EMAIL", "Address": settings.alert_email}
    budget = {
        "BudgetType": "COST",
        "TimeUnit": "MONTHLY",
        "BudgetLimit": {"Amount": settings.monthly_alert_usd, "Unit": "USD"},
        "CostFilters": {"TagKeyValue": [f"user:{names.DEPLOYMENT_TAG}${settings.name}"]},
    }
    notifications = [{"Notification": alarm, "Subscribers": [reader]}] if settings.alert_email else []
    properties = {"Budget": budget, "NotificationsWithSubscribers": notifications, "ResourceTags": tags(settings)}
    return {"Budget": {"Type": "AWS::Budgets::Budget", "Properties": properties}}


def _outputs(plan: Plan, contents: Contents, settings: AwsSettings) -> dict[str, Any]:
    outputs: dict[str, tuple[str, Any]] = {
        "Bucket": ("Weights, code and templates", sub(settings.bucket)),
        "Plan": ("sha256 of the plan", plan_sha256(plan)),
        "Functions": ("Number of expert functions", str(len(contents.functions))),
        "EndpointKind": ("Where the main function runs", settings.endpoint.value),
    }
    match settings.endpoint:
        case Endpoint.none:
            outputs["CallerPolicy"] = ("Attach this to who runs the main function", {"Ref": "Caller"})
        case Endpoint.aws_lambda | Endpoint.lambda_gpu:
            outputs["Endpoint"] = ("What to invoke", names.invoked(names.main(settings.name)))
        case Endpoint.sagemaker:
            outputs["Endpoint"] = ("What to invoke", names.main(settings.name))
    return {name: {"Description": description, "Value": value} for name, (description, value) in outputs.items()}
