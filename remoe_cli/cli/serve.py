"""`remoe serve`: the main function on one's own machine, against functions that are deployed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.target import ProfileOption, RegionOption, Target, TargetOption, account, only_on_aws


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    target: TargetOption = Target.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8080,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Load the main function's share here and answer over HTTP until interrupted: GET /ping, POST /invocations."""
    only_on_aws(target, region=region, profile=profile)
    if target is Target.aws:
        from remoe_cli.deploy.aws.access import serve as serve_on_aws

        serve_on_aws(account(region, profile), name, host, port, output.say)
    else:
        from remoe_cli.deploy.local.target import serve

        serve(name, host, port, output.say)
