"""Arguments and options that several commands have: profiles, plans and prompts."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli import bounded
from remoe_cli.cli import output
from remoe_cli.cli.pipeline_files import refuse_other_file
from remoe_cli.cli.visible import is_utf8
from remoe_cli.errors import UsageError
from remoe_cli.runtime.device_choice import DeviceChoice

if TYPE_CHECKING:
    from remoe_cli.profile.prompts import PromptSet

_LONGEST_PROMPT = bounded.Limit(32 * bounded.MIB)
_AS_UTF8 = "Write it in UTF-8, as a terminal in a UTF-8 locale does."

ProfileArgument = Annotated[Path, typer.Argument(metavar="PROFILE", callback=refuse_other_file, help="A profile made by 'remoe profile'.")]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", callback=refuse_other_file, help="A plan made by 'remoe plan'.")]

DeviceOption = Annotated[
    DeviceChoice | None,
    typer.Option(help="Where everything but the experts runs: 'auto' takes a GPU where torch can use one."),
]
SpeculateOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|off|N",
        help="Draft tokens that one forward pass may try: as many as pay, none, or N; by default as planned or deployed.",
    ),
]


class CacheChoice(StrEnum):
    """Whether remote experts are kept in spare memory."""

    auto = "auto"
    off = "off"


CacheOption = Annotated[
    CacheChoice | None,
    typer.Option(
        "--cache-experts",
        help="Keep remote experts that are used most in memory of the main function that the plan does not need: as many as fit, or none.",
    ),
]
# typer makes choices of enums only; the words are those of model/quantise.py.
ExpertForm = Enum("ExpertForm", {name: name for name in ("int8", "int4")}, type=str)  # type: ignore[misc]
AcceptLossOption = Annotated[
    bool, typer.Option("--accept-loss", help="Deploy quantised experts that change the model more than is allowed.")
]
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


def caches(choice: CacheChoice | None) -> bool | None:
    """Tell what --cache-experts asks for; None where it is not given."""
    return None if choice is None else choice is CacheChoice.auto


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


def prompts_of(prompt: str | None, data: str | None, field: str) -> PromptSet:
    """Return the one prompt, or the prompts of the file; exactly one of the two is given.

    Raises: UsageError for a prompt that is not UTF-8, when standard input holds no text, and what `read_prompts` raises.
    """
    if data is not None:
        return read_data(data, field)
    from remoe_cli.profile.prompts import PromptSet

    text = _standard_input() if prompt == "-" else str(prompt)
    if not is_utf8(text):
        raise UsageError("The prompt is not UTF-8.", _AS_UTF8)
    return PromptSet("--prompt", "prompt", (text,))


def _standard_input() -> str:
    from remoe_cli.profile.prompts.files import decoded, standard_input

    try:
        content = bounded.read_stream(decoded(standard_input(), "Standard input"), _LONGEST_PROMPT)
        text = str(content, "utf-8").replace("\r\n", "\n").rstrip("\n")
    except bounded.LimitError as error:
        raise UsageError(f"The prompt on standard input cannot be read: {error}.", "Shorten it.") from None
    except UnicodeDecodeError:
        raise UsageError("The prompt is not UTF-8.", _AS_UTF8) from None
    if not text.strip():
        raise UsageError("Standard input holds no prompt.", "Write the prompt to standard input, or give --prompt TEXT.")
    return text
