"""What goes into a deployment's bucket, and how many are sent at once."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from remoe_cli import artifacts
from remoe_cli.progress import Report

AT_ONCE = 8


@dataclass(frozen=True)
class Object:
    """An object that the bucket is to hold under `key`: a file, or bytes.

    sha256   digest of its bytes, or of their meaning where other bytes may mean the same (package/dependencies.py)
    """

    key: str
    source: Path | bytes
    size_bytes: int
    sha256: str

    def read(self, start: int, end: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start:end]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


@dataclass(frozen=True)
class Stored:
    """An object that the bucket holds, and since when."""

    key: str
    size_bytes: int
    since: datetime


def object_of(key: str, source: bytes) -> Object:
    return Object(key, source, len(source), artifacts.sha256_bytes(source))


def checksum(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


@contextmanager
def pool_of_threads(at_once: int = AT_ONCE) -> Iterator[ThreadPoolExecutor]:
    """Make threads that end after their current call when something fails or the user interrupts."""
    pool = ThreadPoolExecutor(at_once)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Counter:
    """Adds up the bytes that all threads have sent, and reports them."""

    def __init__(self, total: int, report: Report) -> None:
        self._done, self._total, self._report, self._lock = 0, total, report, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._done, self._total)
