"""`remoe logs`: what functions and servers printed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.target import ProfileOption, RegionOption, Target, TargetOption, account, only_on_aws


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    function: Annotated[str | None, typer.Option(help="Only this function, or 'main' or 'supervisor'.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Last lines of each.")] = 20,
    target: TargetOption = Target.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show the last lines of each log."""
    only_on_aws(target, region=region, profile=profile)
    if target is Target.aws:
        from remoe_cli.deploy.aws.status import logs as logs_on_aws

        found = logs_on_aws(account(region, profile), name, function, lines)
    else:
        from remoe_cli.deploy.local.lifecycle import logs

        found = logs(name, function, lines)

    def show() -> None:
        for source, text in found.items():
            output.line(f"== {source}")
            for each in text:
                output.line(each)

    output.result({"name": name, "logs": found}, show)
