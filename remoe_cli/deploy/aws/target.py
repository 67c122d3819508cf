"""The target AWS: a plan is read and checked, packaged and priced, and given to deployment.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from remoe_cli.deploy.account_rules import AccountRules
from remoe_cli.deploy.aws import access, checks, deployment, diff, managed_instance, money, packing, quotas, status, template
from remoe_cli.deploy.aws import preview as rows
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.aws.stack import Change
from remoe_cli.deploy.console import Console, Overview
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.inputs import check_model, read_inputs, read_without_profile
from remoe_cli.deploy.quantised import agreed_terms
from remoe_cli.deploy.target import SERVE_PLAINLY, DeployOptions, ServeOptions
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.package.dependencies import PYTHON
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan
from remoe_cli.runtime.client import MainAddress
from remoe_cli.runtime.kept import Book


@dataclass(frozen=True)
class AwsTarget:
    """Deployments in one AWS account and region (deploy/target.py says what each method does).

    connect   finds the account; it is called once, by the first method that needs the account
    region    the region that an option or the environment names, which a dry run checks without an account
    """

    connect: Callable[[], Account]
    console: Console
    region: str | None = None

    @cached_property
    def account(self) -> Account:
        with self.console.progress("Connecting to AWS"):
            return self.connect()

    def preview(self, plan_path: Path, name: str, options: DeployOptions) -> tuple[dict[str, Any], Overview]:
        plan, catalog, unverified = read_without_profile(plan_path)
        if plan.model.experts is not None and not unverified:
            agreed_terms(read_inputs(plan_path), options.accept_loss, self.console.say)
        contents = expected(plan)
        settings = _settings(plan, catalog, name, options, self.console.say)
        settings = replace(settings, rules=options.rules.over(AccountRules()))
        said = (*((unverified,) if unverified else ()), *self._looked_up(settings))
        made = template.templates(plan, contents, settings)
        limits, bill = quotas.check(plan, contents, settings), money.bill(plan, catalog, contents, settings)
        document = rows.dry_run(plan, made, contents, limits, bill)
        tables = (*rows.tables(made, limits, bill), *rows.kinds_table(plan), *rows.rules_table(settings))
        return document | {"remarks": list(said)}, Overview(tables, (*rows.remarks(plan, limits, bill), *said))

    def _looked_up(self, settings: AwsSettings) -> tuple[str, ...]:
        """Check what the options name, as far as this is possible without an account or with one; return what must be said.

        Only what is in an account makes a dry run ask for one.

        Raises: UsageError for what is not there, or in another region.
        """
        if self.region:
            checks.check_region(settings, self.region)
        said = checks.remarks(settings)
        if settings.image_uri is None and not settings.rules.document.keys() - {"tags", "role_path"}:
            return said
        try:
            account = self.account
        except RemoeError as error:
            return (*said, f"What these options name was not looked up, as there is no account: {error.message}")
        return (*said, *checks.check(account, settings))

    def deploy(self, plan_path: Path, name: str, options: DeployOptions) -> dict[str, Any]:
        """Check, package and deploy a plan; the document also has the `changes` that were made."""
        account = self.account  # before long work: what is wrong with the credentials is said at once
        with self.console.progress("Checking the plan"):
            plan, profile, catalog = inputs = read_inputs(plan_path)
        agreed_terms(inputs, options.accept_loss, self.console.say)
        check_model(plan, profile, self.console.progress)
        settings = _settings(plan, catalog, name, options, self.console.say)
        settings = replace(settings, rules=options.rules.over(deployment.recorded_rules(account, name)))
        if settings.endpoint is not Endpoint.none and settings.image_uri is None:
            raise UsageError(
                f"The main function on {settings.endpoint.value} needs its image in ECR.",
                "Make it with 'remoe package PLAN --image', then give --endpoint-image URI; or run it yourself: --endpoint none.",
            )
        if settings.endpoint is Endpoint.lambda_gpu:
            managed_instance.require_network(settings)
        for each in (*checks.remarks(settings), *checks.check(account, settings)):
            self.console.say(each)
        settings = replace(settings, concurrency=_concurrency(account) or settings.concurrency)
        package = packing.pack(plan, plan_path, profile, catalog, settings, self.console)
        made = template.templates(plan, package.contents, settings)
        limits = quotas.check(plan, package.contents, settings)
        if refused := next((quota for quota in limits if quota.severity == "error"), None):
            raise UsageError(
                f"AWS does not take this: {refused.name}, {refused.used:,.0f} of {refused.limit:,.0f} {refused.unit}.", refused.hint
            )
        bill = money.bill(plan, catalog, package.contents, settings)

        def explain(changes: Sequence[Change]) -> Overview:
            return Overview((diff.table(changes, bill), *rows.rules_table(settings)), rows.remarks(plan, limits, bill))

        return deployment.apply(account, name, made, package.objects, self.console, explain)

    def names(self) -> list[str]:
        account = self.account
        with self.console.progress(f"Looking for deployments in {account.region}"):
            return status.deployed_names(account)

    def status(self, name: str) -> dict[str, Any]:
        account = self.account
        with self.console.progress("Reading the status"):
            return status.read(account, name)

    def overview(self, status: dict[str, Any]) -> Overview:
        return rows.overview(status)

    def logs(self, name: str, function: str | None = None, lines: int = 50) -> dict[str, list[str]]:
        account = self.account
        with self.console.progress("Reading the logs"):
            return status.logs(account, name, function, lines)

    def main_address(self, name: str) -> MainAddress:
        account = self.account
        with self.console.progress("Finding the main function"):
            return access.main_address(account, name)

    def deployed_plan(self, name: str) -> Path:
        account = self.account
        with self.console.progress("Reading the deployed plan"):
            return access.deployed_file(account, name, "plan.json")

    def serve(self, name: str, host: str, port: int, asked: ServeOptions = SERVE_PLAINLY) -> None:
        access.serve(self.account, name, host, port, self.console, asked)

    def receipts(self, name: str) -> Book:
        return access.receipts(self.account, name)

    def deployed_at(self, name: str) -> datetime | None:
        return None

    def destroy(self, name: str) -> dict[str, Any]:
        return deployment.destroy(self.account, name, self.console)


def _settings(plan: Plan, catalog: Catalog, name: str, options: DeployOptions, say: Callable[[str], None]) -> AwsSettings:
    return AwsSettings(
        name=name,
        architecture=catalog.architecture,
        python=PYTHON,
        endpoint=options.endpoint or endpoint_of(plan.main.name),
        image_uri=options.image_uri,
        monthly_alert_usd=options.monthly_alert_usd,
        alert_email=options.alert_email,
        speculate=options.drafts(plan, say),
        cache_experts=options.cache_experts,
    )


def _concurrency(account: Account) -> int | None:
    """Return the instances that this account may run at once; None where it does not say."""
    try:
        return int(account.client("lambda").get_account_settings()["AccountLimit"]["ConcurrentExecutions"])
    except (BotoCoreError, ClientError, KeyError):
        return None
