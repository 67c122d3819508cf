"""`remoe logs`: what functions and servers printed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    function: Annotated[str | None, typer.Option(help="Only this function, or 'main' or 'supervisor'.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Last lines of each.")] = 20,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Show the last lines of each log."""
    from remoe_cli.deploy.local.lifecycle import logs

    found = logs(name, function, lines)

    def show() -> None:
        for source, text in found.items():
            output.line(f"== {source}")
            for each in text:
                output.line(each)

    output.result({"name": name, "logs": found}, show)
