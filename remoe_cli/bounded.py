"""Reading what others made, in bounded memory and time.

Each kind of file has a limit of bytes. A few bytes of JSON can take a hundred times as much memory, and JSON that is nested deeply ends
every program that goes through it, so its parts and its depth are counted before it is decoded. Compressed text may unpack to a thousand
times its size, so what is unpacked is held against what was read. Folders, pipes and devices in the place of a file are refused: reading a
pipe waits for its writer, and a device may have no end.

A limit is far above what people have. The error says it: `LimitError` for what cannot be read, `TooLargeError` and `TooDeepError` for what
cannot be decoded.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

MIB = 1 << 20
DEEPEST = 100  # lists and objects inside each other
_LARGEST_INT, _LARGEST_FLOAT = 2**63, 1e18
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
_UNPACKED_BYTES, _UNPACKED_TIMES = 64 * MIB, 100
_WHAT = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True)
class Limit:
    """The most that a file of one kind may have.

    parts   of JSON: numbers, texts, lists and objects together
    """

    bytes: int
    parts: int = 2**20


DOCUMENT = Limit(32 * MIB)  # of remoe; the plan of DeepSeek-V3 has 0.15 MB
FIGURES = Limit(MIB // 4)  # TOML; the largest catalog that comes with remoe has 14 kB
CONFIG = Limit(16 * MIB)  # config.json and its like
TOKENIZER = Limit(256 * MIB, 2**24)  # Gemma's tokenizer.json has 33 MB
INDEX = Limit(128 * MIB, 2**22)  # of a checkpoint's tensors; DeepSeek-V3's has 91,000 and 9 MB
RESPONSE = Limit(128 * MIB, 2**23)  # an answer with the times of all its calls
ARRAYS = Limit(4096 * MIB)  # of a profile: two phases of 2**27 counts, vectors and traces


class LimitError(OSError):
    """A file that is not read: it is too large, or no file."""

    def __str__(self) -> str:
        return str(self.strerror)


class TooLargeError(ValueError):
    """A value has more characters or parts than the limit; the message says which."""


class TooDeepError(ValueError):
    """A value is nested more deeply than DEEPEST."""


def open_file(path: Path) -> io.BufferedReader[Any]:
    """Open a file to read its bytes.

    Raises: LimitError for a folder, a pipe or a device; OSError for what cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait for one
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise LimitError(errno.EINVAL, f"it is {_WHAT.get(stat.S_IFMT(mode), 'a device')}, not a file")
    return io.BufferedReader(io.FileIO(descriptor))


def read_bytes(path: Path, limit: Limit) -> bytes:
    """Read a file whole.

    Raises: LimitError for one that is too large, and what `open_file` raises.
    """
    with open_file(path) as file:
        return read_stream(file, limit)


def read_stream(stream: Any, limit: Limit) -> bytes:
    """Read all bytes of a stream.

    Raises: LimitError where there are too many.
    """
    pieces: list[bytes] = []
    left = limit.bytes + 1
    while piece := stream.read(left):  # to the end, where a stream of botocore's says whether it is complete
        pieces.append(piece)
        left -= len(piece)
        if left <= 0:
            raise LimitError(errno.EFBIG, f"it has more than {_size(limit.bytes)}, which is the most for it")
    return b"".join(pieces)


def check_bytes(size: int, limit: Limit) -> None:
    """Check the size of a file that is not read here.

    Raises: LimitError for one that is too large.
    """
    if size > limit.bytes:
        raise LimitError(errno.EFBIG, f"it has {size:,} bytes, and {_size(limit.bytes)} is the most for it")


def read_json(path: Path, limit: Limit) -> Any:
    """Read a JSON file.

    Raises: ValueError, in what a person can read, for what is not JSON; else what `read_bytes` and `parse_json` raise.
    """
    return parse_json(read_bytes(path, limit), limit)


def parse_json(text: str | bytes, limit: Limit = DOCUMENT, finite: bool = False) -> Any:
    """Decode JSON.

    With `finite`, NaN and infinities are refused, and numbers that are larger than any figure: they overflow what is computed.

    Raises: TooLargeError and TooDeepError for more than the limits, ValueError for what is not JSON.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    check_size(text, limit.bytes, limit.parts)
    check_depth(text)
    return json.loads(text, parse_constant=_not_json, parse_int=_int, parse_float=_float) if finite else json.loads(text)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a number in JSON")


def _int(digits: str) -> int:
    if len(digits) > 20 or not -_LARGEST_INT <= (value := int(digits)) < _LARGEST_INT:
        raise ValueError(f"it holds the number {digits[:30]}{'...' if len(digits) > 30 else ''}, which is too large")
    return value


def _float(digits: str) -> float:
    if not abs(value := float(digits)) <= _LARGEST_FLOAT:
        raise ValueError(f"it holds the number {digits[:30]}, which is too large")
    return value


def count_parts(text: str) -> int:
    """Count the lists, the objects and their elements in JSON, at most: text in quotes may look like some."""
    return sum(map(text.count, "[{,"))


def check_size(text: str, most: int, most_parts: int | None = None) -> None:
    """Check the size of a value before it is decoded. Its parts are the lists, objects and their elements.

    Raises: TooLargeError for more than `most` characters, or more than `most_parts` parts.
    """
    if len(text) > most:
        raise TooLargeError(f"a value of more than {most >> 20} MiB")
    if most_parts is not None and len(text) > most_parts and count_parts(text) > most_parts:
        raise TooLargeError(f"a value of more than {most_parts:,} numbers, lists and objects")


def check_depth(text: str, first: int = 0, last: int | None = None) -> None:
    """Check how deeply lists and objects are nested in JSON, from character `first` to `last`.

    Raises: TooDeepError for more than DEEPEST.

    >>> check_depth("[" * 5 + "]" * 5)
    """
    last = len(text) if last is None else last
    if text.count("[", first, last) + text.count("{", first, last) <= DEEPEST:
        return
    depth = 0
    for found in _BRACKETS.finditer(text, first, last):
        sign = found[0][0]
        depth += 1 if sign in "[{" else -1 if sign in "]}" else 0
        if depth > DEEPEST:
            raise TooDeepError(f"nested too deeply, with more than {DEEPEST} lists and objects inside each other")


class _Counted:
    """A stream that counts the bytes that were read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.count = stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data


class Unpacked(io.RawIOBase):
    """What a stream that is compressed with gzip unpacks to.

    Raises: LimitError, while it is read, where more than 64 MiB are more than 100 times what is compressed.
    """

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._count = _Counted(packed), 0
        self._file = gzip.GzipFile(fileobj=self._packed)  # type: ignore[call-overload]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        self._count += len(data)
        if self._count > max(_UNPACKED_BYTES, _UNPACKED_TIMES * self._packed.count):
            what = f"it unpacks to more than {_size(_UNPACKED_BYTES)} and more than {_UNPACKED_TIMES} times its size: unpack it first"
            raise LimitError(errno.EFBIG, what)
        buffer[: len(data)] = data
        return len(data)


def unpacked(packed: IO[bytes]) -> io.BufferedReader[Any]:
    """Unpack a stream that is compressed with gzip; see `Unpacked`."""
    return io.BufferedReader(Unpacked(packed))


def _size(count: int) -> str:
    return f"{count >> 20:,} MiB" if count >= MIB else f"{count >> 10:,} KiB"
