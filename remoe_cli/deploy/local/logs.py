"""Log files: the stream of one execution environment, and reading the end of any of them."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

LONGEST_BYTES = 16 << 20
TAIL_BYTES = 4096


class LogStream:
    """One file that a worker has as stdout and stderr and the twin appends to. Writing never blocks, and what a worker wrote
    before it answered is there when its answer is."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)

    def begin(self) -> int:
        """The offset in bytes where a new request's log starts; a file that has grown too long starts again from nothing."""
        size = os.fstat(self.descriptor).st_size
        if size > LONGEST_BYTES:
            os.ftruncate(self.descriptor, 0)
            return 0
        return size

    def write(self, text: str) -> None:
        if self.descriptor >= 0:
            os.write(self.descriptor, text.encode())

    def tail(self, start: int) -> bytes:
        """The last 4 KB of what was written since offset `start`."""
        if self.descriptor < 0:
            return b""
        end = os.fstat(self.descriptor).st_size
        start = max(start, end - TAIL_BYTES)
        return os.pread(self.descriptor, end - start, start)

    def close(self) -> None:
        """Close the file; later writes go nowhere, so that a descriptor used anew by somebody else is safe."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def last_lines(path: Path, lines: int) -> list[str]:
    """The last `lines` lines of a file; none if there is no file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=lines)]
    except OSError:
        return []
