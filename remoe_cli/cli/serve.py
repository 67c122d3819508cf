"""`remoe serve`: the main function on one's own machine, against functions that are deployed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick

EXAMPLES = examples("remoe serve demo", "remoe serve olmoe --target aws --port 9000   # the main function here, the experts on AWS")


def command(
    name: NameArgument,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, metavar="PORT", help="Port to listen on.")] = 8080,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Run a deployment's main function on this machine, until you press Ctrl-C.

    It loads the local experts and all other weights, calls the deployed expert functions, and answers GET /ping and POST /invocations.
    On loopback it answers processes of your user only, and no web page.
    """
    pick(target, region, profile).serve(name, host, port)
