"""`remoe serve`: the main function on one's own machine, against functions that are deployed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli import bounded
from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.options import CacheOption, DeviceOption, SpeculateOption, caches
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import UsageError

TOKEN = "REMOE_API_TOKEN"
_TOKEN_LIMIT = bounded.Limit(4096)
EXAMPLES = examples(
    "remoe serve demo",
    "remoe serve olmoe --target aws --port 9000   # the main function here, the experts on AWS",
    "remoe serve olmoe --device cuda --concurrency 8",
)


def command(
    name: NameArgument,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, metavar="PORT", help="Port to listen on.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"File with a token that clients have to send; ${TOKEN} can hold it instead.")
    ] = None,
    device: DeviceOption = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Requests that are answered at once; by default as the plan says."),
    ] = None,
    speculate: SpeculateOption = None,
    cache_experts: CacheOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Run a deployment's main function on this machine, until you press Ctrl-C.

    It loads the local experts and all other weights, calls the deployed expert functions, and speaks the APIs of OpenAI and Anthropic:
    point a client at http://127.0.0.1:8080/v1. docs/reference/api.md lists what it takes. Without --device it takes a GPU if the plan has
    one. On loopback it answers processes of your user only, and no web page.
    """
    from remoe_cli.deploy.target import ServeOptions
    from remoe_cli.model.draft import speculate_of

    token, asked = _token(token_file), None if speculate is None else speculate_of(speculate)
    deployed = pick(target, region, profile)
    deployed.serve(name, host, port, ServeOptions(token, device, concurrency, asked, caches(cache_experts)))


def _token(file: Path | None) -> str | None:
    """Return the token of a file, or of the environment; raises UsageError for one that cannot be a token."""
    if file is None:
        if TOKEN not in os.environ:
            return None
        text, where = os.environ[TOKEN], f"${TOKEN}"
    else:
        try:
            text, where = bounded.read_bytes(file, _TOKEN_LIMIT).decode("ascii"), str(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"The token file {file} cannot be read: {error}.", "Give a file that holds a token.") from None
    token = text.strip()
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise UsageError(f"{where} holds no token.", "A token is one word of printable ASCII characters.")
    return token
