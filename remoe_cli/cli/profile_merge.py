"""`remoe profile merge`: slices of a profile joined into the whole, or profiles mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.profile_shared import OutOption, finish
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

EXAMPLES = examples(
    "remoe profile merge part-1 part-2 part-3 part-4 -o profiles/model",
    "remoe profile merge profiles/chat profiles/code --weight chat=0.7,code=0.3 -o profiles/mix",
)


def command(
    slices: Annotated[
        list[Path],
        typer.Argument(
            metavar="SLICE", help="All profiles made with --shard 1/N to N/N, in any order; or those to mix.", show_default=False
        ),
    ],
    out: OutOption,
    weight: Annotated[
        str | None,
        typer.Option(metavar="NAME=SHARE,..", help="Mix profiles of different prompts: the share of requests that are like each one's."),
    ] = None,
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Join the slices of a profile into exactly what one machine would have made, or mix profiles.

    With --weight, profiles of different prompts become that of a mix of them.
    """
    from remoe_cli.profile.record import refuse_foreign

    folders = [folder.resolve() for folder in slices]
    refuse_foreign(out)
    agree_to_replace(yes, out / "profile.json")
    if weight is None:
        from remoe_cli.profile.merge import merge

        with output.progress("Joining the slices"):
            made = merge(folders, out)
    else:
        from remoe_cli.profile.mix import mix

        weights = _weights(weight, folders)
        with output.progress("Mixing the profiles"):
            made = mix(weights, out)
    finish(made, out)


def _weights(text: str, folders: list[Path]) -> dict[Path, float]:
    """Read shares by the names of the folders, or by their paths.

    Raises: UsageError for a text that does not name each folder once, with a number.
    """
    from remoe_cli.errors import UsageError

    hint = "Give the share of each, such as --weight chat=0.7,code=0.3."
    weights: dict[Path, float] = {}
    for row in text.split(","):
        name, equals, share = row.strip().rpartition("=")
        named = [folder for folder in folders if name and (folder.name == name or folder == Path(name).resolve())]
        if not equals or len(named) != 1 or named[0] in weights:
            raise UsageError(f"--weight has '{row.strip()}', which is no share of one of the profiles that are mixed.", hint)
        try:
            weights[named[0]] = float(share)
        except ValueError:
            raise UsageError(f"--weight has '{share}' for {name}, which is no number.", hint) from None
    if missing := [folder for folder in folders if folder not in weights]:
        raise UsageError(f"--weight does not say how much of {missing[0]} is in the mix.", hint)
    return weights
