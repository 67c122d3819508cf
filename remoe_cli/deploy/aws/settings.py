"""What the user chose about a deployment on AWS, besides the plan."""

from __future__ import annotations

from dataclasses import dataclass

from remoe_cli.deploy.endpoint import Endpoint


@dataclass(frozen=True)
class AwsSettings:
    """`python` is the minor version, such as 3.13; `architecture` x86_64 or arm64, of the expert functions and of a main function on
    Lambda. `image_uri` is the main function's container image, None where there is no such function or it is not yet known.

    monthly_alert_usd      a month's, at which AWS sends a mail to `alert_email`; None for no budget
    concurrency     instances of all functions that the account may run at once; a new account has fewer than AWS's default
    """

    name: str
    architecture: str
    python: str
    endpoint: Endpoint
    image_uri: str | None = None
    log_days: int = 14
    monthly_alert_usd: float | None = None
    alert_email: str | None = None
    concurrency: int = 1000


def endpoint_of(main_name: str) -> Endpoint:
    """The kind of endpoint that a main spec of the catalog calls for; none for what AWS does not sell."""
    if main_name.startswith("lambda-"):
        return Endpoint.aws_lambda
    return Endpoint.sagemaker if main_name.startswith("ml.") else Endpoint.none
