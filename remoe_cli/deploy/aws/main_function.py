"""The CloudFormation resources of the main function, by the kind of its endpoint. Pure."""

from __future__ import annotations

from math import ceil
from typing import Any

from packaging.version import Version

from remoe_cli import lambda_limits
from remoe_cli.deploy.aws import functions, managed_instance, names, policies
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.contents import Contents
from remoe_cli.deploy.aws.functions import Resource
from remoe_cli.deploy.aws.names import ACCOUNT, REGION
from remoe_cli.deploy.aws.policies import SUFFIX, sub
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError
from remoe_cli.package import locks
from remoe_cli.plan.document import Plan

FUNCTION, ENDPOINT = "Main", "MainEndpoint"  # logical ids; no update can make one of the other, so they differ
ENTRYPOINT = ["python", "-m", "remoe_cli.runtime.lambda_runtime"]
HANDLER = "remoe_cli.runtime.lambda_main.handle"
DEFAULT_IMAGE = (ACCOUNT, REGION, "remoe")  # account, region and repository
_SPARE_STORAGE_MB = 256
_START_S = 600  # for a container to start, besides reading the model


def resources(plan: Plan, contents: Contents, settings: AwsSettings, after: list[str]) -> dict[str, Resource]:
    """Make the main function's resources, created after the resources `after`.

    Raises: UsageError when the plan's main function cannot run on this kind of endpoint.
    """
    entries, iam = [function.entry for function in contents.functions], aws_reference().iam
    match settings.endpoint:
        case Endpoint.none:
            document = policies.caller(settings.name, entries, iam.managed_policy_characters)
            path = {"Path": settings.rules.role_path} if settings.rules.role_path else {}
            return {"Caller": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {**path, "PolicyDocument": document}}}
        case Endpoint.aws_lambda:
            if plan.main.usd_per_hour is not None:
                raise _wrong_kind(plan, "not a Lambda function")
            policy = policies.main_function(settings, entries, iam.role_policy_characters)
            return _function(plan, contents, settings, policy, after)
        case Endpoint.lambda_gpu:
            own = managed_instance.without_network(settings)
            policy = policies.main_function(own, entries, iam.role_policy_characters)
            configuration = _configuration(plan, contents, settings, int((plan.main.vcpus or 1) * lambda_limits.MB_PER_VCPU))
            return managed_instance.resources(FUNCTION, plan, configuration, policy, settings, after)
        case Endpoint.sagemaker:
            if not plan.main.name.startswith("ml."):
                raise _wrong_kind(plan, "not a SageMaker instance")
            policy = policies.main_endpoint(settings, entries, iam.role_policy_characters, _image(settings)[0])
            return _endpoint(plan, contents, settings, policy, after)


def storage_mb(plan: Plan, contents: Contents) -> int:
    """Return the size of the /tmp to which a main function on Lambda fetches its files.

    It is that of its memory, as the plan is priced: what fits the memory fits it. On an instance it is what the files need.
    """
    needed_mb = ceil(contents.main_bytes / 2**20) + _SPARE_STORAGE_MB
    return max(aws_reference().function.storage_least_mb, 0 if plan.main.scales_to_zero else plan.main.memory_mb, needed_mb)


def _wrong_kind(plan: Plan, what: str) -> UsageError:
    hint = "Choose another --endpoint, or plan for another main function."
    return UsageError(f"The plan's main function {plan.main.name} is {what}.", hint)


def _configuration(plan: Plan, contents: Contents, settings: AwsSettings, threads_mb: int) -> dict[str, Any]:
    """Return what a function of the image has wherever it runs; it has the threads of so much memory of Lambda's."""
    return {
        "Description": f"The main function of {plan.model.name.rpartition('/')[2]}"[:256],
        "PackageType": "Image",
        "Code": {"ImageUri": _image(settings)[1]},
        "ImageConfig": {"EntryPoint": ENTRYPOINT, "Command": [HANDLER]},
        "MemorySize": plan.main.memory_mb,
        "Timeout": aws_reference().function.timeout_s,
        "EphemeralStorage": {"Size": storage_mb(plan, contents)},
        "Environment": {"Variables": _variables(contents, settings) | lambda_limits.thread_environment(threads_mb)},
    }


