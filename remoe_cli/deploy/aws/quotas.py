"""Check a deployment's size against each quota of AWS before anything is sent there. Pure.

It does not ask for the account's own quotas, which would take credentials: it checks AWS's defaults (data/aws.toml), and says what a new
account lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from remoe_cli.deploy.aws import functions, main_function, managed_instance, names, policies, template
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents
from remoe_cli.deploy.aws.functions import Resource
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.plan.document import Plan

CALLS_PER_FUNCTION = 4  # of Lambda's API: create it, reserve concurrency, publish a version, create its alias
Severity = Literal["ok", "note", "warning", "error"]
_FEWER = "Plan with a catalog whose max_functions is lower."
_FASTER = "Plan for a lower --ttft or --tpot, or run the main function yourself: --endpoint none."


@dataclass(frozen=True)
class QuotaCheck:
    """One quota and how much of it the deployment takes. `limit` is None where each account has its own.

    ok        fits
    note      fits a usual account, but not every new one; the hint says what to do there
    warning   is above a default that AWS raises on request, or will be cut short when it runs
    error     AWS refuses this
    """

    name: str
    used: float
    limit: float | None
    unit: str
    severity: Severity = "ok"
    hint: str = ""

    @property
    def ok(self) -> bool:
        return self.severity in ("ok", "note")


def check(plan: Plan, contents: Contents, settings: AwsSettings) -> tuple[QuotaCheck, ...]:
    """Check every quota. Raises: what `templates` raises."""
    made = template.templates(plan, contents, settings)
    return (*_functions(plan, contents, settings), *_main(plan, contents, settings), *_stacks(made), *_resources(contents, made))


def _functions(plan: Plan, contents: Contents, settings: AwsSettings) -> Iterator[QuotaCheck]:
    if not contents.functions:
        return
    quota = aws_reference().function
    yield _memory("memory of an expert function", [f.memory_mb for f in contents.functions])
    # The zip comes from the bucket, so only its unpacked size counts.
    code = _within("unpacked code", contents.code_unpacked_bytes, quota.unpacked_bytes, "bytes", "error", "Leave out dependencies.")
    yield code if contents.code_bytes else replace(code, hint="Not packaged yet, so its size is not known.")
    longest = max(len(names.function(settings.name, f.entry)) for f in contents.functions)
    yield _within("longest name of a function", longest, quota.name_characters, "characters", "error", "Choose a shorter --name.")
    yield _concurrency(plan, contents, settings)


def _memory(name: str, sizes_mb: Sequence[int]) -> QuotaCheck:
    quota, least_mb, most_mb = aws_reference().function, min(sizes_mb), max(sizes_mb)
    if least_mb < quota.memory_least_mb:
        return QuotaCheck(f"least {name}", least_mb, quota.memory_least_mb, "MB", "error", "Plan with a catalog of Lambda's sizes.")
    row = _within(name, most_mb, quota.memory_most_mb, "MB", "error", "Plan with a catalog of Lambda's sizes.")
    new = quota.memory_new_account_mb
    hint = f"Some new accounts have functions of {new:,} MB at most. If yours does, ask AWS Support for {quota.memory_most_mb:,}."
    return _noted(row, hint) if most_mb > new else row


def _concurrency(plan: Plan, contents: Contents, settings: AwsSettings) -> QuotaCheck:
    """Check the account's concurrency against all requests that the plan answers at once."""
    quota = aws_reference().function
    served, wanted = functions.served_at_once(plan, contents, settings), functions.requests_at_once(plan)
    each = functions.instances_each(contents, settings)
    limit = max(0, settings.concurrency - quota.concurrency_unreserved)
    needed = max(quota.concurrency, wanted * each + quota.concurrency_unreserved)
    ask = f"Ask for {needed:,} 'Concurrent executions' of Lambda in Service Quotas."
    row = QuotaCheck("reserved concurrency", served * each, limit, "instances")
    if served < wanted:
        hint = f"That is for {served} of the {wanted} requests that come at once: others wait for functions, and may fail. {ask}"
        return replace(row, severity="warning", hint=hint)
    return _noted(row, f"A new account has {quota.concurrency_new_account} and can reserve none of them. {ask}")


