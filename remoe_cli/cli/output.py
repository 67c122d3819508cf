"""The only place that prints.

Results go to stdout; everything else (messages, progress, errors) to stderr. With --json stdout carries exactly one JSON
document; with --quiet messages and progress are dropped. Progress is a bar on a terminal, and lines elsewhere. Tables and long texts
are wrapped to `width()`.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from remoe_cli.cli.visible import STEERING, SURROGATES, visible
from remoe_cli.errors import RemoeError
from remoe_cli.redaction import redacted
from remoe_cli.units import size

if TYPE_CHECKING:
    from pydantic import BaseModel

    from remoe_cli.deploy.console import Console, Overview
    from remoe_cli.progress import Report

LABEL = 16  # columns of a label before its text
HEARTBEAT_S = 14.0  # without a line on stderr, after which a stage of work prints one where there is no terminal


@dataclass
class _Mode:
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    said_s: float = field(default_factory=time.monotonic)  # when the last message or piece of text was printed
    working: bool = False  # a stage of work is shown


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


def is_quiet() -> bool:
    return _mode.quiet


def shows_bars() -> bool:
    """Return whether progress is a bar, which nothing else may be printed beside."""
    return sys.stderr.isatty()


def is_verbose() -> bool:
    return _mode.verbose


def take_any_text() -> None:
    """Let stdout take any text: it prints "?" for what its encoding lacks.

    Bytes of a file's name that are not UTF-8 are printed as they are.
    """
    codecs.register_error("remoe", _replaced)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the command began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="remoe")


def flush() -> None:
    """Send what is printed, as far as somebody reads it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in part):
        return bytes(ord(character) - 0xDC00 for character in part), error.end
    return "?" * len(part), error.end


def _for(stream: TextIO, text: str) -> str:
    """Return the text as the stream may be sent it: exact to a pipe, without what steers it to a terminal."""
    return visible(text) if stream.isatty() else text


def _json(document: Mapping[str, Any]) -> str:
    """Write JSON on one line, in ASCII where stdout is not UTF-8; to a terminal without what steers it."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")
    text = json.dumps(document, ensure_ascii=not is_utf8, allow_nan=False)
    escaped = f"[{SURROGATES}{STEERING if sys.stdout.isatty() else ''}]"
    return re.sub(escaped, lambda found: json.dumps(found[0])[1:-1], text)


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    if not _mode.quiet:
        _mode.said_s = time.monotonic()
        print(_for(sys.stderr, redacted(message)), file=sys.stderr, flush=True)


def result(document: BaseModel | Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print the command's result: the document with --json, else what `show` prints for people."""
    if not _mode.json:
        show()
        return
    data = document if isinstance(document, Mapping) else document.model_dump(mode="json")
    print(_json(data), flush=True)


def line(text: str = "") -> None:
    """Print a line of the result for people on stdout."""
    print(_for(sys.stdout, text), flush=True)


def width() -> int:
    """Return how many columns a line of text has.

    They are those of the terminal or of COLUMNS, and 100 where there is no terminal.
    """
    return shutil.get_terminal_size((100, 24)).columns


def paragraph(text: str, first: str = "", rest: str = "") -> None:
    """Print a long text of the result on stdout, wrapped; its lines start with `first`, then with `rest`."""
    line(_wrapped(text, first, rest))


