"""Look at what the user names in the account before anything is packaged or sent.

That is the image, the key, the policy, the bucket and the network.
What is not there is refused. What may not be looked at is a remark: the credentials that deploy need not be allowed to look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from botocore.exceptions import ClientError

from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import policies
from remoe_cli.deploy.aws.aws_reference import aws_reference
from remoe_cli.deploy.aws.session import Account, code_of, plain_errors
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.storage import Bucket
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError
from remoe_cli.runtime.failures import ACCESS_DENIED

_PUSH = "'remoe package PLAN --image --repository URI' builds and pushes it, and prints its URI with the tag."
_IN_VPC = (
    "In the VPC, functions reach S3 only through a gateway endpoint for S3 or a NAT gateway",
    "the main function also needs Lambda's API: an interface endpoint for Lambda, or a NAT gateway",
)
_INSTANCE_LOGS = (
    "An instance of Lambda sends its logs there too: an interface endpoint for CloudWatch Logs. "
    "Gateways and interface endpoints cost by the hour, which is in no table here."
)
_NO_NETWORK = "To deploy this, give --subnet and --security-group too: the instance runs in a VPC of yours. The template has ids of zeros."


def check_region(settings: AwsSettings, region: str) -> None:
    """Check what must be in the region of the deployment. Asks nobody.

    Raises: UsageError for an image or a key elsewhere.
    """
    if settings.image_uri is not None:
        place = policies.image_parts(settings.image_uri)
        if place is None:
            raise UsageError(
                f"The image {settings.image_uri} is not in Amazon ECR, where Lambda and SageMaker fetch images from.",
                "Push it there: 'remoe package PLAN --image' prints the commands.",
            )
        if place[1] != region:
            raise UsageError(
                f"The image {settings.image_uri} is in {place[1]}, and AWS runs it in its own region only; the deployment is in {region}.",
                f"Push it to a repository in {region}, or deploy with --region {place[1]}.",
            )
    if settings.endpoint is Endpoint.lambda_gpu and region in aws_reference().gpu_function.regions_without:
        raise UsageError(f"Lambda has no instances in {region}, on which a main function on lambda-gpu runs.", "Choose another region.")
    if (key := settings.rules.kms_key) and key.split(":")[3] != region:
        raise UsageError(f"The key {key} is not in {region}, where the deployment is.", "Give a key of that region to --kms-key.")


def remarks(settings: AwsSettings) -> tuple[str, ...]:
    """Say what the rules leave to the user."""
    gpu = settings.endpoint is Endpoint.lambda_gpu
    if not settings.rules.subnets:
        return (_NO_NETWORK,) if gpu else ()
    logs = _INSTANCE_LOGS if gpu else "Logs need neither."
    return (f"{'; '.join(_IN_VPC)}. {logs}",)


def check(account: Account, settings: AwsSettings) -> tuple[str, ...]:
    """Check that all is there; return what must be said about the rest.

    The rest cannot be looked at, or is of another account.

    Raises: UsageError for what is not there, or in another region.
    """
    check_region(settings, account.region)
    with plain_errors(account.origin):
        if settings.rules.bucket:
            Bucket.of(account, settings.name, settings.rules).check_own()
        return (*_image(account, settings), *_rules(account, settings.rules))


def _look(what: str, action: str, ask: Callable[[], Any], missing: Sequence[str], refusal: UsageError) -> tuple[Any, tuple[str, ...]]:
    """Ask AWS for one thing; return the answer, or None and a remark where that is not allowed.

    Raises: `refusal` where it is not there.
    """
    try:
        return ask(), ()
    except ClientError as error:
        if code_of(error) in missing:
            raise refusal from error
        if code_of(error) in ACCESS_DENIED:
            return None, (f"Whether {what} is there is not known: these credentials may not call {action}.",)
        raise


def _image(account: Account, settings: AwsSettings) -> Iterator[str]:
    uri = settings.image_uri
    if uri is None or (parts := policies.image_parts(uri)) is None:
        return
    owner, region, repository = parts
    if owner != account.id:
        who = f"The image is of account {owner}, and the deployment of {account.id}"
        yield f"{who}: the repository's policy must let {account.id} fetch it, or AWS refuses the main function."
    digest, tag = re.search(r"@(sha256:[0-9a-f]{64})$", uri), re.search(r":([^:/@]+)$", uri)
    wanted = {"imageDigest": digest[1]} if digest else {"imageTag": tag[1] if tag else "latest"}

    def describe() -> Any:
        try:
            return account.client("ecr").describe_images(registryId=owner, repositoryName=repository, imageIds=[wanted])
        except ClientError as error:
            if code_of(error) == "RepositoryNotFoundException":
                raise UsageError(f"Account {owner} has no repository {repository} in {region}.", _PUSH) from error
            raise

    refusal = UsageError(f"The repository {repository} has no image {next(iter(wanted.values()))}.", _PUSH)
    _, said = _look(uri, "ecr:DescribeImages", describe, ("ImageNotFoundException",), refusal)
    yield from said


def _rules(account: Account, rules: AccountRules) -> Iterator[str]:
    if (policy := rules.permissions_boundary) is not None:
        refusal = UsageError(f"There is no policy {policy}.", "Correct --permissions-boundary.")
        yield from _look(policy, "iam:GetPolicy", lambda: account.client("iam").get_policy(PolicyArn=policy), ("NoSuchEntity",), refusal)[1]
    if (key := rules.kms_key) is not None:
        refusal = UsageError(f"There is no key {key}.", "Correct --kms-key.")
        missing = ("NotFoundException", "InvalidArnException")
        found, said = _look(key, "kms:DescribeKey", lambda: account.client("kms").describe_key(KeyId=key), missing, refusal)
        if found and (state := found["KeyMetadata"].get("KeyState", "Enabled")) != "Enabled":
            raise UsageError(f"The key {key} cannot encrypt: it is {state}.", "Enable it, or give another one to --kms-key.")
        yield from said
    if rules.subnets:
        yield from _vpc(account, rules)


def _vpc(account: Account, rules: AccountRules) -> Iterator[str]:
    client = account.client("ec2")
    subnets, said = _look(
        "the subnet",
        "ec2:DescribeSubnets",
        lambda: client.describe_subnets(SubnetIds=list(rules.subnets))["Subnets"],
        ("InvalidSubnetID.NotFound",),
        UsageError(f"Not all subnets are in {account.region}: {', '.join(rules.subnets)}.", "Correct --subnet."),
    )
    yield from said
    groups, said = _look(
        "the security group",
        "ec2:DescribeSecurityGroups",
        lambda: client.describe_security_groups(GroupIds=list(rules.security_groups))["SecurityGroups"],
        ("InvalidGroup.NotFound", "InvalidGroupId.Malformed"),
        UsageError(f"Not all security groups are in {account.region}: {', '.join(rules.security_groups)}.", "Correct --security-group."),
    )
    yield from said
    found = {each["VpcId"] for each in (*(subnets or ()), *(groups or ()))}
    if len(found) > 1:
        message = f"The subnets and security groups are of several VPCs: {', '.join(sorted(found))}."
        raise UsageError(message, "Give those of one VPC.")
