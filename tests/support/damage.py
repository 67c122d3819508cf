"""Changes of files that only their content tells."""

from __future__ import annotations

import os
from pathlib import Path


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Write into a file in its place, and put its time of last change back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1]))
    assert path.stat().st_size > at
