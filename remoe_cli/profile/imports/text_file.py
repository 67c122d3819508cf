"""Text that other programs wrote, plain or compressed with gzip.

The encoding is UTF-8, or what the byte order mark says. Compression and encoding are seen in the first bytes, not in the file's name. A
line ends at a line feed only: what else Unicode calls the end of a line belongs to the text. Bytes that are no text become U+FFFD: routing
is in none of them.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from remoe_cli.bounded import open_file
from remoe_cli.model.checkpoint import reason
from remoe_cli.profile.imports.checks import refuse
from remoe_cli.profile.prompts.files import decoded

Line = tuple[int, str]


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Open a file as text.

    Raises: UsageError, also while it is read, when it is damaged or cut off; OSError when it cannot be opened.
    """
    with open_file(file) as raw:
        try:
            yield io.TextIOWrapper(decoded(raw, str(file)), "utf-8", errors="replace", newline="\n")
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise refuse(file, f"it is damaged or cut off ({reason(error)})", "Make it again, or unpack it with gunzip.") from None


def lines_of(file: Path, stream: TextIO, most: int, start: str = "", number: int = 1) -> Iterator[Line]:
    """Yield the lines of a file with their numbers.

    `start` is what has been read of the first line, and `number` is its number.

    Raises: UsageError for a line of more than `most` characters.
    """
    while line := start if start.endswith("\n") else start + stream.readline(most + 1):
        if len(line) > most:
            raise refuse(f"{file}, row {number}", f"it has more than {most:,} characters, which is the most for a line")
        yield number, line
        start, number = "", number + 1
