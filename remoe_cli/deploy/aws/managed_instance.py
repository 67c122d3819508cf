"""The main function on a GPU instance of Lambda that scales to zero (Lambda Managed Instances). Pure.

A capacity provider launches instances in the user's VPC, by the operator role, and the function runs on them. Only a published version
runs; its least number of execution environments is 0, so that nothing is paid at rest. One environment answers one request at a time.

Source: CloudFormation template reference, AWS::Lambda::CapacityProvider, and AcceleratorConfig of AWS::Lambda::Function (read 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from packaging.version import Version

from remoe_cli.deploy.aws import functions, names
from remoe_cli.deploy.aws.aws_reference import GpuFunction, aws_reference
from remoe_cli.deploy.aws.functions import Resource
from remoe_cli.deploy.aws.policies import PARTITION, sub
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.errors import UsageError
from remoe_cli.package import locks
from remoe_cli.plan.document import MainSpec, Plan

PROVIDER, ROLE = "MainProvider", "MainOperatorRole"
UNNAMED_SUBNET, UNNAMED_GROUP = "subnet-00000000000000000", "sg-00000000000000000"  # in a dry run that names none
_OPERATOR = f"arn:{PARTITION}:iam::aws:policy/AWSLambdaManagedEC2ResourceOperator"


def require_network(settings: AwsSettings) -> None:
    """Refuse a deployment without a network.

    Raises: UsageError for it.
    """
    if not settings.rules.subnets:
        raise UsageError(
            "The main function on lambda-gpu runs on instances in a VPC of yours, and no subnet is named.",
            "Give --subnet ID and --security-group ID, of a VPC whose subnets reach S3, Lambda and CloudWatch Logs; or another --endpoint.",
        )


def without_network(settings: AwsSettings) -> AwsSettings:
    """Leave the VPC out: the function gets its network from the capacity provider, not by its own role."""
    return replace(settings, architecture="x86_64", rules=replace(settings.rules, subnets=(), security_groups=()))


def resources(
    id: str, plan: Plan, configuration: Mapping[str, Any], policy: Resource, settings: AwsSettings, after: list[str]
) -> dict[str, Resource]:
    """Make operator role, capacity provider and function, with its version and alias.

    Raises: UsageError for an instance that AWS does not name for such functions, or whose driver would be too old for the image's torch.
    """
    host = aws_reference().gpu_function
    _check(plan.main, host)
    tags = functions.tags(settings, plan)
    accelerated = {
        **configuration,
        "AcceleratorConfig": {"AcceleratorMemorySize": gpu_gb(plan.main)},
        "CapacityProviderConfig": {
            "LambdaManagedInstancesCapacityProviderConfig": {
                "CapacityProviderArn": {"Fn::GetAtt": [PROVIDER, "Arn"]},
                "PerExecutionEnvironmentMaxConcurrency": 1,
                "ExecutionEnvironmentMemoryGiBPerVCpu": _gib_per_vcpu(plan.main),
            }
        },
    }
    made = functions.lambda_function(
        id, names.main(settings.name), accelerated, without_network(settings), policy=policy, reserved=0, tags=tags
    )
    made[id]["DependsOn"] += after
    version = next(name for name, resource in made.items() if resource["Type"] == "AWS::Lambda::Version")
    made[version]["Properties"]["FunctionScalingConfig"] = {"MinExecutionEnvironments": 0, "MaxExecutionEnvironments": plan.instances}
    return {ROLE: _operator(settings, tags), PROVIDER: _provider(plan, settings, host, tags), **made}


def host_vcpus(main: MainSpec) -> int:
    """Count the vCPUs of the instance: the catalog leaves one to the host."""
    return int(main.vcpus or 0) + 1


def most_vcpus(plan: Plan) -> int:
    """Count the vCPUs that the capacity provider may launch.

    A version's first environments must have room, even though it has none at rest: a provider without that room is said not to recover.
    """
    return host_vcpus(plan.main) * max(plan.instances, aws_reference().gpu_function.first_environments)


def gpu_gb(main: MainSpec) -> int:
    """Return the GPU memory in the unit of Lambda, GiB."""
    return (main.gpu_memory_mb or 0) // 1024


def _gib_per_vcpu(main: MainSpec) -> float:
    return round(main.memory_mb / 1024 / (main.vcpus or 1), 3)


def _check(main: MainSpec, host: GpuFunction) -> None:
    known = f"Plan for one of {', '.join(host.families)}, or choose another --endpoint."
    if main.name.rpartition(".")[0] not in host.families or not main.scales_to_zero:
        raise UsageError(f"The plan's main function {main.name} is no instance that AWS names for functions with a GPU.", known)
    if gpu_gb(main) not in host.gpu_memory_gb:
        sizes = ", ".join(map(str, host.gpu_memory_gb))
        raise UsageError(f"A function on Lambda has {sizes} GB of GPU memory, and {main.name} has {gpu_gb(main)}.", known)
    if Version(needed := locks.cuda_of_image()) > Version(host.cuda):
        raise UsageError(
            f"The image's torch needs CUDA {needed}, and AWS's own images for such functions have {host.cuda}: a newer one may not run.",
            known,
        )


def _operator(settings: AwsSettings, tags: list[Any]) -> Resource:
    """Make the role by which Lambda launches and ends instances: AWS's policy for it, and nothing else."""
    made = functions.role("lambda", {}, settings, tags)
    del made["Properties"]["Policies"]
    made["Properties"]["ManagedPolicyArns"] = [sub(_OPERATOR)]
    return made


def _provider(plan: Plan, settings: AwsSettings, host: GpuFunction, tags: list[Any]) -> Resource:
    rules = settings.rules
    return {
        "Type": "AWS::Lambda::CapacityProvider",
        "Properties": {
            "VpcConfig": {
                "SubnetIds": list(rules.subnets) or [UNNAMED_SUBNET],
                "SecurityGroupIds": list(rules.security_groups) or [UNNAMED_GROUP],
            },
            "PermissionsConfig": {"CapacityProviderOperatorRoleArn": {"Fn::GetAtt": [ROLE, "Arn"]}},
            "InstanceRequirements": {
                "Architectures": ["x86_64"],
                "AllowedInstanceTypes": [plan.main.name.partition(".")[2]],
            },
            "CapacityProviderScalingConfig": {"MaxVCpuCount": most_vcpus(plan), "ScalingMode": "Auto"},
            **({"KmsKeyArn": rules.kms_key} if rules.kms_key else {}),
            "PropagateTags": {"Mode": "Explicit", "ExplicitTags": functions.tags(settings)},  # so instances are in the deployment's costs
            "Tags": tags,
        },
    }
