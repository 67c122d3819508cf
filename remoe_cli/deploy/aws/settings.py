"""What is fixed about a deployment on AWS besides its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import names
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.model.draft import Speculate


@dataclass(frozen=True)
class AwsSettings:
    """The settings of one deployment.

    architecture        x86_64 or arm64, of the expert functions and of a main function on Lambda
    python              minor version of the expert functions, such as 3.13
    image_uri           the main function's container image; None where there is none, or it is not known yet
    log_days            days that logs are kept
    monthly_alert_usd   a month's spending at which AWS sends a mail to `alert_email`; None: no mail
    concurrency         instances of all functions that the account may run at once; a new account has fewer than AWS's default
    speculate           how many draft tokens a pass of the main function may have (model/draft.py)
    cache_experts       whether the main function keeps remote experts in spare memory (runtime/expert_cache.py)
    rules               what the account demands of everything
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
    rules: AccountRules = field(default_factory=AccountRules)
    speculate: Speculate = "off"
    cache_experts: bool = False

    @property
    def bucket(self) -> str:
        """Return the bucket's name, in which a template's pseudo parameters may stand."""
        return self.rules.bucket or names.bucket(self.name, names.ACCOUNT, names.REGION)

    def key(self, key: str) -> str:
        """Return where in the bucket an object is."""
        return names.prefix(self.name, self.rules.bucket) + key


def endpoint_of(main_name: str) -> Endpoint:
    """Return the kind of endpoint that a catalog's main function needs; none where AWS does not sell it."""
    if main_name.startswith(f"{Endpoint.lambda_gpu}."):
        return Endpoint.lambda_gpu
    if main_name.startswith("lambda-"):
        return Endpoint.aws_lambda
    return Endpoint.sagemaker if main_name.startswith("ml.") else Endpoint.none
