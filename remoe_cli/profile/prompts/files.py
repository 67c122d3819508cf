"""Files and pipes of prompts, row by row: JSON, text, CSV, TSV and Parquet.

Text may be compressed with gzip and may be UTF-16 or UTF-32 where it begins with a byte order mark; both are seen in the first bytes,
not in the name. Lines end at \\n or \\r\\n only: other characters that Unicode calls line ends belong to the text. What has no suffix
to go by (standard input, a named pipe) is JSON where it begins like JSON, else text.

Rows count from 1: in JSON lines, text and CSV a row has the number of the line where it starts, so the header of a CSV is row 1; in
an array and in Parquet it is the number of the element. No row may have more than 32 MiB.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from remoe_cli.bounded import Limit, open_file, parse_json, unpacked
from remoe_cli.errors import UsageError
from remoe_cli.profile.prompts.json_rows import JsonText, json_rows

# A row with its number. A row of text is the text itself.
Rows = Generator[tuple[int, object], None, None]
# Chooses columns of a table, and refuses tables that have no prompts.
Select = Callable[[Sequence[str]], Sequence[str]]

STANDARD_INPUT = "-"
_MOST = 32 << 20  # characters or bytes of a row
_CHECK = "Check that it is a file of prompts."
_MOST_PARTS = 1 << 21  # of a row: numbers, texts, lists and objects
_CHUNK = 1 << 16
_BATCH_ROWS = 256
_JSON_STARTS = re.compile(rb"\s*(\{|\[\s*[\[{\"\]])")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def suffix_of(path: Path) -> str:
    """Return the suffix that says how to read a file, without the .gz after it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def file_rows(path: Path, name: str, select: Select) -> Rows:
    """Yield the rows of a file by its suffix, or of a named pipe; errors call it `name`.

    Raises: UsageError for a file that cannot be read or decoded, and for a row that is too large.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path, name, select)
        return
    try:
        raw = path.open("rb")
    except OSError as error:
        raise _unreadable(name, error) from None
    with raw:
        if suffix in READERS:
            yield from READERS[suffix](decoded(raw, name), name, select)
        else:
            yield from stream_rows(raw, name, select)


def stream_rows(raw: IO[bytes], name: str, select: Select) -> Rows:
    """Yield the rows of a stream that has no suffix to go by; raises what `file_rows` raises."""
    file = decoded(raw, name)
    start = _peek(file, name)
    if start.startswith(b"PAR1"):
        raise UsageError(f"{name} is Parquet, which cannot be read from a pipe.", "Give the file itself.")
    yield from (_json_rows if _JSON_STARTS.match(start) else _text_rows)(file, name, select)


def standard_input() -> IO[bytes]:
    """Return standard input as bytes; raises UsageError where there is none."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise UsageError("There is no standard input to read prompts from.", "Give a file with --data.")
    return stream  # type: ignore[no-any-return]


def decoded(raw: IO[bytes], name: str) -> io.BufferedReader[Any]:
    """Return the content as UTF-8 without a byte order mark, unpacked where it is compressed."""
    file: io.BufferedReader[Any] = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    if _peek(file, name).startswith(b"\x1f\x8b"):
        file = unpacked(file)
    start = _peek(file, name)
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
    if encoding == "utf-8":
        file.read(len(codecs.BOM_UTF8))
    elif encoding is not None:
        file = io.BufferedReader(_AsUtf8(file, encoding))
    return file


def _peek(file: io.BufferedReader[Any], name: str) -> bytes:
    """Return some of what comes next, and stay before it."""
    try:
        return file.peek(_CHUNK)
    except UnicodeDecodeError as error:
        raise _not_utf8(name, 1, error) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from None


class _AsUtf8(io.RawIOBase):
    """The bytes that a stream in another encoding has in UTF-8."""

    def __init__(self, file: io.BufferedReader[Any], encoding: str) -> None:
        self._file, self._decoder, self._rest = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = self._file.read1(_CHUNK)
            self._rest = self._decoder.decode(chunk, final=not chunk).encode()
            if not chunk and not self._rest:
                return 0
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _unreadable(name: str, error: Exception) -> UsageError:
    is_damaged = isinstance(error, EOFError | zlib.error | gzip.BadGzipFile)
    what = "it is damaged or cut off" if is_damaged else getattr(error, "strerror", None) or error
    return UsageError(f"{name} cannot be read: {what}.", "Check the file and your permissions.")


