"""From a plan to a deployment on AWS: read and checked, packaged, priced, and given to deployment.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from remoe_cli import artifacts
from remoe_cli.deploy.aws import money, packing, quotas, template
from remoe_cli.deploy.aws import preview as rows
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.aws.deployment import Review, Say, apply
from remoe_cli.deploy.aws.money import Money
from remoe_cli.deploy.aws.preview import Table
from remoe_cli.deploy.aws.quotas import QuotaCheck
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.inputs import read_inputs
from remoe_cli.deploy.progress import Progress
from remoe_cli.errors import UsageError
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import Plan


@dataclass(frozen=True)
class Shown:
    """Tables, and the sentences that belong under them."""

    tables: tuple[Table, ...]
    remarks: tuple[str, ...]


def deploy(
    plan_path: Path,
    settings: AwsSettings,
    account: Account,
    *,
    say: Say,
    progress: Progress,
    agree: Callable[[Review, Sequence[QuotaCheck], Money], bool],
) -> dict[str, Any]:
    """Check the plan, package it, and make the stack what it says; returns the status document, with the `changes` that were made.

    Raises ArtifactError for a plan that the verifier does not confirm, UsageError for one that AWS does not take, and what `apply` does.
    """
    plan, profile, catalog = read_inputs(plan_path)
    if settings.endpoint is not Endpoint.none and settings.image_uri is None:
        raise UsageError(
            f"The main function on {settings.endpoint.value} needs its image in ECR.",
            "Make it with 'remoe package PLAN --image', then give --endpoint-image URI; or run it yourself: --endpoint none.",
        )
    settings = replace(settings, concurrency=_concurrency(account) or settings.concurrency)
    package = packing.pack(plan, plan_path, profile, catalog, settings, progress)
    made = template.templates(plan, package.contents, settings)
    checked = quotas.check(plan, package.contents, settings)
    if refused := next((quota for quota in checked if quota.severity == "error"), None):
        raise UsageError(
            f"AWS does not take this: {refused.name}, {refused.used:,.0f} of {refused.limit:,.0f} {refused.unit}.", refused.hint
        )
    bill = money.bill(plan, catalog, package.contents, settings)
    return apply(
        account,
        settings.name,
        made,
        package.objects,
        say=say,
        progress=progress,
        agree=lambda review: agree(review, checked, bill),
    )


def preview(plan_path: Path, settings: AwsSettings) -> tuple[dict[str, Any], Shown]:
    """What `deploy` would do in an account where nothing stands, from the plan alone: as a document, and for people.

    Raises ArtifactError for a plan or catalog that cannot be read, UsageError for one that AWS does not take.
    """
    plan = artifacts.read_json(plan_path, Plan)
    catalog, contents = read_catalog(plan.catalog.path), expected(plan)
    made = template.templates(plan, contents, settings)
    checked, bill = quotas.check(plan, contents, settings), money.bill(plan, catalog, contents, settings)
    document = rows.dry_run(plan, made, contents, checked, bill)
    return document, Shown(rows.tables(made, checked, bill), rows.remarks(checked, bill))


def _concurrency(account: Account) -> int | None:
    """Instances of all functions that this account may run at once; None where it does not say."""
    try:
        return int(account.client("lambda").get_account_settings()["AccountLimit"]["ConcurrentExecutions"])
    except (BotoCoreError, ClientError, KeyError):
        return None
