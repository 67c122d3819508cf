"""JSON as people keep responses.

That is one value a line, an array of values, or values that go over several lines. The file is streamed, so memory does not grow with the
number of values; limits bound a single one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO

from remoe_cli.bounded import Limit, TooLargeError, check_size, parse_json
from remoe_cli.errors import UsageError
from remoe_cli.profile.imports.checks import refuse
from remoe_cli.profile.imports.text_file import Line, lines_of, open_text
from remoe_cli.profile.prompts.json_rows import JsonText

Rows = Iterator[tuple[str, object]]
_MOST_CHARACTERS = 2**27  # of one value: the ids of 50,000 tokens of DeepSeek-V3, as base64 of 32-bit numbers
_PIECE = 2**16  # characters of the first line that say whether it is an array
_MOST_PARTS = 2**23  # of one value: 19,000 tokens of Qwen3-30B-A3B as lists; each takes up to 70 bytes of memory


def json_rows(file: Path) -> Rows:
    """Yield each value and its place; of arrays the elements.

    The place in JSON lines is the number of the line, else the number of the value; both count from 1.

    Raises: UsageError for what is not JSON, and for a value that is too large.
    """
    with open_text(file) as stream:
        number, start = 1, stream.readline(_PIECE)
        while start.isspace():
            number, start = number + start.endswith("\n"), stream.readline(_PIECE)
        lines = lines_of(file, stream, _MOST_CHARACTERS, start, number)
        if start and not start.lstrip().startswith("["):
            number, start = next(lines)
        if start and _is_whole(start):
            yield from _by_line(file, chain([(number, start)], lines))
        else:
            yield from _by_value(file, stream, start)


def _is_whole(line: str) -> bool:
    """Tell whether a line is an object of its own; an array is read element by element."""
    try:
        check_size(line, _MOST_CHARACTERS, _MOST_PARTS)
        return not line.lstrip().startswith("[") and json.loads(line) is not None
    except (ValueError, RecursionError):
        return False


def _by_line(file: Path, lines: Iterable[Line]) -> Rows:
    for number, line in lines:
        if line.isspace():
            continue
        where = f"{file}, row {number}"
        try:
            value = parse_json(line, Limit(_MOST_CHARACTERS, _MOST_PARTS))
        except ValueError as error:
            raise _refused(where, error) from None
        yield from _flat(where, value)


def _by_value(file: Path, stream: TextIO, start: str) -> Rows:
    """Yield values that follow each other, and the elements of arrays."""
    number, in_array = 1, False
    text = JsonText(stream.read, _MOST_CHARACTERS, start, _MOST_PARTS)
    try:
        if not start.lstrip().startswith("["):
            check_size(start, _MOST_CHARACTERS, _MOST_PARTS)
        while sign := text.next():
            if sign in "[]" and (sign == "]") == in_array:
                in_array = not in_array
                text.skip()
                continue
            yield from _flat(f"{file}, row {number}", text.value())
            number += 1
            if in_array and text.next() == ",":
                text.skip()
            elif in_array and text.next() != "]":
                raise ValueError("a comma or ] is missing before it")
    except ValueError as error:
        raise _refused(f"{file}, row {number}", error) from None
    if in_array:
        raise _refused(f"{file}, row {number}", ValueError("the array ends without a ]"))


def _flat(where: str, value: object) -> Rows:
    """Yield the elements of a list, which a server gives for a list of prompts; anything else as it is."""
    if isinstance(value, list):
        yield from ((f"{where}, response {place}", element) for place, element in enumerate(value, 1))
    else:
        yield where, value


def _refused(where: str, error: Exception) -> UsageError:
    if isinstance(error, TooLargeError):
        return refuse(
            where, f"it has {error}, which is the most", "Give responses one a line, with routed_experts as the server sends them."
        )
    return refuse(where, f"not JSON ({error})", "Give one response a line, or a JSON array of responses.")
