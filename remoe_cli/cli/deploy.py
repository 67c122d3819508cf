"""`remoe deploy`: put a plan to work, on the local twin or on AWS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import AcceptLossOption, CacheChoice, CacheOption, PlanArgument, SpeculateOption, caches
from remoe_cli.cli.target import ON_AWS, ProfileOption, RegionOption, TargetName, TargetOption, YesOption, only_on_aws, pick
from remoe_cli.cli.times import time_in
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.errors import UsageError

EXAMPLES = examples(
    "remoe deploy plans/demo.json --name demo",
    "remoe deploy plans/olmoe.json --target aws --dry-run   # needs no account",
    "remoe deploy plans/olmoe.json --target aws --tag team=ml --monthly-alert 50 --alert-email me@b.org",
)


def command(
    plan: PlanArgument,
    target: TargetOption = TargetName.local,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the deployment; by default the plan's file name.")] = None,
    rtt_ms: Annotated[
        float,
        typer.Option(parser=time_in("ms"), metavar="TIME", help="Local only: network round trip to add to each call, in ms or as 0.03s."),
    ] = 0.0,
    endpoint: Annotated[
        Endpoint | None,
        typer.Option(
            help="What runs the main function; by default a server here, on AWS what the plan chose; 'none' leaves it to 'remoe serve'."
        ),
    ] = None,
    speculate: SpeculateOption = None,
    cache_experts: CacheOption = CacheChoice.off,
    accept_loss: AcceptLossOption = False,
    endpoint_image: Annotated[
        str | None, typer.Option(metavar="URI", help="The main function's container image in ECR.", rich_help_panel=ON_AWS)
    ] = None,
    monthly_alert: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="USD", help="Send an e-mail when a month's spending reaches this, in USD.", rich_help_panel=ON_AWS),
    ] = None,
    alert_email: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Who gets that e-mail.", rich_help_panel=ON_AWS)] = None,
    permissions_boundary: Annotated[
        str | None, typer.Option(metavar="ARN", help="IAM policy that bounds every role.", rich_help_panel=ON_AWS)
    ] = None,
    role_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Path of every role and policy, such as /teams/ml/.", rich_help_panel=ON_AWS)
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Tag of everything that can have tags; may be repeated.", rich_help_panel=ON_AWS),
    ] = None,
    kms_key: Annotated[
        str | None, typer.Option(metavar="ARN", help="Key that encrypts objects, logs and variables.", rich_help_panel=ON_AWS)
    ] = None,
    bucket: Annotated[
        str | None, typer.Option(metavar="NAME", help="A bucket of yours, in place of one that remoe makes.", rich_help_panel=ON_AWS)
    ] = None,
    subnet: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Subnet of your VPC; may be repeated; goes with --security-group.", rich_help_panel=ON_AWS),
    ] = None,
    security_group: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Security group of your VPC; may be repeated.", rich_help_panel=ON_AWS)
    ] = None,
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
    from remoe_cli.deploy.account_rules import account_rules
    from remoe_cli.deploy.target import DeployOptions
    from remoe_cli.model.draft import speculate_of

    name = name or _name_of(plan)
    rules = {"permissions_boundary": permissions_boundary, "role_path": role_path, "kms_key": kms_key, "bucket": bucket}
    several = {"tag": tag or None, "subnet": subnet or None, "security_group": security_group or None}
    only_on_aws(target, endpoint_image=endpoint_image, monthly_alert=monthly_alert, alert_email=alert_email, **rules, **several)
    if rtt_ms and target is not TargetName.local:
        raise UsageError("--rtt-ms goes with --target local.", "Leave --rtt-ms out: calls on AWS take the time that they take.")
    if (monthly_alert is None) != (alert_email is None):
        raise UsageError("A monthly alert needs an amount and an address.", "Give both --monthly-alert USD and --alert-email ADDRESS.")
    checked = account_rules(**rules, tags=tag or (), subnets=subnet or (), security_groups=security_group or ())
    options = DeployOptions(
        endpoint,
        rtt_ms,
        accept_loss,
        endpoint_image,
        monthly_alert,
        alert_email,
        checked,
        None if speculate is None else speculate_of(speculate),
        bool(caches(cache_experts)),
    )
    place = pick(target, region, profile, asks=None if dry_run else "deploy", yes=yes)
    if dry_run:
        document, overview = place.preview(plan, name, options)
        output.result(document, lambda: output.show_overview(overview))
        return
    document = place.deploy(plan, name, options)
    output.result(document, lambda: output.show_overview(place.overview(document)))


def _name_of(plan: Path) -> str:
    """The plan's file name, made a name that every target takes."""
    return re.sub(r"[^a-z0-9]+", "-", plan.stem.lower()).strip("-")[:24].rstrip("-") or "plan"
