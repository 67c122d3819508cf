"""Read the status and the logs of a deployment on AWS. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli.deploy.aws import names
from remoe_cli.deploy.aws.events import STACK
from remoe_cli.deploy.aws.session import Account, code_of, plain_errors
from remoe_cli.deploy.aws.stack import Stack, StackState
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import DeployError, NoDeploymentError

_AT_ONCE = 8
_STREAMS = 5
_COMPARED = ("MemorySize", "Timeout", "Runtime", "Handler")


def unknown(account: Account, name: str) -> NoDeploymentError:
    return NoDeploymentError(
        f"There is no deployment named '{name}' in account {account.id}, {account.region}.",
        "See --region and --profile, or make one with 'remoe deploy PLAN --target aws'.",
    )


def read(account: Account, name: str) -> dict[str, Any]:
    """Return the status document.

    state       running; deploying, destroying, proposed (a change set that nobody executed) or failed, with a `hint` of what to do
    functions   as they are now; `drift` names what differs from the plan's template
    main        the main function as it is now: `kind` (sagemaker, lambda or lambda-gpu), name and state; None where the user runs it

    Raises: NoDeploymentError for an unknown name.
    """
    with plain_errors(account.origin):
        stack, state = Stack(account, name), stack_state(account, name)
        word, hint = _state(state, name)
        templates = list(_templates(account, stack, state)) if state.stands or state.busy else []
        kind = state.outputs.get("EndpointKind")
        return {
            "name": name,
            "target": "aws",
            "state": word,
            "hint": hint,
            "account": account.id,
            "region": account.region,
            "stack": state.status,
            "by": stack.last_actor(state),
            "since": state.since.isoformat(),
            "plan": state.outputs.get("Plan"),
            "endpoint": state.outputs.get("Endpoint"),
            "main": _main(account, name, kind) if kind in (Endpoint.sagemaker, Endpoint.aws_lambda, Endpoint.lambda_gpu) else None,
            "functions": _functions(account, name, templates),
        }


def deployed_names(account: Account) -> list[str]:
    """List the deployments of this account and region.

    They are the stacks that have remoe's tag, and the name that goes with it.
    """
    with plain_errors(account.origin):
        pages = account.client("cloudformation").get_paginator("describe_stacks").paginate()
        tags = {
            stack["StackName"]: {tag["Key"]: tag["Value"] for tag in stack.get("Tags", ())} for page in pages for stack in page["Stacks"]
        }
    found = [each[names.DEPLOYMENT_TAG] for each in tags.values() if names.DEPLOYMENT_TAG in each]
    return sorted({name for name in found if names.stack(name) in tags})


def stack_state(account: Account, name: str) -> StackState:
    """Describe the stack alone; its outputs say what the main function is.

    Raises: NoDeploymentError for an unknown name.
    """
    names.check_name(name)
    with plain_errors(account.origin):
        if (state := Stack(account, name).describe()) is None:
            raise unknown(account, name)
        return state


def _state(state: StackState, name: str) -> tuple[str, str]:
    follow = "CloudFormation is at work; run this again, or deploy the same plan again to follow it."
    again = f"Deploy again to continue, or run 'remoe destroy {name} --target aws'."
    if state.stands:
        return "running", ""
    if state.status == "DELETE_IN_PROGRESS":
        return "destroying", follow
    if state.busy:
        return "deploying", follow
    if state.status == "REVIEW_IN_PROGRESS":
        return "proposed", f"Nobody has agreed to it yet. {again}"
    return "failed", again


def _templates(account: Account, stack: Stack, state: StackState) -> Iterator[Mapping[str, Any]]:
    """Yield the templates of the stack and of its nested stacks."""
    root = stack.template(state)
    yield root
    if any(resource["Type"] == STACK for resource in root.get("Resources", {}).values()):
        client = account.client("cloudformation")
        for page in client.get_paginator("list_stack_resources").paginate(StackName=state.id):
            for each in page["StackResourceSummaries"]:
                if each["ResourceType"] == STACK and (nested := stack.describe(each["PhysicalResourceId"])):
                    yield stack.template(nested)


def _functions(account: Account, name: str, templates: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Describe the expert functions, by name."""
    wanted = {
        resource["Properties"]["FunctionName"]: resource["Properties"]
        for each in templates
        for resource in each.get("Resources", {}).values()
        if resource["Type"] == "AWS::Lambda::Function" and resource["Properties"]["FunctionName"] != names.main(name)
    }
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda function: _function(account, function, wanted[function]), sorted(wanted)))


