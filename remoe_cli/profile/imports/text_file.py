"""Text that other programs wrote: UTF-8, or UTF-16 with a byte order mark; plain or compressed with gzip.

Compression and encoding are seen in the first bytes, not in the file's name. A line ends at a line feed only: what else Unicode calls
the end of a line belongs to the text. Bytes that are no text become U+FFFD: routing is in none of them.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from remoe_cli.model.checkpoint import reason
from remoe_cli.profile.imports.checks import refuse

_GZIP = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Open a file as text.

    Raises: UsageError, also while it is read, when it is compressed and damaged or cut off; OSError when it cannot be opened.
    """
    with _unpacked(file) as binary:
        encoding = "utf-16" if binary.peek(2)[:2] in _UTF_16 else "utf-8-sig"
        yield io.TextIOWrapper(binary, encoding, errors="replace", newline="\n")


def first_bytes(file: Path, size: int) -> tuple[bytes, bool]:
    """Read the first bytes of a file, of compressed text those of the text, as UTF-8 and without a byte order mark.

    Returns: the bytes, and whether the file is compressed.
    Raises: what `open_text` raises.
    """
    with file.open("rb") as raw:
        start = raw.read(size)
    is_compressed = start.startswith(_GZIP)
    if is_compressed:
        with _unpacked(file) as binary:
            start = binary.read(size)
    if start[:2] in _UTF_16:
        start = start[: size // 2 * 2].decode("utf-16", "replace").encode()
    return start.removeprefix(b"\xef\xbb\xbf"), is_compressed


@contextmanager
def _unpacked(file: Path) -> Iterator[Any]:
    """Open the bytes of a file, those that it holds in compressed form where it is compressed."""
    with file.open("rb") as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(_GZIP) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise refuse(file, f"it is damaged or cut off ({reason(error)})", "Unpack it with gunzip, or compress it again.") from None