def labelled(label: str, text: str) -> None:
    """Print a label and, from column LABEL on, a text of any length."""
    paragraph(text, f"{label:<{LABEL}}", " " * LABEL)


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    # Options and paths have hyphens, and are copied: they stay whole.
    return textwrap.fill(text, width(), initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def piece(text: str) -> None:
    """Print a piece of streamed text on stdout, without a line end."""
    _mode.said_s = time.monotonic()
    print(_for(sys.stdout, text), end="", flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> None:
    """Print a table on stdout, the first column aligned left and all others right.

    Where it does not fit, the columns that `spare` names are left out one after another, and a line says so; where that is not enough,
    each row is printed as lines.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from remoe_cli.cli.table_widths import fitted

    columns, rows = [_for(sys.stdout, column) for column in columns], [[_for(sys.stdout, cell) for cell in row] for row in rows]
    widths = fitted(columns, rows, width(), spare)
    console = Console(highlight=False, markup=False, emoji=False, width=width())
    if title:  # not the table's own title, which is wrapped to the table
        console.print(_for(sys.stdout, title), style="bold")
    if widths is None:
        _blocks(columns, rows)
        return
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, columns_wide in widths.items():
        grid.add_column(columns[i], justify="right" if i else "left", overflow="fold", width=columns_wide)
    for row in rows:
        grid.add_row(*(row[i] for i in widths))
    console.print(grid)
    if dropped := [column for i, column in enumerate(columns) if i not in widths]:
        paragraph(f"{width()} columns have no room for: {', '.join(dropped)}. --json has everything.")


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as lines, a figure in each, under the cell of its first column."""
    for row in rows:
        line()
        paragraph(row[0], rest="  ")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            paragraph(f"{' '.join(column.split())}: {cell}", "  ", "    ")
    line()


def ask(question: str) -> bool:
    """Ask on stderr; return whether the answer on stdin is 'y' or 'yes'."""
    print(f"{_for(sys.stderr, question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_overview(overview: Overview) -> None:
    """Print tables, and the sentences that belong above and under them, on stdout."""
    for sentence in overview.above:
        text = sentence.lstrip(" ")
        indent = " " * (len(sentence) - len(text))
        paragraph(text, indent, indent + "  ")
    for each in overview.tables:
        table(each.title, each.columns, each.rows)
    for remark in overview.remarks:
        paragraph(remark)


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
    """Show on stderr how far a stage of work is, until the context ends; yields what the work reports to.

    On a terminal this is a bar. Elsewhere it is a line after each HEARTBEAT_S seconds without one, whether or not anything is reported,
    and a line for each `what`. Work that was counted to its end leaves one line. With --quiet nothing is printed.
    """
    assert not _mode.working, "only one stage of work is shown at a time"
    stage = _Stage(title, of_bytes)
    if _mode.quiet:
        yield stage.report
        return
    _mode.working = True
    try:
        with (_bar if shows_bars() else _heartbeat)(stage) as report:
            yield report
    finally:
        _mode.working = False
    if stage.total is not None and stage.done >= stage.total:
        say(f"{title}: {stage.amount(stage.total)} done in {_duration(time.monotonic() - stage.began_s)}")


@dataclass
class _Stage:
    """What a stage of work has reported, and how long the rest of it will take."""

    title: str
    of_bytes: bool
    began_s: float = field(default_factory=time.monotonic)
    first: tuple[float, float] | None = None  # when the first report came, and what was done by then
    last_s: float = 0.0  # when the last report came
    done: float = 0.0
    total: float | None = None
    what: str = ""

    def report(self, done: float, total: float | None, what: str = "") -> None:
        self.last_s = time.monotonic()
        self.first = self.first or (self.last_s, done)
        self.done, self.total, self.what = done, total, what

    def amount(self, count: float) -> str:
        return size(count) if self.of_bytes else f"{int(count):,}"

    def state(self) -> str:
        now_s = time.monotonic()
        if self.total is None or self.first is None:
            return f"{_duration(now_s - self.began_s)} so far"
        counted = f"{self.amount(self.done)} of {self.amount(self.total)}"
        first_s, done_before = self.first
        if self.done <= done_before or self.done >= self.total:
            return counted
        each_s = (self.last_s - first_s) / (self.done - done_before)
        left_s = (self.total - self.done) * each_s - (now_s - self.last_s)
        return f"{counted}, about {_duration(max(left_s, 1.0))} left"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bar(stage: _Stage) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class State(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(visible(f"{stage.state()}  {stage.what}".rstrip()))

    title = visible(stage.title).replace("{", "{{").replace("}", "}}")  # a column's text is a format
    with Progress(TextColumn(title, markup=False), BarColumn(), State(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(stage.title, total=None)

        def report(done: float, total: float | None, what: str = "") -> None:
            stage.report(done, total, what)
            bars.update(task, completed=done, total=total)

        yield report


@contextmanager
def _heartbeat(stage: _Stage) -> Iterator[Report]:
    ended = Event()

    def beat() -> None:
        least_s = min(1.0, HEARTBEAT_S)  # of work before its first line, however long nothing was printed before it
        while not ended.wait(max(least_s, _mode.said_s + HEARTBEAT_S - time.monotonic())):
            if time.monotonic() >= _mode.said_s + HEARTBEAT_S:  # nobody else has printed a line meanwhile
                say(f"{stage.title}: {stage.state()}")

    def report(done: float, total: float | None, what: str = "") -> None:
        stage.report(done, total, what)
        if what:
            say(f"[{done:.0f}/{total:.0f}] {what}" if total else what)

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def fail(error: RemoeError, **more: Any) -> None:
    """Print an error: {"error": ...} with `more` on stdout with --json, else sentences on stderr.

    Neither has a secret.
    """
    message, hint = redacted(error.message), redacted(error.hint)
    if _mode.json or "--json" in sys.argv:
        document = {"error": {"kind": error.kind, "message": message, "hint": hint} | _billed(error), **more}
        print(_json(document), flush=True)
        return
    _complain("error: ", message)
    if hint:
        _complain("  hint: ", hint)
    if receipt := _billed(error).get("receipt"):
        _complain("  cost: ", _what_was_billed(receipt))


def _billed(error: RemoeError) -> dict[str, Any]:
    """Return the receipt of a request that failed, where it has one (runtime/receipt.py)."""
    receipt = getattr(error, "receipt", None)
    return {} if receipt is None else {"receipt": receipt.model_dump(mode="json")}


def _what_was_billed(receipt: Mapping[str, Any]) -> str:
    from remoe_cli.plan.wording import dollars

    calls = receipt["invocations"] + receipt["main"]["invocations"]
    billed = f"{receipt['billed_ms'] + receipt['main']['billed_ms']} ms of {calls} calls were billed"
    return f"{billed}, {dollars(receipt['cost']['total_usd'])} in all." if receipt["cost"] else f"{billed}."


def trace() -> None:
    """Print the traceback of the error that is handled, on stderr."""
    print(_for(sys.stderr, redacted(traceback.format_exc())), end="", file=sys.stderr)


def _complain(label: str, text: str) -> None:
    """Print a line of an error on stderr; only a terminal wraps it, so that other programs find it in one line."""
    text, is_wrapped = _for(sys.stderr, text), sys.stderr.isatty() and "\n" not in text
    print(_wrapped(text, label, " " * len(label)) if is_wrapped else label + text, file=sys.stderr)
