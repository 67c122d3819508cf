"""`remoe destroy`: end a deployment, without remains."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """End every process of a deployment and remove every file of it."""
    from remoe_cli.deploy.local.lifecycle import destroy

    destroy(name)
    output.result({"name": name, "state": "destroyed"}, lambda: output.line(f"{name} is gone: no process and no file is left."))
