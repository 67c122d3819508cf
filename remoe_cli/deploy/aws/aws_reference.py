"""AWS's quotas, and prices that no catalog has, as data with sources (data/aws.toml)."""

from __future__ import annotations

from functools import cache

from pydantic import PositiveFloat, PositiveInt, model_validator

from remoe_cli.artifacts import Part
from remoe_cli.plan.document import Source
from remoe_cli.provenance import Provenance, check_provenance, read_figures


class LambdaQuotas(Part):
    """Quotas of Lambda.

    memory_new_account_mb, concurrency_new_account   what a new account has until AWS raises it
    concurrency_unreserved   the part of `concurrency` that cannot be reserved
    unpacked_bytes           of a function's zip
    code_storage_bytes       of the zips of all versions of all functions of a region
    environment_bytes        names and values of a function's variables
    payload_bytes            of a synchronous invocation's request, and of its answer
    storage_least_mb, storage_most_mb   of a function's /tmp; the least is free
    control_calls_per_s      API calls that make or change functions, versions and aliases
    """

    memory_least_mb: PositiveInt
    memory_most_mb: PositiveInt
    memory_new_account_mb: PositiveInt
    concurrency: PositiveInt
    concurrency_unreserved: PositiveInt
    concurrency_new_account: PositiveInt
    unpacked_bytes: PositiveInt
    code_storage_bytes: PositiveInt
    environment_bytes: PositiveInt
    payload_bytes: PositiveInt
    timeout_s: PositiveInt
    storage_least_mb: PositiveInt
    storage_most_mb: PositiveInt
    name_characters: PositiveInt
    control_calls_per_s: PositiveInt


class StackQuotas(Part):
    """Quotas of CloudFormation.

    resources          of one template
    nested_resources   of all nested stacks in one operation
    stacks             of a region
    """

    resources: PositiveInt
    nested_resources: PositiveInt
    template_bytes: PositiveInt
    stacks: PositiveInt


class IamQuotas(Part):
    """Quotas of IAM.

    roles                       of an account
    role_policy_characters      of all inline policies of a role; white space does not count
    managed_policy_characters   of a managed policy
    """

    roles: PositiveInt
    role_policy_characters: PositiveInt
    managed_policy_characters: PositiveInt


class EndpointQuotas(Part):
    """Quotas of a SageMaker endpoint, in seconds.

    streamed_s   for a streamed answer
    start_s      until its container is healthy
    """

    streamed_s: PositiveInt
    start_s: PositiveInt


class GpuHost(Part):
    """The AMI of a SageMaker endpoint's instances with a GPU.

    cuda       the newest CUDA that its driver runs
    families   of instances that can have it
    """

    ami: str
    cuda: str
    families: tuple[str, ...]


class GpuFunction(Part):
    """Functions with a GPU, on instances of Lambda.

    cuda                 the newest CUDA of AWS's own images for them
    families             of the catalog's instances that AWS names
    gpu_memory_gb        sizes that a function may ask for
    memory_least_mb, memory_most_mb   of a function
    first_environments   that a version has by default when it is published
    regions_without      regions in which Lambda has no instances
    """

    cuda: str
    families: tuple[str, ...]
    gpu_memory_gb: tuple[PositiveInt, ...]
    memory_least_mb: PositiveInt
    memory_most_mb: PositiveInt
    first_environments: PositiveInt
    regions_without: tuple[str, ...]


class ListPrices(Part):
    """Prices in USD: a GB of logs kept, a GB of images kept."""

    usd_per_log_gb_month: PositiveFloat
    usd_per_image_gb_month: PositiveFloat


class Estimates(Part):
    """Estimates that no quota or price list has.

    ..._image_bytes              size of the main function's image
    container_read_bytes_per_s   rate at which a container reads its part of the model
    """

    lambda_image_bytes: PositiveInt
    sagemaker_image_bytes: PositiveInt
    container_read_bytes_per_s: PositiveInt


class AwsReference(Part):
    function: LambdaQuotas
    stack: StackQuotas
    iam: IamQuotas
    endpoint: EndpointQuotas
    gpu_host: GpuHost
    gpu_function: GpuFunction
    prices: ListPrices
    estimates: Estimates
    provenance: tuple[Provenance, ...]
    file: Source

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> AwsReference:
        check_provenance({name: side for name, side in self if name not in ("provenance", "file")}, self.provenance)
        return self


@cache
def aws_reference() -> AwsReference:
    """Read the file that comes with remoe."""
    return read_figures("file of quotas", AwsReference, "aws", "remoe_cli.deploy.aws", "data")