def _function(plan: Plan, contents: Contents, settings: AwsSettings, policy: Resource, after: list[str]) -> dict[str, Resource]:
    configuration = _configuration(plan, contents, settings, plan.main.memory_mb)
    made = functions.lambda_function(
        FUNCTION,
        names.main(settings.name),
        configuration,
        settings,
        policy=policy,
        reserved=functions.served_at_once(plan, contents, settings),
        tags=functions.tags(settings, plan),
    )
    made[FUNCTION]["DependsOn"] += after
    return made


def _endpoint(plan: Plan, contents: Contents, settings: AwsSettings, policy: Resource, after: list[str]) -> dict[str, Resource]:
    tags, figure, rules = functions.tags(settings, plan), aws_reference(), settings.rules
    network = {"Subnets": list(rules.subnets), "SecurityGroupIds": list(rules.security_groups)}
    variant = {
        "VariantName": "main",
        "ModelName": {"Fn::GetAtt": ["MainModel", "ModelName"]},
        "InstanceType": plan.main.name,
        "InitialInstanceCount": plan.instances,
        "InitialVariantWeight": 1,
        **_ami(plan),
        # SageMaker downloads nothing: the container fetches its share itself before it is healthy.
        "ContainerStartupHealthCheckTimeoutInSeconds": min(
            figure.endpoint.start_s, _START_S + contents.main_bytes // figure.estimates.container_read_bytes_per_s
        ),
    }
    return {
        "MainRole": functions.role("sagemaker", policy, settings, tags),
        "MainLog": functions.log_group(names.endpoint_log_group(settings.name), settings, tags),
        "MainModel": {
            "Type": "AWS::SageMaker::Model",
            "Properties": {
                "ExecutionRoleArn": {"Fn::GetAtt": ["MainRole", "Arn"]},
                "EnableNetworkIsolation": False,  # the container calls Lambda and reads S3
                "PrimaryContainer": {"Image": _image(settings)[1], "Environment": _variables(contents, settings)},
                **({"VpcConfig": network} if rules.subnets else {}),
                "Tags": tags,
            },
        },
        "MainConfig": {"Type": "AWS::SageMaker::EndpointConfig", "Properties": {"ProductionVariants": [variant], "Tags": tags}},
        ENDPOINT: {
            "Type": "AWS::SageMaker::Endpoint",
            "DependsOn": ["MainLog", *after],
            "Properties": {
                "EndpointName": names.main(settings.name),
                "EndpointConfigName": {"Fn::GetAtt": ["MainConfig", "EndpointConfigName"]},
                "Tags": tags,
            },
        },
    }


def _ami(plan: Plan) -> dict[str, str]:
    """Choose the instances' AMI by the CUDA of the image's torch; without a GPU SageMaker's own will do.

    Raises: UsageError where their driver would be too old for it.
    """
    if plan.main.gpu_memory_mb is None:
        return {}
    host, needed = aws_reference().gpu_host, locks.cuda_of_image()
    if plan.main.name.rpartition(".")[0] not in host.families or Version(needed) > Version(host.cuda):
        raise UsageError(
            f"The image's torch needs CUDA {needed}, and no driver that {plan.main.name} can have on SageMaker is known to run it "
            f"({host.ami} runs CUDA {host.cuda}, on {', '.join(host.families)}).",
            "Plan for another instance type.",
        )
    return {"InferenceAmiVersion": host.ami}


def _variables(contents: Contents, settings: AwsSettings) -> dict[str, Any]:
    return {"REMOE_MAIN": functions.object_uri(settings, names.main_manifest_key(contents.main_sha256))}


def _image(settings: AwsSettings) -> tuple[tuple[str, str, str], Any]:
    """Return account, region and repository of the main function's image, and its URI.

    An image that nobody has named yet is taken to be in this account and region.
    """
    if settings.image_uri is None:
        account, region, repository = DEFAULT_IMAGE
        return DEFAULT_IMAGE, sub(f"{account}.dkr.ecr.{region}.{SUFFIX}/{repository}:latest")
    image = policies.image_parts(settings.image_uri)
    if image is None:
        raise UsageError(
            f"The image {settings.image_uri} is not in Amazon ECR, where Lambda and SageMaker fetch images from.",
            "Push it there: 'remoe package PLAN --image' prints the commands.",
        )
    return image, settings.image_uri
