"""What the kernel keeps of a file in memory: look at it, and let it forget."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)


def is_cached(file: Path, first: int, last: int) -> bool:
    """Whether the kernel has these bytes in memory. Looking reads nothing."""
    return all(_pages(file)[first // mmap.PAGESIZE : -(-last // mmap.PAGESIZE)])


def is_untouched(file: Path, first: int, last: int) -> bool:
    """Whether the kernel has no page of these bytes."""
    return not any(_pages(file)[first // mmap.PAGESIZE : -(-last // mmap.PAGESIZE)])


def _pages(file: Path) -> list[bool]:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        failed = _libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), pages)
        del view
        assert not failed, os.strerror(ctypes.get_errno())
        return [bool(page & 1) for page in pages]


def drop(file: Path) -> None:
    """Let the kernel forget a file, or skip the test where it does not."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if not is_untouched(file, 0, file.stat().st_size):
        pytest.skip("this file system keeps its files in memory")


def wait_until(is_so: Callable[[], bool], most_s: float = 30.0) -> bool:
    """Wait for something that another thread does."""
    end = time.monotonic() + most_s
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.01)
    return found
