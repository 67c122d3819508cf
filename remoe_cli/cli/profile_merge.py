"""`remoe profile merge`: shards that were profiled apart, joined into the profile of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output, profile


def command(
    shards: Annotated[list[Path], typer.Argument(help="All profiles made with --shard 1/N to N/N, in any order.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Directory of the profile of the whole.")],
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Join the shards of a profile into exactly the profile that one machine would have made."""
    from remoe_cli.profile.merge import merge

    profile.finish(merge([shard.resolve() for shard in shards], out), out)
