"""The formats of routing that other programs record: one row each.

To add a format, write a module here with a reader and a recogniser, and add its row to FORMATS. Then add a sample to `every_format` in
tests/support/routing_files.py and a row to the table of formats in the documentation; tests/profile/test_imports_formats.py says what is
still missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.bounded import open_file
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.arrays import is_arrays_file, read_arrays_file
from remoe_cli.profile.imports.checks import Routing, listed, refuse
from remoe_cli.profile.imports.responses import is_responses, read_responses
from remoe_cli.profile.imports.sglang_dump import is_sglang_dump, read_sglang_dump
from remoe_cli.profile.imports.table import COUNT_COLUMNS, is_table, read_table
from remoe_cli.profile.imports.text_file import open_text

_START_BYTES = 2**16


@dataclass(frozen=True)
class Format:
    """One format.

    name         what messages call it
    suffixes     how its files are usually named; a file is recognised by its content alone
    holds        what its files hold
    is_text      whether its files are text, which may be compressed with gzip
    recognises   (the file's first bytes, the file) -> whether the file has this format
    read         (file, the model's sizes, the model's name) -> the routing; raises UsageError when the file is damaged or does not fit
    """

    name: str
    suffixes: tuple[str, ...]
    holds: str
    is_text: bool
    recognises: Callable[[bytes, Path], bool]
    read: Callable[[Path, MoeSpec, str], Routing]


# The first format that recognises a file reads it.
FORMATS = (
    Format("SGLang dump", (".pt",), "counts or expert ids of forward passes", False, is_sglang_dump, read_sglang_dump),
    Format("arrays", (".npz", ".npy", ".safetensors"), "counts, or expert ids of tokens", False, is_arrays_file, read_arrays_file),
    Format(
        "server responses",
        (".jsonl", ".json"),
        "expert ids of tokens in the responses of vLLM or SGLang, one a line or in an array",
        True,
        is_responses,
        read_responses,
    ),
    Format(
        "table",
        (".csv",),
        f"counts, one row for each layer and expert, in the columns layer, expert and {' or '.join(COUNT_COLUMNS)}",
        True,
        is_table,
        read_table,
    ),
)


def read_routing(file: Path, spec: MoeSpec, model: str) -> Routing:
    """Read a file in the format that it has.

    `model` is the name to look for in a file with routing of several models.

    Raises: UsageError when no format recognises the file, or its reader refuses it; OSError when it cannot be opened.
    """
    return format_of(file).read(file, spec, model)


def format_of(file: Path) -> Format:
    """Find the format of a file.

    Raises: UsageError when no format recognises it.
    """
    with open_file(file) as stream:
        raw = stream.read(_START_BYTES)
    text = b""
    for known in FORMATS:
        if known.is_text and not text:
            with open_text(file) as lines:
                text = lines.read(_START_BYTES).encode()
        if known.recognises(text if known.is_text else raw, file):
            return known
    names = "; ".join(f"{known.name} ({', '.join(known.suffixes)}: {known.holds})" for known in FORMATS)
    raise refuse(file, f"its format is not known{_looks_like(raw, text)}", f"Known formats: {names}.")


def _looks_like(raw: bytes, text: bytes) -> str:
    """Say what can be seen of a file whose format is not known."""
    if raw.startswith(b"\x1f\x8b") and (b"\0" in text or text.startswith(b"PK")):
        return " (it is compressed with gzip, which only text may be: unpack it first)"
    line = text.split(b"\n")[0].decode("utf-8", "replace").strip()
    separator = max(",;\t|", key=line.count)
    return f" (it begins like a table with the columns {listed(line.split(separator))})" if separator in line and "\0" not in line else ""
