"""Arguments and options that several commands have: profiles, plans and prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.errors import UsageError

ProfileArgument = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile made by 'remoe profile'.")]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by 'remoe plan'.")]

PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt; '-' reads it from standard input.")]
DATA = typer.Option(
    "--data",
    metavar="FILE",
    help="Prompts: a .jsonl, .json, .txt, .csv or .parquet file, a Hugging Face dataset id, or '-' for standard input "
    "(JSON objects or plain text, one a line).",
)
DataOption = Annotated[str | None, DATA]
FIELD_HELP = "Field of --data that holds the text of a prompt."
FieldOption = Annotated[str, typer.Option(metavar="NAME", help=FIELD_HELP)]
LimitOption = Annotated[int | None, typer.Option(min=1, metavar="PROMPTS", help="Read at most this many prompts of --data.")]


def texts_of(prompt: str | None, data: str | None, field: str) -> tuple[str, ...]:
    """Return the one prompt, or the prompts of the file; exactly one of the two is given.

    Raises: UsageError when standard input holds no text, and what `read_prompts` raises.
    """
    if data is not None:
        from remoe_cli.profile.prompts import read_prompts

        return read_prompts(data, field).texts
    if prompt != "-":
        return (str(prompt),)
    text = sys.stdin.read().rstrip("\r\n")
    if not text.strip():
        raise UsageError("Standard input holds no prompt.", "Write the prompt to standard input, or give --prompt TEXT.")
    return (text,)
