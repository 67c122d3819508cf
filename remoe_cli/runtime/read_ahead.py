"""Read a main function's weights before the loader asks for them, while torch is imported.

The loader maps the files, so it reads them page by page as it comes to each tensor: the disk waits for the processor, and the processor
waits for the disk. Here threads read the same bytes in large pieces and in the loader's order, so that the kernel has them when they are
needed. Nothing is kept or checked: where this guesses wrong, or memory is short, the loader reads from the disk as it would anyway.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from remoe_cli.errors import RemoeError
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.package.partial_checkpoint import read_header
from remoe_cli.runtime.free_memory import available_bytes

# A thread that wants Python's lock waits up to 5 ms for it while another one imports: fewer and larger reads wait less often.
PIECE_BYTES = 16 << 20
_THREADS = 2
_EXPERT = re.compile(r"experts\.(\d+)\.")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Span:
    """The bytes of a file from `first` to `last`, exclusive."""

    file: Path
    first: int
    last: int


def spans(checkpoint: Checkpoint, elsewhere: Mapping[int, Collection[int]], experts: int) -> list[Span]:
    """List what the loader will read of the weights: first what is in no layer, then layer after layer.

    `elsewhere` has by hidden layer the experts, of `experts` in each, that are not loaded here. They are told by the names and shapes of
    tensors, so it is a guess.

    Raises: ModelError, OSError and ValueError for files that cannot be read.
    """
    partial = checkpoint.held() is not None
    found: list[tuple[int, int, Span]] = []
    for number, file in enumerate(checkpoint.weight_files):
        header, data = read_header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                layer = int(named[1]) if (named := _LAYER.search(name)) else -1
                away = () if partial else elsewhere.get(layer, ())
                found += [(layer, number, Span(file, data + a, data + b)) for a, b in _kept(name, entry, away, experts)]
    found.sort(key=lambda each: (each[0], each[1], each[2].first))
    return list(_joined(span for _, _, span in found))


def _kept(name: str, entry: Mapping[str, Any], away: Collection[int], experts: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a tensor that are loaded: all of it, or the rows of the experts that are here."""
    first, last = entry["data_offsets"]
    if (number := _EXPERT.search(name)) is not None:
        if int(number[1]) not in away:
            yield first, last
    elif away and entry["shape"][:1] == [experts] and (len(entry["shape"]) > 2 or "experts" in name):
        row_bytes = (last - first) // experts
        yield from ((first + row * row_bytes, first + (row + 1) * row_bytes) for row in range(experts) if row not in away)
    else:
        yield first, last


def _joined(found: Iterable[Span]) -> Iterator[Span]:
    """Join spans that follow each other in a file, and divide them into pieces of at most PIECE_BYTES."""
    joined: Span | None = None
    for span in found:
        if joined is not None and (joined.file, joined.last) == (span.file, span.first):
            joined = Span(joined.file, joined.first, span.last)
            continue
        if joined is not None:
            yield from _pieces(joined)
        joined = span
    if joined is not None:
        yield from _pieces(joined)


def _pieces(span: Span) -> Iterator[Span]:
    for first in range(span.first, span.last, PIECE_BYTES):
        yield Span(span.file, first, min(span.last, first + PIECE_BYTES))


@contextmanager
def reading_ahead(wanted: Callable[[], Sequence[Span]]) -> Iterator[None]:
    """Read what `wanted` lists while the body runs.

    The end of the body ends it after the pieces under way. Files that cannot be read are left to the loader, which says why.
    """
    ended = Event()

    def read_all() -> None:
        with suppress(RemoeError, OSError, ValueError, KeyError, TypeError):
            todo = deque(_within_memory(wanted()))
            with ThreadPoolExecutor(_THREADS, "read-ahead") as pool:
                for reader in [pool.submit(_read, todo, ended) for _ in range(_THREADS)]:
                    reader.result()

    thread = Thread(target=read_all, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _within_memory(found: Sequence[Span]) -> Iterator[Span]:
    """Yield the first spans that fit half of the memory that is free: what is read beyond that drives out what was read before."""
    left = available_bytes() // 2
    for span in found:
        if (left := left - (span.last - span.first)) < 0:
            return
        yield span


def _read(todo: deque[Span], ended: Event) -> None:
    """Read spans until there are none, each into the same buffer, which nobody looks at."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    while not ended.is_set():
        try:
            span = todo.popleft()
        except IndexError:
            return
        file = os.open(span.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel would read on, into experts that are elsewhere
            os.preadv(file, [buffer[: span.last - span.first]], span.first)
        finally:
            os.close(file)
