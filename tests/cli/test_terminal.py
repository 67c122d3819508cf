"""What reaches a terminal: characters that would steer it are shown; pipes and JSON stay exact, in any encoding of stdout."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe_cli.cli import output
from remoe_cli.cli.visible import visible
from remoe_cli.deploy.console import Overview, Table
from remoe_cli.errors import UsageError

CLIPBOARD = "\x1b]52;c;Y3VybCBldmlsfHNo\x07"
STEERS = f"a{CLIPBOARD}b\x1b[2K\rc\x9b31md\u202ee\u2066f\x7fg\x00h\u2028i\x0bj"
SHOWN = r"a\x1b]52;c;Y3VybCBldmlsfHNo\x07b\x1b[2K\rc\x9b31md\u202ee\u2066f\x7fg\x00h\u2028i\x0bj"
MARKUP = "[red]x[/red] [bold]:smile: {braces} [link=http://x]y[/link]"


class Stream(io.TextIOWrapper):
    """A stream that is a terminal, or not."""

    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def written(self) -> bytes:
        return self.buffer.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Stream, Stream]]:
    def make(terminal: bool, encoding: str = "utf-8", json: bool = False) -> tuple[Stream, Stream]:
        out, err = Stream(terminal, encoding), Stream(terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(output, "_mode", output._Mode(json=json))
        monkeypatch.setenv("COLUMNS", "1000")
        output.take_any_text()
        return out, err

    return make


def answer(text: str) -> None:
    for character in text:  # a sequence may come in pieces
        output.piece(character)


def bar(text: str) -> None:
    with output.progress(text) as report:
        report(1, 2, text)


def fail(text: str) -> None:
    output.fail(UsageError(text, text))


def overview(text: str) -> None:
    output.show_overview(Overview((Table(text, (text, "b"), ((text, text),)),), (text,), (text,)))


# All that prints a text of the user's or of a server's.
PRINTS: tuple[Callable[[str], None], ...] = (
    answer,
    bar,
    fail,
    overview,
    output.line,
    output.say,
    output.paragraph,
    lambda text: output.labelled(text, text),
    lambda text: output.table(text, ("a", "b"), [(text, text)]),
    lambda text: output.result({"text": text}, lambda: output.line(text)),
)


@pytest.mark.parametrize("print_", PRINTS)
def test_a_terminal_is_sent_no_character_that_steers_it(
    print_: Callable[[str], None], streams: Callable[..., tuple[Stream, Stream]]
) -> None:
    out, err = streams(True)
    print_(STEERS)
    written = (out.written + err.written).decode()
    # What remoe sends itself: the style of titles, and the bar.
    assert CLIPBOARD not in written and "\x1b]" not in written and "\x07" not in written and "\x9b" not in written
    assert not set(written) & set("\u202e\u2066\u2028\x00\x7f\x0b")
    assert r"\x1b]52;c;Y3VybCBldmlsfHNo\x07" in written


@pytest.mark.parametrize("print_", [answer, output.line, lambda text: output.result({}, lambda: output.line(text))])
def test_a_pipe_is_sent_the_text(print_: Callable[[str], None], streams: Callable[..., tuple[Stream, Stream]]) -> None:
    out, _ = streams(False)
    print_(STEERS)
    assert out.written.decode().rstrip("\n") == STEERS


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("print_", PRINTS)
def test_markup_is_text(print_: Callable[[str], None], terminal: bool, streams: Callable[..., tuple[Stream, Stream]]) -> None:
    out, err = streams(terminal)
    print_(MARKUP)
    assert MARKUP in (out.written + err.written).decode()


def test_line_ends_and_tabs_stay() -> None:
    assert visible("a\n\tb\n\né 漢 🙂\n") == "a\n\tb\n\né 漢 🙂\n"
    assert visible(STEERS) == visible(visible(STEERS)) == SHOWN


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "utf-16"])
@pytest.mark.parametrize("text", [STEERS, "é 漢 🙂", "caf\udce9", "\ud83d", MARKUP])
def test_json_is_the_same_value_everywhere(text: str, encoding: str, terminal: bool, streams: Callable[..., tuple[Stream, Stream]]) -> None:
    out, _ = streams(terminal, encoding, json=True)
    output.result({"text": text}, lambda: None)
    written = out.written.decode(encoding)
    assert json.loads(written) == {"text": text}
    assert written.isascii() or encoding.startswith("utf")
    if terminal:
        assert visible(written) == written


def test_json_in_a_pipe_is_as_it_was(streams: Callable[..., tuple[Stream, Stream]]) -> None:
    out, _ = streams(False, json=True)
    output.result({"text": "é \u202e"}, lambda: None)
    assert out.written == b'{"text": "\xc3\xa9 \xe2\x80\xae"}\n'


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"caf? ???"), ("latin-1", b"caf\xe9 ???"), ("utf-8", "café 漢🙂!".encode())])
@pytest.mark.parametrize("print_", [answer, output.line, output.paragraph])
def test_what_an_encoding_lacks_is_replaced(
    encoding: str, shown: bytes, print_: Callable[[str], None], streams: Callable[..., tuple[Stream, Stream]]
) -> None:
    out, _ = streams(True, encoding)
    print_("café 漢🙂!" if encoding == "utf-8" else "café 漢🙂é"[:-1] + "漢")
    assert out.written.rstrip(b"\n") == shown


def test_a_name_that_is_not_utf8_is_itself_in_a_pipe(streams: Callable[..., tuple[Stream, Stream]]) -> None:
    for terminal, shown in ((False, b"caf\xe9.txt\n"), (True, "caf\ufffd.txt\n".encode())):
        out, _ = streams(terminal)
        output.line(os.fsdecode(b"caf\xe9.txt"))
        assert out.written == shown


def test_a_real_terminal(tmp_path: Path) -> None:
    """A message with an escape sequence, through a pseudo-terminal."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "remoe_cli", "package", f"a{CLIPBOARD}b"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                if not (part := os.read(mine, 4096)):
                    break
            except OSError:  # its other end is closed
                break
            written += part
    os.close(mine)
    assert process.returncode == 2
    assert b"\x1b]52" not in written and b"\\x1b]52" in written.replace(b"\r\n         ", b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([b"infer", b"demo", b"--prompt", b"caf\xe9"], "The prompt is not UTF-8."),
        ([b"infer", b"demo", b"--prompt=caf\xe9"], "The prompt is not UTF-8."),
        ([b"predict", b"p", b"--prompt", b"\xff\xfe"], "The prompt is not UTF-8."),
        ([b"infer", b"demo", b"--data", b"caf\xe9.txt"], "The argument 'caf\ufffd.txt' is not UTF-8."),
        ([b"profile", b"caf\xe9", b"-o", b"x"], "The argument 'caf\ufffd' is not UTF-8."),
    ],
)
def test_arguments_that_are_not_utf8(arguments: list[bytes], message: str, tmp_path: Path) -> None:
    for more, encoding in (([], "ascii"), ([b"--json"], "ascii"), ([b"--json"], "utf-8")):
        command = [os.fsencode(sys.executable), b"-m", b"remoe_cli", *arguments, *more]
        run = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert run.returncode == 2
        if more:
            error = json.loads(run.stdout)["error"]
            assert (error["kind"], error["message"], run.stderr) == ("Usage", message, b"") and error["hint"]
            assert run.stdout.isascii() or encoding == "utf-8"
        else:
            assert message.replace("\ufffd", "\\ufffd") in run.stderr.decode() and b"Traceback" not in run.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_streams_that_are_closed_are_no_failure(closed: str) -> None:
    command = ["sh", "-c", f'exec "$0" -m remoe_cli --version {closed}', sys.executable]
    assert subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode == 0
