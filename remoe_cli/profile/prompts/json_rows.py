"""Rows of a JSON stream: elements of an array, or values one after the other. One is in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from remoe_cli.model.chat import is_message

_CHUNK = 1 << 16
_MOST_MESSAGES = 10_000
_SPACE = re.compile(r"[ \t\r\n]*")
_TAIL = 16  # characters: an error nearer to the end may only mean that the value goes on


class JsonText:
    """JSON values in a stream of text. `read` gives about so many further characters, and none at the end.

    Raises: ValueError, in what a person can read, for text that is not JSON and for a value of more than `most` characters.
    """

    def __init__(self, read: Callable[[int], str], most: int, start: str = "") -> None:
        self._read, self._most, self._text, self._at = read, most, start, 0
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """Return the next character that is not white space, and stay before it; an empty text at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self) -> object:
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                goes_on = error.pos >= len(self._text) - _TAIL or error.msg.startswith("Unterminated string")
                if not goes_on or not self._fill():
                    raise ValueError(error.msg) from None
            except RecursionError:
                raise ValueError("nested too deeply") from None

    def _fill(self) -> bool:
        """Read as much again as there is, so that a long value is decoded from its start only a few times."""
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > self._most:
            raise ValueError(f"a value of more than {self._most >> 20} MiB")
        more = self._read(max(_CHUNK, len(self._text)))
        self._text += more
        return bool(more)


def json_rows(text: JsonText) -> Iterator[object]:
    """Yield the elements of arrays, and values outside of arrays.

    An array of messages is one conversation, so it is one row.

    >>> parts = iter(['[{"a": 1}, {"a"', ": 2}]"])
    >>> list(json_rows(JsonText(lambda size: next(parts, ""), most=1000)))
    [{'a': 1}, {'a': 2}]
    """
    while start := text.next():
        if start != "[":
            yield text.value()
            continue
        text.skip()
        messages: list[object] = []
        end = text.next()
        while end != "]":
            value = text.value()
            if is_message(value):
                messages.append(value)
            else:
                yield value
            if len(messages) > _MOST_MESSAGES:
                raise ValueError(f"a conversation of more than {_MOST_MESSAGES} messages")
            end = text.next()
            if end == ",":
                text.skip()
                text.next()
            elif end != "]":
                raise ValueError("Expecting ',' or ']' after an element")
        text.skip()
        if messages:
            yield messages
