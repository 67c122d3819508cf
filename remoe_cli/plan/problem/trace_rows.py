"""Rows of a file of requests.

It is CSV with a header, JSON lines, a JSON array, or JSON objects whose columns are lists.

The file is streamed, so memory does not grow with the number of rows; limits bound one row. The file may be compressed with gzip and
start with a byte order mark, which also tells UTF-16. Lines end at a line feed only, whatever else Unicode calls the end of a line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from remoe_cli.bounded import TooDeepError, TooLargeError, check_depth, check_size, unpacked
from remoe_cli.errors import UsageError
from remoe_cli.plan.problem.trace_formats import Key, TraceColumns, plain, recognise

Row = tuple[int, TraceColumns, Any]  # its number, counted from 1; its columns; its cells by their keys

FORM = (
    "Give CSV, JSON lines or a JSON array with n_in and n_out (or ContextTokens and GeneratedTokens, or the columns of another known "
    "trace), and timestamp or weight if you have them."
)
CSV_LIMIT = 2**24  # characters of a row
JSON_LIMIT = 2**25  # characters of an object
JSON_PARTS = 2**23  # numbers, texts, lists and objects of an object; each takes up to 70 bytes of memory
_COLUMNS = 10_000
_CHUNK = 2**20  # characters that are read at once
_DEPTH = 4  # objects inside objects in which columns are looked for
_REMEMBERED = 100_000  # names of columns
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_WRAPPERS = frozenset(("data", "items", "logs", "records", "requests", "results", "rows"))


def read_rows(path: Path) -> Generator[Row, None, None]:
    """Read the rows of a file one by one.

    An object of lists stands for as many rows as its lists are long.

    Raises: UsageError for a file that cannot be read, and for a row that is not CSV or JSON, with the number of the row.
    """
    number = 0
    try:
        with _open(path) as (stream, is_json):
            for row in _json_rows(path, stream) if is_json else _csv_rows(path, stream):
                number = row[0]
                yield row
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.", "Check the path.") from None
    except UnicodeDecodeError as error:
        where = f"after row {number}" if number else "from its start on"
        raise UsageError(f"{path} cannot be read: {where} it is not text in UTF-8 ({error.reason}).", FORM) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.", FORM) from None


@contextmanager
def _open(path: Path) -> Iterator[tuple[TextIO, bool]]:
    """Open a file as text, and say whether it looks like JSON."""
    with path.open("rb") as file:
        binary: Any = unpacked(file) if file.peek(2).startswith(b"\x1f\x8b") else file
        head = binary.peek(1)
        encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        line_end = "\r" if b"\r" in head and b"\n" not in head else "\n"  # old spreadsheets write carriage returns alone
        with io.TextIOWrapper(binary, encoding, newline=line_end) as stream:
            yield stream, head.decode(encoding, "ignore").lstrip().startswith(("{", "["))


def _recognised(path: Path, fields: Iterable[tuple[str, Key]], count: int) -> TraceColumns:
    if count > _COLUMNS:
        raise UsageError(f"{path} has {count:,} columns, and {_COLUMNS:,} is the most.", FORM)
    return recognise(fields)


def _csv_rows(path: Path, stream: TextIO) -> Iterator[Row]:
    number, ended = 0, False

    def lines() -> Iterator[str]:
        nonlocal ended
        while line := stream.readline(CSV_LIMIT):
            if len(line) == CSV_LIMIT:
                raise UsageError(f"{path}: row {number + 1} is longer than {CSV_LIMIT:,} characters.", FORM)
            yield line.rstrip("\r\n").replace("\r", " ") + "\n" if "\r" in line else line
        ended = True

    rest = lines()
    header = next((line for line in rest if not line.isspace()), "")
    delimiter = max(",;\t|", key=header.count)
    if header.startswith("sep=") and header[4:5] in ",;\t|" and header[5:].isspace():  # a spreadsheet's way to name the delimiter
        delimiter, header = header[4], next(rest, "")
    limit = csv.field_size_limit(CSV_LIMIT)  # a trace may hold prompts, which no other limit fits
    try:
        reader = csv.reader(chain([header], rest), delimiter=delimiter, skipinitialspace=True)
        names = [name.strip() for name in next(reader, [])]
        columns = _recognised(path, ((name, at) for at, name in enumerate(names)), len(names))
        for row in reader:
            if ended:
                raise UsageError(f"{path}: row {number + 1} is not CSV: a quote is opened there and never closed.", FORM)
            if any(row):
                number += 1
                row += [""] * (len(names) - len(row))
                yield number, columns, row
    except csv.Error as error:
        raise UsageError(f"{path}: row {number + 1} is not CSV: {error}.", FORM) from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, stream: TextIO) -> Iterator[Row]:
    number, remembered = 0, 0
    layouts: dict[tuple[str, ...], TraceColumns] = {}
    for value in _json_values(path, stream):
        for row in _unwrapped(value):
            if not isinstance(row, dict):
                raise UsageError(f"{path}: row {number + 1} is not a JSON object.", FORM)
            cells = _cells(row)
            layout = tuple(cells)
            columns = layouts.get(layout)
            if columns is None:
                if remembered > _REMEMBERED:
                    layouts, remembered = {}, 0
                columns = layouts[layout] = _recognised(path, ((name, plain(name)) for name in _names(row)), len(layout))
                remembered += len(layout)
            for single in _transposed(path, number + 1, columns, cells):
                number += 1
                yield number, columns, single


def _json_values(path: Path, stream: TextIO) -> Iterator[Any]:
    """Decode JSON values that follow each other, or the elements of one array, from a text of any length."""
    decode = json.JSONDecoder().raw_decode
    text, at, number, between, ended = "", 0, 0, _SPACE, False
    array = None  # whether the file is an array; None before its first character
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if array is None and text[at : at + 1] == "[":
            array, between, at = True, _BETWEEN, at + 1
            continue
        if array and text[at : at + 1] == "]":
            array, between, at = False, _SPACE, at + 1
            continue
        if at < len(text):
            array = bool(array)
            try:
                value, end = decode(text, at)
                check_depth(text, at, end)
                at = end
            except TooDeepError as error:
                raise UsageError(f"{path}: row {number + 1} is {error}.", FORM) from None
            except (ValueError, RecursionError) as error:
                whole = ended or not isinstance(error, json.JSONDecodeError)
                if whole or len(text) - at > JSON_LIMIT:
                    size = "" if whole else f" of at most {JSON_LIMIT:,} characters"
                    raise UsageError(f"{path}: row {number + 1} is not a JSON object{size}.", FORM) from None
            else:
                number += 1
                yield value
                continue
        elif ended:
            if array:
                raise UsageError(f"{path}: the JSON array ends after row {number} without its closing bracket.", FORM)
            return
        more = stream.read(max(_CHUNK, len(text) - at))  # twice as much each time: reading a long row again and again takes linear time
        text, at, ended = text[at:] + more, 0, not more
        try:
            check_size(text, 3 * JSON_LIMIT, JSON_PARTS)
        except TooLargeError as error:
            raise UsageError(f"{path}: row {number + 1} is {error}, which is the most.", FORM) from None


def _unwrapped(value: Any, depth: int = _DEPTH) -> list[Any]:
    """Take the rows out of an object such as {"data": [...]}."""
    if isinstance(value, dict) and depth:
        lists = [rows for name, rows in value.items() if name in _WRAPPERS and isinstance(rows, list)]
        if len(lists) == 1 and not recognise((name, name) for name in _names(value)).n_in:
            return [row for inner in lists[0] for row in _unwrapped(inner, depth - 1)]
    return [value]


def _cells(row: Mapping[str, Any], prefix: str = "", depth: int = _DEPTH) -> dict[str, Any]:
    """Name the cells of a row, and those of objects in it, by their columns' plain names."""
    cells = {prefix + plain(name): value for name, value in row.items()}
    if depth:
        for key, value in list(cells.items()):
            if type(value) is dict:
                cells |= _cells(value, f"{key}.", depth - 1)
    return cells


def _names(row: Mapping[str, Any], prefix: str = "", depth: int = _DEPTH) -> Iterator[str]:
    for name, value in row.items():
        yield prefix + name
        if depth and type(value) is dict:
            yield from _names(value, f"{prefix}{name}.", depth - 1)


def _transposed(path: Path, number: int, columns: TraceColumns, cells: dict[str, Any]) -> Iterator[Mapping[Any, Any]]:
    """Make rows of an object whose columns are lists; any other object is the only row."""
    prompts, answers = (next((cells[str(key)] for key in keys), None) for keys in (columns.n_in, columns.n_out or columns.generated))
    if not (isinstance(prompts, list) and isinstance(answers, list)):
        yield cells
        return
    if len(prompts) != len(answers):
        raise UsageError(f"{path}: row {number} has {len(prompts)} lengths of prompts and {len(answers)} of answers.", FORM)
    for at in range(len(prompts)):
        yield {key: value[at] if isinstance(value, list) and len(value) == len(prompts) else None for key, value in cells.items()}
