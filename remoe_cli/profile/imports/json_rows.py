"""JSON as people keep responses: one value a line, an array of them, or values that go over several lines.

The file is streamed, so memory does not grow with the number of values; limits bound a single one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import reason
from remoe_cli.profile.imports.checks import refuse
from remoe_cli.profile.imports.text_file import open_text

Rows = Iterator[tuple[str, object]]
_MOST_CHARACTERS = 2**27  # of one value: the ids of 50,000 tokens of DeepSeek-V3, as base64 of 32-bit numbers
_MOST_PARTS = 2**24  # numbers, lists and objects of one value; each takes up to 100 bytes of memory
_CHUNK = 2**16
_TAIL = 16  # characters: an error nearer to the end may only mean that the value goes on
_SPACE = re.compile(r"[ \t\r\n]*")
_HINT = "Give one response a line, or a JSON array of responses."


def json_rows(file: Path) -> Rows:
    """Yield each value and its place; of arrays the elements.

    The place in JSON lines is the number of the line, else the number of the value; both count from 1.

    Raises: UsageError for what is not JSON, and for a value that is too large.
    """
    with open_text(file) as stream:
        lines = _lines(file, stream)
        start = next(lines, None)
        if start is None:
            return
        where, line = start
        value, error = None, None
        if not line.lstrip().startswith("["):
            value, error = _parsed(where, line)
            if error is not None and not (_goes_on(error, line) or "Extra data" in str(error)):
                raise _not_json(where, error)
        if error is not None or line.lstrip().startswith("["):
            for where, value in _streamed(_JsonText(file, stream, line)):
                yield from _flat(where, value)
            return
        yield where, value
        for where, line in lines:
            value, error = _parsed(where, line)
            if error is not None:
                raise _not_json(where, error)
            yield from _flat(where, value)


def _flat(where: str, value: object) -> Rows:
    """Yield the elements of a list, which a server gives for a list of prompts; anything else as it is."""
    if isinstance(value, list):
        yield from ((f"{where}, response {place}", element) for place, element in enumerate(value, 1))
    else:
        yield where, value


def _lines(file: Path, stream: TextIO) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, each with its place."""
    number = 0
    while line := stream.readline(_MOST_CHARACTERS + 1):
        number += 1
        if not line.isspace():
            yield f"{file}, row {number}", line


def _parsed(where: str, line: str) -> tuple[object, Exception | None]:
    _check_size(where, line)
    try:
        return json.loads(line), None
    except (ValueError, RecursionError) as error:
        return None, error


def _streamed(text: _JsonText) -> Rows:
    """Yield values that follow each other, and the elements of arrays."""
    while start := text.peek():
        if start != "[":
            yield text.where, text.value()
            continue
        text.skip()
        while text.peek() != "]":
            yield text.where, text.value()
            if text.peek() == ",":
                text.skip()
            elif text.peek() != "]":
                raise refuse(text.where, "not JSON (a comma or ] is missing before it)", _HINT)
        text.skip()


class _JsonText:
    """JSON values in a stream, decoded one by one; `text` is the part that has been read.

    where   the place of the next value
    """

    def __init__(self, file: Path, stream: TextIO, text: str) -> None:
        self._file, self._stream, self._text, self._at, self._number = file, stream, text, 0, 1
        self._decode = json.JSONDecoder().raw_decode

    @property
    def where(self) -> str:
        return f"{self._file}, row {self._number}"

    def peek(self) -> str:
        """Return the next character that is not white space; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go to the next character."""
        self._at += 1

    def value(self) -> object:
        """Decode the next value, and go to its end."""
        self.peek()
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not _goes_on(error, self._text) or not self._read_on():
                    raise _not_json(self.where, error) from None
            else:
                self._number += 1
                return value

    def _read_on(self) -> bool:
        """Read as much again as there is: a value that comes in pieces is decoded from its start a few times only."""
        self._text, self._at = self._text[self._at :], 0
        _check_size(self.where, self._text)
        more = self._stream.read(max(_CHUNK, len(self._text)))
        self._text += more
        return bool(more)


def _goes_on(error: Exception, text: str) -> bool:
    """Tell whether text that is not JSON may be the start of a value."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) - _TAIL or error.msg.startswith("Unterminated string")


def _check_size(where: str, text: str) -> None:
    if len(text) > _MOST_CHARACTERS:
        raise refuse(where, f"it has more than {_MOST_CHARACTERS >> 20} MiB, which is the most for one response", _HINT)
    if len(text) > _MOST_PARTS and sum(map(text.count, "[{,")) > _MOST_PARTS:
        what = f"it has more than {_MOST_PARTS:,} numbers, lists and objects, which is the most for one response"
        raise refuse(where, what, "Keep routed_experts as the base64 text that the server sends, and leave other lists out.")


def _not_json(where: str, error: Exception) -> UsageError:
    what = "nested too deeply" if isinstance(error, RecursionError) else reason(error)
    return refuse(where, f"not JSON ({what})", _HINT)
