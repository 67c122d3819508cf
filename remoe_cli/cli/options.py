"""Arguments and options that several commands have: profiles, plans and prompts."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.model.chat import Prompt
    from remoe_cli.profile.prompts import PromptSet

_LONGEST_PROMPT = 32 << 20  # characters
ProfileArgument = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile made by 'remoe profile'.")]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by 'remoe plan'.")]

PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt; '-' reads it from standard input.")]
DATA = typer.Option(
    "--data",
    metavar="FILE",
    help="Prompts or conversations: a .jsonl, .json, .txt, .csv, .tsv or .parquet file (also .gz), a Hugging Face dataset id, or '-' for "
    "standard input (JSON, or plain text, one prompt a line).",
)
DataOption = Annotated[str | None, DATA]
FIELD_HELP = "Field of --data that holds the prompt, such as a.b.0.c; by default also messages and other usual formats."
FieldOption = Annotated[str, typer.Option(metavar="NAME", help=FIELD_HELP)]
LimitOption = Annotated[int | None, typer.Option(min=1, metavar="PROMPTS", help="Read at most this many prompts of --data.")]


def read_data(data: str, field: str, limit: int | None = None) -> PromptSet:
    """Read the prompts of --data, and say how many rows were left out; raises what `read_prompts` raises."""
    from remoe_cli.profile.prompts import read_prompts

    # Not while somebody types the prompts.
    with nullcontext() if data == "-" else output.progress("Reading the prompts"):
        prompts = read_prompts(data, field, limit)
    if prompts.skipped:
        rows, are = ("row", "was") if prompts.skipped == 1 else ("rows", "were")
        output.say(f"{prompts.skipped} {rows} of {prompts.source} {are} left out: nothing is asked there.")
    return prompts


def texts_of(prompt: str | None, data: str | None, field: str) -> tuple[Prompt, ...]:
    """Return the one prompt, or the prompts of the file; exactly one of the two is given.

    Raises: UsageError when standard input holds no text, and what `read_prompts` raises.
    """
    if data is not None:
        return read_data(data, field).texts
    if prompt != "-":
        return (str(prompt),)
    text = sys.stdin.read(_LONGEST_PROMPT + 1).rstrip("\r\n")
    if len(text) > _LONGEST_PROMPT:
        raise UsageError(f"The prompt on standard input has more than {_LONGEST_PROMPT:,} characters, which is the most.", "Shorten it.")
    if not text.strip():
        raise UsageError("Standard input holds no prompt.", "Write the prompt to standard input, or give --prompt TEXT.")
    return (text,)
