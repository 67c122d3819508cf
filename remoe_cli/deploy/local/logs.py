"""Log files of the twin: the stream of one execution environment, and the last lines of any log."""

from __future__ import annotations

import os
from pathlib import Path

from remoe_cli import bounded

LONGEST_BYTES = 16 << 20
TAIL_BYTES = 4096


class LogStream:
    """A file that is a worker's stdout and stderr, and that the twin appends to.

    Writing never blocks. What a worker wrote before it answered is in the file when its answer arrives. What the twin cannot write, as on a
    full disk, is still in the tail of its request, whose REPORT line is the bill; `trouble` then says why.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)  # not its parents: a folder that was deleted stays deleted
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self.trouble: str | None = None
        self._unwritten = b""

    def begin(self) -> int:
        """Return the offset at which a new request's log starts; a file that is too long is emptied first."""
        self.trouble, self._unwritten = None, b""
        size = os.fstat(self.descriptor).st_size
        if size > LONGEST_BYTES:
            os.ftruncate(self.descriptor, 0)
            return 0
        return size

    def write(self, text: str) -> None:
        if self.descriptor < 0:
            return
        content = text.encode()
        try:
            while content:  # a disk that fills takes a part, then says why
                content = content[os.write(self.descriptor, content) :]
        except OSError as error:
            self.trouble = f"The log {self.path} cannot be written: {error.strerror}."
        self._unwritten += content

    def tail(self, start: int) -> bytes:
        """Return the last 4 KB of what was written since offset `start`."""
        if self.descriptor < 0:
            return b""
        end = os.fstat(self.descriptor).st_size
        start = max(start, end - TAIL_BYTES)
        return (os.pread(self.descriptor, end - start, start) + self._unwritten)[-TAIL_BYTES:]

    def close(self) -> None:
        """Close the file; later writes go nowhere, as the system may give its descriptor to another file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def last_lines(path: Path, lines: int) -> list[str]:
    """Return the last `lines` lines of a file; none if there is no file."""
    try:
        with bounded.open_file(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_BYTES))
            text = file.read(LONGEST_BYTES).decode("utf-8", "replace").removesuffix("\n")
            return text.split("\n")[-lines:] if text else []
    except OSError:
        return []
