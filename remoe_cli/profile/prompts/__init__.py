"""Prompts of a dataset: a file, standard input (`-`), or a stream from the Hugging Face hub.

    read_prompts("prompts.jsonl")                        the field `prompt`, or a format that formats.py knows
    read_prompts("logs.jsonl.gz", "request.messages")    a field inside an object
    read_prompts("owner/name", limit=100)                the first split of a dataset, of which 100 prompts are read

files.py reads files and pipes row by row, hub.py datasets of the hub, formats.py makes a prompt of a row. What exists on disk wins
over the hub. Rows that ask nothing (texts of nothing but white space, conversations without a question) are left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.artifacts import sha256_bytes
from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Prompt, as_text
from remoe_cli.profile.prompts import files
from remoe_cli.profile.prompts.formats import DEFAULT_FIELD, PromptFormat, choose, messages_of
from remoe_cli.profile.prompts.hub import HUB_ID, hub_rows

_MOST_BYTES = 1 << 29  # of memory for all prompts together
_ROW_BYTES = 200  # of memory for a prompt besides its text

# What rows may state of their lengths, in tokens; routing from a file is held against it.
LENGTHS = ("n_prompt_tokens", "n_decode_tokens")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, at least one.

    source   where they come from: a path, an id of the hub, or "standard input"
    field    the field that held them
    texts    the prompts: texts, and conversations of more than one message of the user
    rows     for each prompt the number of its row; empty where they do not come from a file
    skipped  rows left out because they ask nothing
    stated   by the names in LENGTHS what rows say of their lengths, where every row says it

    >>> PromptSet("standard input", "prompt", ("Hello", "World")).sha256[:12]
    'd24bf63378b2'
    """

    source: str
    field: str
    texts: tuple[Prompt, ...]
    rows: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    skipped: int = dataclasses.field(default=0, compare=False)
    stated: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def sha256(self) -> str:
        """The digest of the prompts as one compact ASCII JSON array, so that where one prompt ends matters."""
        prompts = [prompt if isinstance(prompt, str) else prompt.to_json() for prompt in self.texts]
        return sha256_bytes(json.dumps(prompts, ensure_ascii=True, separators=(",", ":")).encode("ascii"))

    def where(self, index: int) -> str:
        """Say where a prompt comes from, as in "prompts.jsonl, row 3"."""
        return f"{self.source}, row {self.rows[index]}" if self.rows else f"{self.source}, prompt {index + 1}"


def read_prompts(source: str, field: str = DEFAULT_FIELD, limit: int | None = None) -> PromptSet:
    """Read the prompts of a source, and stop after `limit` of them.

    With the default `field`, rows without such a field are read by the first format of formats.py that fits the first row. Rows of plain
    text have no fields, so `field` is ignored for them.

    Raises: UsageError when the source cannot be found, reached or decoded, when a row is broken, has none of the fields or holds
    something other than a prompt in it, or when there is no prompt.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit of prompts is {limit}, so none would be read.", "Give a limit of 1 or more.")
    name = "standard input" if source == files.STANDARD_INPUT else source
    read = _Reader(field)
    texts: list[Prompt] = []
    numbers: list[int] = []
    stated: list[list[object]] = []
    skipped = held_bytes = 0
    with closing(_rows(source, name, lambda names: choose(name, names, field).columns(names))) as rows:
        for number, row in rows:
            prompt = read(row, f"{name}, row {number}")
            if not as_text(prompt).strip():
                skipped += 1
                continue
            held_bytes += _ROW_BYTES + sys.getsizeof(as_text(prompt))
            if held_bytes > _MOST_BYTES:
                raise UsageError(
                    f"{name}, row {number}: with it the prompts take more than {_MOST_BYTES >> 20:,} MiB, which is the most.",
                    "Read fewer of them with --limit, or give a smaller file.",
                )
            texts.append(prompt)
            numbers.append(number)
            stated.append([row.get(length) for length in LENGTHS] if isinstance(row, Mapping) else [None, None])
            if len(texts) == limit:
                break
    if not texts:
        empty = f": its {skipped} rows ask nothing" if skipped else ""
        raise UsageError(f"{name} holds no prompts{empty}.", "Give a dataset with at least one text that is not blank.")
    lengths = {length: column for length, column in zip(LENGTHS, zip(*stated, strict=True), strict=True) if None not in column}
    return PromptSet(name, read.field, tuple(texts), tuple(numbers), skipped, lengths)


class _Reader:
    """Makes prompts of rows, by the format of the first row that has fields."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._format: PromptFormat | None = None

    def __call__(self, row: object, where: str) -> Prompt:
        if isinstance(row, Mapping):
            if self._format is None:
                self._format = choose(where, row.keys(), self.field)
                self.field = self._format.field
            prompt = self._format.read(row, where)
        elif isinstance(row, str):
            prompt = row
        elif (messages := messages_of(row, where)) is not None:
            prompt = messages
        else:
            raise UsageError(
                f"{where}: a JSON {type(row).__name__}, not an object.", "Give one JSON object a line, or an array of objects."
            )
        if isinstance(prompt, str) and not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError(f"{where}: the field {self.field!r} holds half of a surrogate pair.", "Correct the row.")
        return prompt


def _rows(source: str, name: str, select: files.Select) -> files.Rows:
    if source == files.STANDARD_INPUT:
        return files.stream_rows(files.standard_input(), name, select)
    path = Path(source)
    is_known = files.suffix_of(path) in files.SUFFIXES
    known = f"{', '.join(files.SUFFIXES)}, and .gz after those of text"
    if not os.path.exists(source):
        if not is_known and HUB_ID.fullmatch(source):
            return hub_rows(source, select)
        raise UsageError(f"There is no file {source!r}.", "Check the path, or give a Hugging Face dataset id such as owner/name.")
    if path.is_dir():
        raise UsageError(f"{source} is a folder, not a file of prompts.", f"Give one file: {known}.")
    if path.is_file() and not is_known:
        raise UsageError(f"{source} has the unknown suffix {path.suffix!r}.", f"Known are {known}.")
    return files.file_rows(path, name, select)
