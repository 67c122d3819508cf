"""The only place that prints.

Results go to stdout; everything else (messages, progress, errors) to stderr. With --json stdout carries exactly one JSON
document; with --quiet messages and progress are dropped. Progress bars appear only on a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.errors import RemoeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from remoe_cli.deploy.console import Console, Overview, Report


@dataclass
class _Mode:
    json: bool = False
    quiet: bool = False
    verbose: bool = False


_mode = _Mode()


def _set_json(value: bool) -> bool:
    _mode.json = value
    return value


def _set_quiet(value: bool) -> bool:
    _mode.quiet = value
    return value


def _set_verbose(value: bool) -> bool:
    _mode.verbose = value
    return value


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.", callback=_set_json)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no messages and no progress.", callback=_set_quiet)]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print the tables of layers too.", callback=_set_verbose)]


def is_json() -> bool:
    return _mode.json


def is_verbose() -> bool:
    return _mode.verbose


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    if not _mode.quiet:
        print(message, file=sys.stderr, flush=True)


def result(document: BaseModel | Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print the command's result: the document with --json, else what `show` prints for people."""
    if not _mode.json:
        show()
        return
    data = document if isinstance(document, Mapping) else document.model_dump(mode="json")
    print(json.dumps(data, ensure_ascii=False, allow_nan=False), flush=True)


def line(text: str = "") -> None:
    """Print a line of the result for people on stdout."""
    print(text, flush=True)


def piece(text: str) -> None:
    """Print a piece of streamed text on stdout, without a line end."""
    print(text, end="", flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, the first column aligned left and all others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120).print(grid)


def ask(question: str) -> bool:
    """Ask on stderr; return whether the answer on stdin is 'y' or 'yes'."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_overview(overview: Overview) -> None:
    """Print tables, and the sentences that belong under them, on stdout."""
    for each in overview.tables:
        table(each.title, each.columns, each.rows)
    for remark in overview.remarks:
        line(remark)


def console(*, yes: bool = False) -> Console:
    """Make the console of a command that deploys; with `yes` it agrees to everything without a question."""
    from remoe_cli.deploy.console import NO_OVERVIEW, Console

    def agree(question: str, overview: Overview = NO_OVERVIEW) -> bool:
        if not is_json():
            show_overview(overview)
        return yes or ask(question)

    return Console(say, progress, agree)


@contextmanager
def progress(title: str, *, of_bytes: bool = False) -> Iterator[Report]:
    """A progress bar on stderr; yields what it is told by. Off a terminal there is none, but a line for each `what`, and one when all is
    done. What is counted are things, or bytes."""
    if _mode.quiet or not sys.stderr.isatty():
        yield partial(_lines, title, " bytes" if of_bytes else "")
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    count = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, what="")
        yield lambda done, total, what="": bars.update(task, completed=done, total=total, what=what)


def _lines(title: str, unit: str, done: int, total: int | None, what: str = "") -> None:
    if what:
        say(f"[{done}/{total}] {what}" if total else what)
    elif done == total:
        say(f"{title}: {total:,}{unit} done")


def fail(error: RemoeError) -> None:
    """Print an error: with --json the document {"error": ...} on stdout, else its message and hint on stderr."""
    if _mode.json or "--json" in sys.argv:
        document = {"error": {"kind": error.kind, "message": error.message, "hint": error.hint}}
        print(json.dumps(document, ensure_ascii=False), flush=True)
        return
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
