"""`remoe serve`: the main function on one's own machine, against functions that are deployed."""

from __future__ import annotations

from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.deploy import Target


def command(
    name: Annotated[str, typer.Argument(help="A deployment.")],
    target: Annotated[Target, typer.Option(help="Where its functions are.")] = Target.local,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8080,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Load the main function's share here and answer over HTTP until interrupted: GET /ping, POST /invocations."""
    from remoe_cli.deploy.local.target import serve

    output.say(f"Serving '{name}' on http://{host}:{port}; GET /ping answers 200 once the model is loaded. Ctrl-C ends it.")
    serve(name, host, port)
