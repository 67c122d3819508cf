"""Templates for AWS as cfn-lint sees them, with the real resource schemas and its rules for IAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remoe_cli import artifacts
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.aws.template import templates
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import RemoeError
from remoe_cli.plan.document import Plan
from tests.deploy.aws.test_template import tiny
from tests.support import aws
from tests.support.linted import complaints, thin
from tests.support.paths import PLANS


@pytest.mark.parametrize("endpoint", Endpoint)
def test_cfn_lint_takes_every_kind(endpoint: Endpoint) -> None:
    assert complaints(thin(tiny(endpoint, monthly_alert_usd=20.0, alert_email="owner@example.org").root)) == []


def shape(value: Any) -> Any:
    """A resource without the strings and numbers that differ from function to function."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


@pytest.mark.sweep
@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_cfn_lint_takes_every_plan(file: Path) -> None:
    plan = artifacts.read_json(file, Plan)
    contents, endpoint = expected(plan), endpoint_of(plan.main.name)
    settings = AwsSettings("example", "x86_64", "3.13", endpoint)
    if endpoint is Endpoint.none and not contents.functions:
        with pytest.raises(RemoeError, match="Nothing of this plan"):
            templates(plan, contents, settings)
        return
    made = templates(plan, contents, settings)
    by_kind: dict[str, list[Any]] = {}
    for template in aws.each(made):
        for id, resource in template["Resources"].items():
            if id.startswith("Layer") and resource["Type"] != "AWS::CloudFormation::Stack":
                by_kind.setdefault(resource["Type"], []).append(shape(resource))
    assert all(shape == shapes[0] for shapes in by_kind.values() for shape in shapes)
    for template in (made.root, *list(made.nested.values())[:1]):
        assert complaints(thin(template)) == []
