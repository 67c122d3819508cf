"""`remoe deploy`: put a plan to work, on the local twin or on AWS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output, status
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import PlanArgument
from remoe_cli.cli.target import (
    ON_AWS,
    ProfileOption,
    RegionOption,
    Target,
    TargetOption,
    YesOption,
    account,
    agreed,
    can_ask,
    only_on_aws,
)
from remoe_cli.deploy.aws.settings import AwsSettings, endpoint_of
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.deploy.aws.deployment import Review
    from remoe_cli.deploy.aws.money import Money
    from remoe_cli.deploy.aws.preview import Table
    from remoe_cli.deploy.aws.quotas import QuotaCheck

EXAMPLES = examples(
    "remoe deploy plans/demo.json --name demo",
    "remoe deploy plans/olmoe.json --target aws --dry-run   # needs no account",
    "remoe deploy plans/olmoe.json --target aws --monthly-alert 50 --alert-email me@example.org",
)


def command(
    plan: PlanArgument,
    target: TargetOption = Target.local,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the deployment; by default the plan's file name.")] = None,
    rtt_ms: Annotated[float, typer.Option(min=0, metavar="MS", help="Local only: network round trip to add to each call, in ms.")] = 0.0,
    endpoint: Annotated[
        Endpoint | None,
        typer.Option(
            help="What runs the main function; by default a server here, on AWS what the plan chose; 'none' leaves it to 'remoe serve'."
        ),
    ] = None,
    endpoint_image: Annotated[
        str | None, typer.Option(metavar="URI", help="The main function's container image in ECR.", rich_help_panel=ON_AWS)
    ] = None,
    monthly_alert: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="USD", help="Send an e-mail when a month's spending reaches this, in USD.", rich_help_panel=ON_AWS),
    ] = None,
    alert_email: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Who gets that e-mail.", rich_help_panel=ON_AWS)] = None,
    region: RegionOption = None,
    profile: ProfileOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only show what would be created and what it costs; needs no credentials.", rich_help_panel=ON_AWS),
    ] = False,
    yes: YesOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Create a plan's expert functions and its main function, on this machine or on AWS."""
    name = name or _name_of(plan)
    if target is Target.local:
        on_aws = {"endpoint_image": endpoint_image, "monthly_alert": monthly_alert, "alert_email": alert_email, "dry_run": dry_run}
        only_on_aws(target, **on_aws, region=region, profile=profile)
        _deploy_here(plan, name, rtt_ms, endpoint)
        return
    if (monthly_alert is None) != (alert_email is None):
        raise UsageError("A monthly alert needs an amount and an address.", "Give both --monthly-alert USD and --alert-email ADDRESS.")
    settings = _settings(plan, name, endpoint, endpoint_image, monthly_alert, alert_email)
    if dry_run:
        _preview(plan, settings)
    else:
        can_ask(yes)
        _deploy_on_aws(plan, settings, region, profile, yes)


def _name_of(plan: Path) -> str:
    """The plan's file name, made a name that every target takes."""
    return re.sub(r"[^a-z0-9]+", "-", plan.stem.lower()).strip("-")[:24].rstrip("-")


def _deploy_here(plan: Path, name: str, rtt_ms: float, endpoint: Endpoint | None) -> None:
    from remoe_cli.deploy.local.target import deploy

    with output.progress("Packaging functions") as progress:
        document = deploy(plan, name, rtt_ms=rtt_ms, say=output.say, progress=progress, endpoint=endpoint)
    output.result(document, lambda: status.show(document))


def _settings(
    plan_path: Path, name: str, endpoint: Endpoint | None, image: str | None, budget: float | None, email: str | None
) -> AwsSettings:
    from remoe_cli.artifacts import read_json
    from remoe_cli.package.dependencies import PYTHON
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.document import Plan

    plan = read_json(plan_path, Plan)
    return AwsSettings(
        name=name,
        architecture=read_catalog(plan.catalog.path).architecture,
        python=PYTHON,
        endpoint=endpoint or endpoint_of(plan.main.name),
        image_uri=image,
        monthly_alert_usd=budget,
        alert_email=email,
    )


def _preview(plan: Path, settings: AwsSettings) -> None:
    from remoe_cli.deploy.aws.target import preview

    document, shown = preview(plan, settings)
    output.result(document, lambda: _show(shown.tables, shown.remarks))


def _show(tables: Iterable[Table], remarks: Iterable[str]) -> None:
    for table in tables:
        output.table(table.title, table.columns, table.rows)
    for remark in remarks:
        output.line(remark)


def _deploy_on_aws(plan: Path, settings: AwsSettings, region: str | None, profile: str | None, yes: bool) -> None:
    from remoe_cli.deploy.aws import diff
    from remoe_cli.deploy.aws.preview import remarks
    from remoe_cli.deploy.aws.target import deploy

    def agree(review: Review, quotas: Sequence[QuotaCheck], money: Money) -> bool:
        if not output.is_json():
            _show([diff.table(review.changes, money)], remarks(quotas, money))
        where = f"account {review.account.id}, {review.account.region}"
        return agreed(f"Deploy '{settings.name}' to {where}, uploading {review.upload_bytes / 1e6:,.1f} MB?", yes)

    document = deploy(plan, settings, account(region, profile), say=output.say, progress=output.progress, agree=agree)
    output.result(document, lambda: status.show_on_aws(document))
