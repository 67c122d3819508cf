"""`remoe deploy`: put a plan to work, on the local twin."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output, status
from remoe_cli.deploy.aws.settings import Endpoint


class Target(StrEnum):
    local = "local"


def command(
    plan: Annotated[Path, typer.Argument(help="A plan made by 'remoe plan'.")],
    target: Annotated[Target, typer.Option(help="Where to deploy: the twin of AWS Lambda on this machine.")] = Target.local,
    name: Annotated[str | None, typer.Option(help="Name of the deployment; the plan's file name by default.")] = None,
    rtt_ms: Annotated[float, typer.Option(min=0, help="Network round trip to add to each invocation, in ms.")] = 0.0,
    endpoint: Annotated[
        Endpoint | None, typer.Option(help="What runs the main function: a Lambda function, or nothing here; a server by default.")
    ] = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Package PLAN's remote experts as functions and start them with the main server."""
    from remoe_cli.deploy.local.target import deploy

    with output.progress("Packaging functions") as progress:
        document = deploy(plan, name or plan.stem, rtt_ms=rtt_ms, say=output.say, progress=progress, endpoint=endpoint)
    output.result(document, lambda: status.show(document))
