"""Prompts from a local file, from standard input, or from a dataset on the Hugging Face hub.

A source is a .jsonl or .json file (one JSON object a line), a .txt file (one prompt a line), a .csv file with a header, a .parquet file,
or the id `owner/name` of a dataset on the hub, of which the first split is streamed. A file is preferred to a dataset of the same name.
`-` is standard input: lines of JSON objects if its first line that is not blank begins with `{`, else plain text. Texts of white space
alone are skipped. Errors count rows from 1; in a text file that is the line where the row starts, so the header of a .csv is row 1.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from remoe_cli.artifacts import sha256_bytes
from remoe_cli.errors import RemoeError, UsageError

_Row = tuple[int, Mapping[str, object]]
_Line = tuple[int, str]

_STANDARD_INPUT = "standard input"
_BATCH_ROWS = 256
_HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, at least one.

    >>> PromptSet("standard input", "prompt", ("Hello", "World")).sha256[:12]
    'd24bf63378b2'
    """

    source: str
    field: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The digest of the texts as one compact ASCII JSON array, so that where one text ends matters."""
        return sha256_bytes(json.dumps(self.texts, ensure_ascii=True, separators=(",", ":")).encode("ascii"))


def read_prompts(source: str, field: str = "prompt", limit: int | None = None) -> PromptSet:
    """Read the texts of `field`, and stop after `limit` of them. Lines of plain text have no field.

    Raises: UsageError when the source cannot be found, reached or decoded, a row is broken or has no text in the field, or there is no
    prompt at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit of prompts is {limit}, so none would be read.", "Give a limit of 1 or more.")
    rows = _rows(source, field)
    source = _STANDARD_INPUT if source == "-" else source
    texts = tuple(islice(_texts(source, field, rows), limit))
    if not texts:
        raise UsageError(f"{source} holds no prompts.", "Give a dataset with at least one text that is not blank.")
    return PromptSet(source, field, texts)


def _rows(source: str, field: str) -> Iterator[_Row]:
    if source == "-":
        return _standard_input_rows(field)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if not os.path.exists(source):
        if reader is None and _HUB_ID.fullmatch(source):
            return _hub_rows(source, field)
        raise UsageError(f"There is no file {source!r}.", "Check the path, or give a Hugging Face dataset id such as owner/name.")
    if path.is_dir():
        raise UsageError(f"{source} is a folder, not a file of prompts.", f"Give one file: {', '.join(_READERS)}.")
    if reader is None:
        raise UsageError(f"{source} has the unknown suffix {path.suffix!r}.", f"Known are {', '.join(_READERS)}.")
    return reader(path, field)


def _texts(source: str, field: str, rows: Iterator[_Row]) -> Iterator[str]:
    for number, row in rows:
        if field not in row:
            raise _no_field(f"{source}, row {number}", field, row)
        text = row[field]
        if not isinstance(text, str):
            what = "null" if text is None else f"of type {type(text).__name__}"
            raise UsageError(
                f"{source}, row {number}: the field {field!r} is {what}, not text.", "Correct the row, or choose another --field."
            )
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{source}, row {number}: the field {field!r} holds half of a surrogate pair.", "Correct the row.")
        if text.strip():
            yield text


def _no_field(where: str, field: str, found: Iterable[object]) -> UsageError:
    names = ", ".join(str(name) for name in found)
    return UsageError(f"{where} has no field {field!r}; it has {names or 'none'}.", "Name the field of the prompts with --field.")


