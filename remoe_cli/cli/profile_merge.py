"""`remoe profile merge`: slices that were profiled apart, joined into the profile of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.profile_shared import OutOption, finish

EXAMPLES = examples("remoe profile merge part-1 part-2 part-3 part-4 -o profiles/model")


def command(
    slices: Annotated[
        list[Path], typer.Argument(metavar="SLICE", help="All profiles made with --shard 1/N to N/N, in any order.", show_default=False)
    ],
    out: OutOption,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Join the slices of a profile into exactly the profile that one machine would have made."""
    from remoe_cli.profile.merge import merge

    with output.progress("Joining the slices"):
        made = merge([folder.resolve() for folder in slices], out)
    finish(made, out)
