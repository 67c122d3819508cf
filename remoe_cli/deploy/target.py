"""What every place to deploy to can do.

deploy/local/target.py and deploy/aws/target.py implement it; cli/target.py picks one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.console import Overview
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.model.draft import Speculate
from remoe_cli.plan.document import Plan
from remoe_cli.runtime.client import MainAddress
from remoe_cli.runtime.device_choice import DeviceChoice
from remoe_cli.runtime.kept import Book


@dataclass(frozen=True)
class DeployOptions:
    """What the user chooses about a deployment besides its plan.

    endpoint            what runs the main function; None: what the target does by default
    rtt_ms              local: network round trip in ms that is added to each invocation
    accept_loss         whether experts may be quantised that lose more than is allowed
    image_uri           AWS: the main function's container image
    monthly_alert_usd   AWS: a month's spending in USD at which `alert_email` gets a mail; None: no mail
    speculate           how many draft tokens a pass of the main function may have (model/draft.py); None: as the plan says
    cache_experts       whether the main function keeps remote experts in spare memory (runtime/expert_cache.py)
    rules               AWS: what the account demands; what is not given is as in the deployment that stands
    """

    endpoint: Endpoint | None = None
    rtt_ms: float = 0.0
    accept_loss: bool = False
    image_uri: str | None = None
    monthly_alert_usd: float | None = None
    alert_email: str | None = None
    rules: AccountRules = field(default_factory=AccountRules)
    speculate: Speculate | None = None
    cache_experts: bool = False

    def drafts(self, plan: Plan, say: Callable[[str], None]) -> Speculate:
        """Return how many draft tokens a pass may have, and say where the plan counts on another number."""
        if self.speculate is None or self.speculate == plan.speculate:
            return plan.speculate
        say(
            f"warning: The plan is for --speculate {plan.speculate}, and the deployment has --speculate {self.speculate}: "
            "what answers take and cost is not what the plan says."
        )
        return self.speculate


@dataclass(frozen=True)
class ServeOptions:
    """What the user chooses about serving on this machine.

    token      that clients have to send; None: whoever may ask is answered
    device     of everything but the experts; None: where the plan has it
    concurrency   requests that are answered at once; None: as many as the plan counts on
    speculate     how many draft tokens a pass may have; None: as deployed
    cache_experts   whether remote experts are kept in spare memory; None: as deployed
    """

    token: str | None = field(default=None, repr=False)
    device: DeviceChoice | None = None
    concurrency: int | None = None
    speculate: Speculate | None = None
    cache_experts: bool | None = None


SERVE_PLAINLY = ServeOptions()


class Target(Protocol):
    """A place to deploy to. Documents are those that the commands print with --json.

    Raises: DeployError from every method but `deploy` for a name that is not deployed, UsageError for one that cannot be a name.
    """

    def preview(self, plan_path: Path, name: str, options: DeployOptions) -> tuple[dict[str, Any], Overview]:
        """Return what `deploy` would do where nothing is deployed: as a document, and for people.

        No account is needed.

        Raises: ArtifactError for a plan or catalog that cannot be read, UsageError for one that the target does not take, and where the
        target has no preview.
        """

    def deploy(self, plan_path: Path, name: str, options: DeployOptions) -> dict[str, Any]:
        """Deploy a plan; return the status document.

        Raises: ArtifactError for a plan that the verifier does not confirm, UsageError for an option or a size that the target does not
        take, HeldError when the name is taken or somebody else works on it, DeployError when it fails and nothing is left of it.
        """

    def names(self) -> list[str]:
        """List the names of all deployments: on this machine, or in one account and region."""

    def status(self, name: str) -> dict[str, Any]:
        """Describe a deployment: `name`, `target`, `state`, `main` (None: no main function), `functions`.

        Each target adds more.
        """

    def overview(self, status: dict[str, Any]) -> Overview:
        """Write a status document for people."""

    def logs(self, name: str, function: str | None = None, lines: int = 50) -> dict[str, list[str]]:
        """Return the last `lines` lines of each log, by its source, or of one `function` only.

        Raises: DeployError for a function that the deployment does not have.
        """

    def main_address(self, name: str) -> MainAddress:
        """Return where the main function takes requests.

        Raises: DeployError for a deployment of functions only, or whose main function does not run.
        """

    def deployed_plan(self, name: str) -> Path:
        """Return a file with the plan that was deployed."""

    def serve(self, name: str, host: str, port: int, asked: ServeOptions = SERVE_PLAINLY) -> None:
        """Run the main function in this process, against the deployed functions, until it is interrupted."""

    def receipts(self, name: str) -> Book:
        """Return the receipts that this machine keeps of a deployment; they outlive it."""

    def deployed_at(self, name: str) -> datetime | None:
        """Return when a deployment was made; None where the target does not tell."""

    def destroy(self, name: str) -> dict[str, Any]:
        """Remove a deployment; return a document with `name`, `target` and `state`, and with what is `left`.

        Locally `state` is "absent" when there was none.

        Raises: HeldError while somebody else works on it, PartialDeployError for what cannot be removed.
        """
