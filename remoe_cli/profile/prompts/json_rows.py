"""Rows of a JSON stream: elements of an array, or values one after the other.

One row is in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from remoe_cli.bounded import check_depth, check_size, count_parts
from remoe_cli.model.chat import is_message

_CHUNK = 1 << 16
_PIECE = 1 << 20
_MOST_MESSAGES = 10_000
_SPACE = re.compile(r"[ \t\r\n]*")
_TAIL = 16  # characters: an error nearer to the end may only mean that the value goes on


class JsonText:
    """JSON values in a stream of text. `read` gives about so many further characters, and none at the end.

    Raises: ValueError, in what a person can read, for text that is not JSON; TooLargeError for a value of more than `most` characters, and
    TooDeepError.
    """

    def __init__(self, read: Callable[[int], str], most: int, start: str = "", most_parts: int | None = None) -> None:
        self._read, self._most, self._most_parts, self._text, self._at = read, most, most_parts, start, 0
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
                value, end = self._decode(self._text, self._at)
                check_depth(self._text, self._at, end)
                self._at = end
                return value
            except json.JSONDecodeError as error:
                goes_on = error.pos >= len(self._text) - _TAIL or error.msg.startswith("Unterminated string")
                if not goes_on or not self._fill():
                    raise ValueError(error.msg) from None
            except RecursionError:
                raise ValueError("nested too deeply") from None

    def _fill(self) -> bool:
        """Read as much again as there is, so that a long value is decoded from its start only a few times.

        Where parts are limited, read less if it has many: decoding takes memory for the parts of all text that has been read.
        """
        self._text, self._at = self._text[self._at :], 0
        check_size(self._text, self._most, self._most_parts)
        left, parts, pieces = max(_CHUNK, len(self._text)), 0, [self._text]
        while left > 0 and parts <= (self._most_parts or 0) and (piece := self._read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
            parts += 0 if self._most_parts is None else count_parts(piece)
        self._text = "".join(pieces)
        return len(pieces) > 1


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