def _not_utf8(name: str, number: int, error: UnicodeDecodeError) -> UsageError:
    encoding = "UTF-8" if error.encoding == "utf-8" else error.encoding.upper()
    return UsageError(f"{name}, row {number}: not {encoding} ({error.reason}).", "Save the file as UTF-8.")


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their ends, decoded one by one, so that an error has its line number."""
    number = 1
    try:
        while line := file.readline(_MOST + 1):
            if len(line) > _MOST:
                raise UsageError(f"{name}, row {number}: a line of more than {_MOST >> 20} MiB.", _CHECK)
            yield number, line.decode("utf-8")
            number += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(name, number, error) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from None


def _text_rows(file: io.BufferedReader[Any], name: str, select: Select) -> Rows:
    for number, line in _lines(file, name):
        yield number, line.rstrip("\r\n")


def _json_rows(file: io.BufferedReader[Any], name: str, select: Select) -> Rows:
    """JSON lines, unless it is an array or the first line is not a whole value."""
    if _peek(file, name).lstrip().startswith(b"["):
        yield from _json_stream(file, name)
        return
    is_first = True
    for number, line in _lines(file, name):
        if not line.strip():
            continue
        try:
            row = parse_json(line, Limit(_MOST, _MOST_PARTS))
        except ValueError as error:
            if is_first and isinstance(error, json.JSONDecodeError):
                yield from _json_stream(file, name, line)
                return
            raise _not_json(name, number, error) from None
        yield number, row
        is_first = False


def _json_stream(file: io.BufferedReader[Any], name: str, start: str = "") -> Rows:
    decoder = codecs.getincrementaldecoder("utf-8")()

    def read(size: int) -> str:
        while chunk := file.read(size):
            if text := decoder.decode(chunk):
                return text
        return decoder.decode(b"", final=True)

    number = 1
    try:
        for row in json_rows(JsonText(read, _MOST, start, _MOST_PARTS)):
            yield number, row
            number += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(name, number, error) from None
    except ValueError as error:
        raise _not_json(name, number, error) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from None


def _not_json(name: str, number: int, error: Exception) -> UsageError:
    return UsageError(f"{name}, row {number}: not JSON ({error}).", "The file must hold one JSON object a line, or an array of objects.")


def _separated_rows(delimiter: str) -> Callable[[io.BufferedReader[Any], str, Select], Rows]:
    def rows(file: io.BufferedReader[Any], name: str, select: Select) -> Rows:
        limit = csv.field_size_limit(_MOST)
        try:
            yield from _records(file, name, select, delimiter)
        finally:
            csv.field_size_limit(limit)

    return rows


def _records(file: io.BufferedReader[Any], name: str, select: Select, delimiter: str) -> Rows:
    hint = "Correct the row, or its quotes."
    size = 0

    def fed() -> Iterator[str]:
        nonlocal size
        for number, line in _lines(file, name):
            size += len(line)
            if size > _MOST:
                raise UsageError(f"{name}, row {number}: a record of more than {_MOST >> 20} MiB ends here.", hint)
            yield line

    records = csv.reader(fed(), strict=True, delimiter=delimiter)
    header: list[str] = []
    chosen: set[str] = set()
    while True:
        number, size = records.line_num + 1, 0
        try:
            record = next(records, None)
        except csv.Error as error:
            raise UsageError(f"{name}, row {number}: not CSV ({error}).", hint) from None
        if record is None:
            return
        if not record:
            continue
        if not header:
            header, chosen = record, set(select(record))
        elif len(record) == len(header):
            yield number, {key: value for key, value in zip(header, record, strict=True) if key in chosen}
        else:
            raise UsageError(f"{name}, row {number}: {len(record)} values for the {len(header)} columns of the header.", hint)


def _parquet_rows(path: Path, name: str, select: Select) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with open_file(path) as raw, ParquetFile(raw) as file:
            columns = list(select(file.schema_arrow.names))
            batch_rows = _batch_rows(file.metadata, name)
            # A text that many rows share is in memory once.
            texts = [field.name for field in file.schema_arrow if field.name in columns and pyarrow.types.is_string(field.type)]
        with open_file(path) as raw, ParquetFile(raw, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False):
                for at in range(batch.num_rows):
                    row = {column: batch.column(column)[at].as_py() for column in columns}
                    number += 1
                    if any(isinstance(cell, str) and len(cell) > _MOST for cell in row.values()):
                        raise UsageError(
                            f"{name}, row {number}: a row of more than {_MOST >> 20} MiB.", "Check that it is a file of prompts."
                        )
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        where = f"{name}, after row {number}" if number else name
        raise UsageError(f"{where}: not readable as Parquet ({first_line(error)}).", "Write the file again.") from None


def _batch_rows(metadata: Any, name: str) -> int:
    """Return how many rows may be in memory at once: at most 256, and fewer where they are large."""
    most = _BATCH_ROWS
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        row_bytes = group.total_byte_size // max(1, group.num_rows)
        if row_bytes > _MOST:
            raise UsageError(f"{name}: its rows have more than {_MOST >> 20} MiB.", _CHECK)
        most = min(most, max(1, 2 * _MOST // max(1, row_bytes)))
    return most


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, not at length."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


READERS: dict[str, Callable[[io.BufferedReader[Any], str, Select], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".ndjson": _json_rows,
    ".txt": _text_rows,
    ".csv": _separated_rows(","),
    ".tsv": _separated_rows("\t"),
}
SUFFIXES = (*READERS, ".parquet")
