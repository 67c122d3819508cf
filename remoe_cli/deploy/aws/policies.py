"""Who may do what, as IAM policy documents. Pure.

Every role may read its own prefix of the deployment's bucket and write its own logs. The main function's role may also call the expert
functions, by their alias only, and read their shards, for when one of them does not answer. No action is a pattern, and only ECR's login
has no resource to name. Account, region and partition are CloudFormation's pseudo parameters, so the documents are the same everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.names import ACCOUNT, REGION
from remoe_cli.deploy.aws.settings import AwsSettings

Document = dict[str, Any]
PARTITION, SUFFIX = "${AWS::Partition}", "${AWS::URLSuffix}"
# The most characters that each may stand for: policies are measured before anybody knows where they go.
_LONGEST = {ACCOUNT: "0" * 12, REGION: "ap-southeast-1", PARTITION: "aws-us-gov"}
_INTERFACE = ("ec2:CreateNetworkInterface", "ec2:DeleteNetworkInterface", "ec2:DescribeNetworkInterfaces", "ec2:DescribeSubnets")
_LAMBDA_IN_VPC = (*_INTERFACE, "ec2:AssignPrivateIpAddresses", "ec2:UnassignPrivateIpAddresses")
_SAGEMAKER_IN_VPC = (
    *(*_INTERFACE, "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterfacePermission"),
    *("ec2:DescribeDhcpOptions", "ec2:DescribeSecurityGroups", "ec2:DescribeVpcs"),
)
_IMAGE = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)(?:[:@].+)?")


def sub(text: str) -> Any:
    """Let CloudFormation fill in the pseudo parameters in `text`, if it has any."""
    return {"Fn::Sub": text} if "${" in text else text


def trust(service: str) -> Document:
    """Let only `service`, on behalf of this account, take the role."""
    return _document(
        {
            "Effect": "Allow",
            "Principal": {"Service": f"{service}.amazonaws.com"},
            "Action": "sts:AssumeRole",
            "Condition": {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}},
        }
    )


def expert(settings: AwsSettings, entry: str) -> Document:
    """Make the policy of an expert function: it reads its shard and writes its log."""
    log = _log(names.log_group(names.function(settings.name, entry)))
    return _document(*_read(settings, f"functions/{entry}"), log, *_network(settings, _LAMBDA_IN_VPC))


def main_function(settings: AwsSettings, entries: Iterable[str], most_characters: int) -> Document:
    """Make the policy of a main function on Lambda: its files, its log, the expert functions `entries`."""
    log = _log(names.log_group(names.main(settings.name)))
    own = (*_read(settings, "main", "functions"), log, *_network(settings, _LAMBDA_IN_VPC))
    return _with_calls(settings.name, entries, most_characters, *own)


def main_endpoint(settings: AwsSettings, entries: Iterable[str], most_characters: int, image: tuple[str, str, str]) -> Document:
    """Make the policy of a main function on SageMaker, which also fetches its `image` by this role.

    `image` is account, region and repository.
    """
    account, region, repository = image
    pull = ("ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer")
    own = (
        *_read(settings, "main", "functions"),
        # SageMaker's agent looks for its log streams, and for the group by making it.
        _log(names.endpoint_log_group(settings.name), "logs:CreateLogGroup", "logs:DescribeLogStreams"),
        _allow("PullImage", pull, _arn("ecr", f"repository/{repository}", region, account)),
        _allow("LogInToRegistry", ("ecr:GetAuthorizationToken",), "*"),
        *_network(settings, _SAGEMAKER_IN_VPC),
    )
    return _with_calls(settings.name, entries, most_characters, *own)


def caller(name: str, entries: Iterable[str], most_characters: int) -> Document:
    """Make the policy of a machine that runs the main function itself."""
    return _with_calls(name, entries, most_characters)


def image_parts(uri: str) -> tuple[str, str, str] | None:
    """Return account, region and repository of an image in ECR; None for an image elsewhere.

    >>> image_parts("123456789012.dkr.ecr.eu-west-1.amazonaws.com/remoe:1")
    ('123456789012', 'eu-west-1', 'remoe')
    """
    found = _IMAGE.fullmatch(uri)
    return (found[1], found[2], found[3]) if found else None


def characters(document: Document) -> int:
    """Count a policy's characters as IAM does: no white space, pseudo parameters at their longest."""
    return len(json.dumps(filled(document), separators=(",", ":")))


def filled(value: Any) -> Any:
    """Fill in a template's pseudo parameters at their longest."""
    match value:
        case {"Fn::Sub": str(text)}:
            for parameter, longest in _LONGEST.items():
                text = text.replace(parameter, longest)
            return text
        case {"Ref": "AWS::AccountId"}:
            return _LONGEST[ACCOUNT]
        case dict():
            return {key: filled(item) for key, item in value.items()}
        case list():
            return [filled(item) for item in value]
    return value


def _with_calls(name: str, entries: Iterable[str], most_characters: int, *own: Document) -> Document:
    """Add the statement that allows calling the expert functions.

    It lists each function, or, where so many do not fit, the forms of their names. A `?` is one character, so a form matches no function of
    another deployment, whatever its name is.
    """
    entries = sorted(entries)
    if not entries:
        return _document(*own)
    forms = sorted({re.sub(r"\d", "?", entry) for entry in entries})
    exact, by_form = (_document(*own, _call(name, listed)) for listed in (entries, forms))
    return exact if characters(exact) <= most_characters else by_form


def _call(name: str, entries: Iterable[str]) -> Document:
    functions = (f"function:{names.invoked(names.function(name, entry))}" for entry in entries)
    return _allow("CallFunctions", ("lambda:InvokeFunction",), *(_arn("lambda", function) for function in functions))


def _read(settings: AwsSettings, *folders: str) -> Iterator[Document]:
    objects = (_arn("s3", f"{settings.bucket}/{settings.key(folder)}/*", "", "") for folder in folders)
    yield _allow("ReadModel", ("s3:GetObject",), *objects)
    if settings.rules.kms_key:
        yield _allow("ReadWithKey", ("kms:Decrypt",), settings.rules.kms_key)


def _network(settings: AwsSettings, actions: Iterable[str]) -> Iterator[Document]:
    """Allow to join a VPC: these actions have no resource that can be named before it exists."""
    if settings.rules.subnets:
        yield _allow("JoinNetwork", actions, "*")


def _log(group: str, *further: str) -> Document:
    actions = ("logs:CreateLogStream", "logs:PutLogEvents", *further)
    return _allow("WriteLog", actions, _arn("logs", f"log-group:{group}:*"))


def _arn(service: str, resource: str, region: str = REGION, account: str = ACCOUNT) -> str:
    return f"arn:{PARTITION}:{service}:{region}:{account}:{resource}"


def _allow(sid: str, actions: Iterable[str], *resources: str) -> Document:
    named = [sub(resource) for resource in resources]
    return {"Sid": sid, "Effect": "Allow", "Action": sorted(actions), "Resource": named}


def _document(*statements: Document) -> Document:
    return {"Version": "2012-10-17", "Statement": list(statements)}
