"""Recognising files that remoe made by their own content.

JSON documents begin with their schema; safetensors files, pictures and reports have remoe in their metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_cli import bounded

MAKER = "remoe"  # in the metadata of pictures and of safetensors files
_LONGEST_JSON_BYTES = bounded.DOCUMENT.bytes
_HEAD_BYTES = 1 << 16
_NAME_WITHIN_BYTES = 4096
_REPORT = f'<meta name="generator" content="{MAKER}">'.encode()


@dataclass(frozen=True)
class Made:
    """How to recognise one kind of file that remoe makes; `what` names the kind in messages."""

    what: str
    recognises: Callable[[Path], bool]


def document(schema: str) -> Made:
    """Recognise JSON documents of any version of a schema, such as "remoe.plan".

    Documents that are cut off at the end are recognised too.
    """
    head = f'{{\n "schema_version": "{schema}/'.encode()

    def recognises(path: Path) -> bool:
        begin = _head(path, len(head))
        return begin == head[: len(begin)] or str(read_object(path).get("schema_version")).startswith(f"{schema}/")

    return Made(schema.partition(".")[2], recognises)


def safetensors_metadata(path: Path) -> Mapping[str, str]:
    """Return the metadata in the head of a safetensors file; none when the file is not one."""
    head = _head(path, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > _LONGEST_JSON_BYTES:
        return {}
    metadata = _parsed(_head(path, 8 + length)[8:]).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def arrays(kind: str) -> Made:
    """Recognise safetensors files of a kind, such as "prediction"."""
    return Made(kind, lambda path: safetensors_metadata(path).get(MAKER, "").partition(" ")[0] == kind)


def _is_picture(path: Path) -> bool:
    """Look for remoe's name where matplotlib puts `Software` of PNG files and `Creator` of the others."""
    maker, head = MAKER.encode(), _head(path)
    match head[:4]:
        case b"\x89PNG":
            return b"tEXtSoftware\0" + maker in head
        case b"%PDF":
            return b"/Creator (" + maker + b")" in head + _tail(path)
    return b"<dc:title>" + maker + b"</dc:title>" in head


def naming(what: str, name: str) -> Made:
    """Recognise files that have a name at their beginning, such as that of a schema."""
    return Made(what, lambda path: name.encode() in _head(path, _NAME_WITHIN_BYTES))


ANY = Made("file", lambda path: True)  # for names that only remoe uses, in a folder that remoe made
NONE = Made("file", lambda path: False)
PICTURE = Made("picture", _is_picture)
REPORT = Made("report", lambda path: _REPORT in _head(path)[:1024])


def _head(path: Path, length: int = _HEAD_BYTES) -> bytes:
    with bounded.open_file(path) as file:
        return file.read(length)


def _tail(path: Path) -> bytes:
    with bounded.open_file(path) as file:
        file.seek(max(0, path.stat().st_size - _HEAD_BYTES))
        return file.read()


def read_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object of at most 32 MiB; an empty one where the file holds none."""
    return _parsed(_head(path, _LONGEST_JSON_BYTES + 1))


def _parsed(text: bytes) -> Mapping[str, Any]:
    if len(text) > _LONGEST_JSON_BYTES:
        return {}
    try:
        data = bounded.parse_json(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
