"""Digests of files, remembered so that a file that has not changed is read once.

The cache folder holds them in digests.json, by device, inode, size and times of last change in ns. The kernel alone sets the time of the
last change of an inode (ctime), so a file whose content was replaced has another key, even where its size and its mtime are put back. A
file that changed within the last seconds is not remembered: a further change could still get the same time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from pydantic import Field

from remoe_cli import artifacts, interrupts
from remoe_cli.errors import RemoeError
from remoe_cli.progress import Report, no_report
from remoe_cli.settings import cache_dir

_SETTLED_S = 2.0  # the coarsest time of last change of a file system that is in use
_PATIENCE_S = 2.0  # before anything is reported
_REMEMBERED = 5_000
_CHUNK_BYTES = 8 << 20
_THREADS = 4


class Remembered(artifacts.Document):
    """The file digests.json: sha256 by key, the oldest first."""

    schema_version: str = "remoe.digests/1"
    files: dict[str, str] = Field(default_factory=dict)


def sha256_of(paths: Iterable[Path], report: Report = no_report) -> list[str]:
    """Return the digests of files in hexadecimal, in the order of `paths`. Several files are read at once.

    `report` is called with the bytes done and their total, but only by work that takes more than 2 s.

    Raises: OSError for a file that cannot be read.
    """
    paths = list(paths)
    begun, begun_ns = time.monotonic(), time.time_ns()
    known = _read()
    keys = [_key(os.stat(path)) for path in paths]
    missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    if not missing:
        return [known[key] for key in keys]
    total, done, lock = sum(path.stat().st_size for path in missing.values()), 0, Lock()

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if time.monotonic() - begun > _PATIENCE_S:
                report(done, total)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(missing, pool.map(lambda path: _sha256(path, count), missing.values()), strict=True))
    _remember({key: digest for key, digest in found.items() if _is_settled(key, missing[key], begun_ns)})
    return [known.get(key) or found[key] for key in keys]


def _sha256(path: Path, count: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            interrupts.check()
            digest.update(view[:length])
            count(length)
    return digest.hexdigest()


def _key(found: os.stat_result) -> str:
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _is_settled(key: str, path: Path, begun_ns: int) -> bool:
    """Return whether the digest is of this very content: the file has not changed meanwhile, nor shortly before."""
    now = os.stat(path)
    return _key(now) == key and now.st_ctime_ns < begun_ns - _SETTLED_S * 1e9


def _file() -> Path:
    return cache_dir() / "digests.json"


def _read() -> dict[str, str]:
    with suppress(RemoeError):
        return artifacts.read_json(_file(), Remembered).files
    return {}


def _remember(more: dict[str, str]) -> None:
    """Add digests to the cache. A cache that cannot be written costs time only."""
    if more:
        files = dict(list((_read() | more).items())[-_REMEMBERED:])
        with suppress(OSError, RemoeError):
            artifacts.write_json(_file(), Remembered(files=files))