def _main(plan: Plan, contents: Contents, settings: AwsSettings) -> Iterator[QuotaCheck]:
    request_s = plan.ttft_s + plan.workload.n_out * plan.tpot_s
    quota, wanted = aws_reference(), f"{plan.instances} of '{plan.main.name} for endpoint usage'"
    match settings.endpoint:
        case Endpoint.aws_lambda | Endpoint.lambda_gpu:
            on_instance, hint = settings.endpoint is Endpoint.lambda_gpu, "Plan for more remote experts, or choose another endpoint."
            if on_instance:
                most_mb = quota.gpu_function.memory_most_mb
                yield _within("memory of the main function", plan.main.memory_mb, most_mb, "MB", "error", hint)
            else:
                yield _memory("memory of the main function", [plan.main.memory_mb])
            yield _within(
                "/tmp of the main function", main_function.storage_mb(plan, contents), quota.function.storage_most_mb, "MB", "error", hint
            )
            yield _within("time of a mean request", request_s, quota.function.timeout_s, "s", "warning", _FASTER)
            if on_instance:
                vcpus = managed_instance.most_vcpus(plan)
                hint = f"Many accounts start with 0. Ask for {vcpus} of 'Running On-Demand G and VT instances' of EC2 in Service Quotas."
                yield QuotaCheck("vCPUs of GPU instances", vcpus, None, "vCPUs", "note", hint)
        case Endpoint.sagemaker:
            hint = f"Many accounts start with 0. Ask for {wanted} of SageMaker in Service Quotas."
            yield QuotaCheck(f"instances {plan.main.name}", plan.instances, None, "instances", "note", hint)
            yield _within("time of a mean request", request_s, quota.endpoint.streamed_s, "s", "warning", _FASTER)
        case Endpoint.none:
            pass


def _stacks(made: Templates) -> Iterator[QuotaCheck]:
    quota, each = aws_reference().stack, (made.root, *made.nested.values())
    sizes = [len(one["Resources"]) for one in each]
    yield _within("resources of a template", max(sizes), quota.resources, "resources", "error", _FEWER)
    yield _within("resources of all nested stacks", sum(sizes), quota.nested_resources, "resources", "error", _FEWER)
    yield _within("size of a template", max(map(len, made.bodies.values())), quota.template_bytes, "bytes", "error", _FEWER)
    yield _within("stacks", len(each), quota.stacks, "stacks", "warning", "Ask for more 'Stack count' of CloudFormation in Service Quotas.")


def _resources(contents: Contents, made: Templates) -> Iterator[QuotaCheck]:
    quota = aws_reference()
    of = {kind: _of_type(made, f"AWS::{kind}") for kind in ("Lambda::Function", "IAM::Role", "IAM::ManagedPolicy")}
    roles, deployed = of["IAM::Role"], of["Lambda::Function"]
    row = _within(
        "IAM roles", len(roles), quota.iam.roles, "roles", "warning", "Ask for more 'Roles per account' of IAM in Service Quotas."
    )
    yield _noted(row, "The account's default is not enough for two deployments like this one.") if 2 * len(roles) > quota.iam.roles else row
    inline = [policies.characters(policy["PolicyDocument"]) for role in roles for policy in role["Properties"].get("Policies", ())]
    managed = [policies.characters(policy["Properties"]["PolicyDocument"]) for policy in of["IAM::ManagedPolicy"]]
    yield _within("longest policy of a role", max(inline), quota.iam.role_policy_characters, "characters", "error", "")
    if managed:
        yield _within("policy for the caller", max(managed), quota.iam.managed_policy_characters, "characters", "error", "")
    if deployed:
        largest = max(map(_environment_bytes, deployed))
        yield _within("environment of a function", largest, quota.function.environment_bytes, "bytes", "error", "")
        # While an update runs, there are two versions of each.
        stored = 2 * len(deployed) * contents.code_bytes
        ask = "Ask for more 'Function and layer storage' of Lambda in Service Quotas."
        yield _within("code of all versions", stored, quota.function.code_storage_bytes, "bytes", "warning", ask)
        calls = CALLS_PER_FUNCTION * len(deployed)
        rate = quota.function.control_calls_per_s
        seconds = calls / rate
        hint = f"AWS allows {rate} API calls of Lambda a second, so {calls:,} calls take at least {seconds:.3g} s."
        yield QuotaCheck("time for API calls", seconds, None, "s", "ok", hint if round(seconds) else "")


def _within(name: str, used: float, limit: float, unit: str, beyond: Severity, hint: str) -> QuotaCheck:
    """Make a check whose severity is `beyond`, with its hint, when `used` is above `limit`."""
    return QuotaCheck(name, used, limit, unit, beyond, hint) if used > limit else QuotaCheck(name, used, limit, unit)


def _noted(quota: QuotaCheck, hint: str) -> QuotaCheck:
    """Add a note to a check that has nothing worse."""
    return replace(quota, severity="note", hint=hint) if quota.severity == "ok" else quota


def _of_type(made: Templates, kind: str) -> list[Resource]:
    return [r for one in (made.root, *made.nested.values()) for r in one["Resources"].values() if r["Type"] == kind]


def _environment_bytes(function: Resource) -> int:
    """Count the bytes of names and values, with pseudo parameters at their longest."""
    variables = policies.filled(function["Properties"]["Environment"]["Variables"])
    return sum(len(name) + len(value) for name, value in variables.items())