def _lines(path: Path) -> Iterator[_Line]:
    try:
        with path.open("rb") as file:
            yield from _decoded(str(path), file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the file and your permissions.") from None


def _decoded(source: str, lines: Iterable[bytes]) -> Iterator[_Line]:
    """Decode line by line, with line ends, so that an error has its line number."""
    for number, line in enumerate(lines, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{source}, row {number}: not UTF-8 ({error.reason}).", "Save the file as UTF-8.") from None


def _standard_input_rows(field: str) -> Iterator[_Row]:
    lines = _decoded(_STANDARD_INPUT, sys.stdin.buffer)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return iter(())
    parse = _parse_json if first[1].lstrip().startswith("{") else _parse_text
    return parse(_STANDARD_INPUT, field, chain([first], lines))


def _text_rows(path: Path, field: str) -> Iterator[_Row]:
    return _parse_text(str(path), field, _lines(path))


def _json_rows(path: Path, field: str) -> Iterator[_Row]:
    return _parse_json(str(path), field, _lines(path))


def _parse_text(source: str, field: str, lines: Iterable[_Line]) -> Iterator[_Row]:
    for number, line in lines:
        yield number, {field: line.rstrip("\r\n")}


def _parse_json(source: str, field: str, lines: Iterable[_Line]) -> Iterator[_Row]:
    hint = "Give one JSON object a line."
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{source}, row {number}: not JSON ({error}).", hint) from None
        if not isinstance(row, dict):
            raise UsageError(f"{source}, row {number}: a JSON {type(row).__name__}, not an object.", hint)
        yield number, row


def _csv_rows(path: Path, field: str) -> Iterator[_Row]:
    hint = "Correct the row, or its quotes."
    records = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        number = records.line_num + 1
        try:
            record = next(records, None)
        except csv.Error as error:
            raise UsageError(f"{path}, row {number}: not CSV ({error}).", hint) from None
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = record
            if field not in header:
                raise _no_field(str(path), field, header)
        elif len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))
        else:
            raise UsageError(f"{path}, row {number}: {len(record)} values for the {len(header)} columns of the header.", hint)


def _parquet_rows(path: Path, field: str) -> Iterator[_Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
                for value in batch.column(0):
                    row = {field: value.as_py()}
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        where = f"{path}, after row {number}" if number else str(path)
        raise UsageError(f"{where}: not readable as Parquet ({_first_line(error)}).", "Write the file again.") from None


def _hub_rows(source: str, field: str) -> Iterator[_Row]:
    """Stream the rows of the first split, at the revision that the hub names at the start."""
    from datasets import load_dataset

    revision = _hub_revision(source)
    try:
        stream = next(iter(load_dataset(source, streaming=True, revision=revision).values()))
        if stream.column_names is not None:
            if field not in stream.column_names:
                raise _no_field(source, field, stream.column_names)
            stream = stream.select_columns([field])
        yield from enumerate(stream, 1)
    except RemoeError:
        raise
    except Exception as error:  # the client, the network and every file format raise classes of their own
        message = f"{source} cannot be read from the Hugging Face hub: {_first_line(error)}."
        raise UsageError(message, "Download one of its files, and give that file.") from None


def _hub_revision(source: str) -> str | None:
    """Ask the hub for the dataset's commit, once. Without a network load_dataset alone would try for 23 s."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(source, timeout=_HUB_TIMEOUT_S).sha
    except errors.GatedRepoError:
        message, hint = f"{source} is a gated dataset, and you have no access.", "Ask for access on its page, then run 'hf auth login'."
    except errors.RepositoryNotFoundError:
        message = f"{source} is neither a file here nor a dataset on the Hugging Face hub that you may see."
        hint = "Check the name; for a private dataset run 'hf auth login'."
    except errors.OfflineModeIsEnabled:
        message = f"{source} is not a file here, and HF_HUB_OFFLINE is set, so the Hugging Face hub is not asked."
        hint = "Give a local file, or unset HF_HUB_OFFLINE."
    except Exception as error:  # the HTTP client raises classes of its own, and huggingface_hub has changed its client before
        message = f"{source} is not a file here, and the Hugging Face hub cannot be reached ({_first_line(error)})."
        hint = "Give a local file, or check the network and try again."
    raise UsageError(message, hint)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".txt": _text_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