def _function(account: Account, function: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the version of a function that the alias names, which callers get."""
    found = _configuration(account, function)
    if found is None:
        return {"name": function, "state": "missing", "memory_mb": wanted["MemorySize"], "drift": ["it is missing"]}
    drift = [f"{key} is {found.get(key)}, not {wanted[key]}" for key in _COMPARED if key in wanted and found.get(key) != wanted[key]]
    return {"name": function, "state": found.get("State", ""), "memory_mb": found["MemorySize"], "drift": drift}


def _configuration(account: Account, function: str) -> dict[str, Any] | None:
    try:
        return dict(account.client("lambda").get_function_configuration(FunctionName=function, Qualifier=names.ALIAS))
    except ClientError as error:
        if code_of(error) == "ResourceNotFoundException":
            return None
        raise


def _main(account: Account, name: str, kind: str) -> dict[str, Any]:
    main = names.main(name)
    if kind != Endpoint.sagemaker:
        found = _configuration(account, main)
        return {"kind": kind, "name": main, "state": found.get("State", "") if found else "missing"}
    try:
        state = account.client("sagemaker").describe_endpoint(EndpointName=main)["EndpointStatus"]
    except ClientError as error:
        if code_of(error) != "ValidationException":
            raise
        state = "missing"
    return {"kind": kind, "name": main, "state": state}


def logs(account: Account, name: str, function: str | None, lines: int) -> dict[str, list[str]]:
    """Return the last `lines` lines of each function, or of one; the main function is `main`.

    Functions that never ran have none.

    Raises: DeployError for an unknown deployment or function.
    """
    document = read(account, name)
    groups = {each["name"]: names.log_group(each["name"]) for each in document["functions"]}
    if main := document["main"]:
        groups["main"] = names.endpoint_log_group(name) if main["kind"] == Endpoint.sagemaker else names.log_group(main["name"])
    if function is not None and function not in groups:
        raise DeployError(f"Deployment '{name}' has no function '{function}'; there are: {', '.join(groups)}.", "")
    chosen = groups if function is None else {function: groups[function]}
    with plain_errors(account.origin), ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(chosen, pool.map(lambda group: _last_lines(account, group, lines), chosen.values()), strict=True))


def _last_lines(account: Account, group: str, lines: int) -> list[str]:
    """Read the last lines of the streams that were written to last, in the order of time."""
    client = account.client("logs")
    try:
        streams = client.describe_log_streams(logGroupName=group, orderBy="LastEventTime", descending=True, limit=_STREAMS)["logStreams"]
    except ClientError as error:
        if code_of(error) == "ResourceNotFoundException":
            return []
        raise
    found = [
        (event["timestamp"], event["message"].rstrip())
        for stream in streams
        for event in client.get_log_events(
            logGroupName=group, logStreamName=stream["logStreamName"], limit=min(lines, 10_000), startFromHead=False
        )["events"]
    ]
    return [message for _, message in sorted(found, key=lambda event: event[0])][-lines:]


def tagged(account: Account, name: str, gone: Iterable[str] = ()) -> list[str]:
    """List the ARNs of everything that has the deployment's tag, except what is known to be `gone`.

    `gone` are physical ids of deleted resources; the Tagging API remembers them for minutes.
    """
    pages = account.client("resourcegroupstaggingapi").get_paginator("get_resources")
    found = [
        resource["ResourceARN"]
        for page in pages.paginate(TagFilters=[{"Key": names.DEPLOYMENT_TAG, "Values": [name]}])
        for resource in page["ResourceTagMappingList"]
    ]
    gone = set(gone)
    return sorted(arn for arn in found if arn not in gone and _id(arn) not in gone)


def _id(arn: str) -> str:
    """Return the physical id of a resource, which follows its kind: log-group:ID, role/ID."""
    return re.split("[:/]", arn.split(":", 5)[5], maxsplit=1)[-1]
