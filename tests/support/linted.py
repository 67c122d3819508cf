"""What cfn-lint says of a template, with the real resource schemas and its rules for IAM."""

from __future__ import annotations

import json
import re

from cfnlint.config import ConfigMixIn
from cfnlint.decode import decode_str
from cfnlint.runner import Runner
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

from remoe_cli.deploy.aws.template import Template

# CloudFormation's reference has this property since November 2026; the schemas of this cfn-lint are older.
FUNCTION = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", "AWS::Lambda::Function").schema
assert "AcceleratorConfig" not in FUNCTION["properties"], "cfn-lint knows it: delete these lines"
ACCELERATED = {"AcceleratorMemorySize": {"type": "integer", "enum": [3, 6, 12, 16, 24, 48]}}
FUNCTION["properties"]["AcceleratorConfig"] = {
    "type": "object",
    "additionalProperties": False,
    "required": list(ACCELERATED),
    "properties": ACCELERATED,
}
LINTER = Runner(ConfigMixIn(regions=["us-east-1"], include_checks=["I"]))


def complaints(template: Template) -> list[str]:
    decoded, errors = decode_str(json.dumps(template))
    found = errors or LINTER.validate_template(decoded)
    return [f"{match.rule.id} {'/'.join(map(str, match.path))}: {match.message}" for match in found]


def thin(template: Template) -> Template:
    """With the last of its functions alone: linting one takes 0.15 s, and they differ in nothing that it sees."""
    dropped = [id for id, resource in template["Resources"].items() if resource["Type"] == "AWS::Lambda::Function" and id != "Main"][:-1]
    kept = {id: dict(resource) for id, resource in template["Resources"].items() if not _of(id, dropped)}
    for resource in kept.values():
        if "DependsOn" in resource:
            resource["DependsOn"] = [id for id in resource["DependsOn"] if not _of(id, dropped)]
    return template | {"Resources": kept}


def _of(id: str, functions: list[str]) -> bool:
    return re.sub(r"(Role|Log|Alias|Version[0-9a-f]{12})$", "", id) in functions
