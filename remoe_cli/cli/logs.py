"""`remoe logs`: what functions and servers printed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick

EXAMPLES = examples("remoe logs demo", "remoe logs olmoe --target aws --function main --lines 100")


def command(
    name: NameArgument,
    function: Annotated[str | None, typer.Option(metavar="NAME", help="Only this function's log; also 'main' or 'supervisor'.")] = None,
    lines: Annotated[int, typer.Option(min=1, metavar="LINES", help="Lines to show of each log.")] = 20,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show the last lines that a deployment's functions and servers have logged."""
    found = pick(target, region, profile).logs(name, function, lines)

    def show() -> None:
        for source, text in found.items():
            output.line(f"== {source}")
            for each in text:
                output.line(each)

    output.result({"name": name, "logs": found}, show)
