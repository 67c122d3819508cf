"""Changes that only the content tells: of files, and of frames."""

from __future__ import annotations

import os
import zlib
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


def flipped(frame: bytes, bit: int) -> bytes:
    """The same bytes with one bit changed."""
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def checked(frame: bytes) -> bytes:
    """The same frame (function/codec.py) with the check that its bytes have."""
    return frame[:20] + zlib.crc32(frame[24:], zlib.crc32(frame[:20])).to_bytes(4, "little") + frame[24:]
