"""Tensors, numbers and texts of a file that torch.save wrote, without unpickling it.

Such a file is a zip: data.pkl describes the object, data/0, data/1, ... hold the tensors' bytes. A pickle is a program, so none is run
here: pickletools.genops takes the stream apart, and a small machine of our own follows the few opcodes that plain values need. It
knows one call, the one that puts a tensor together, and two kinds of names beside it. Everything else is refused: other opcodes,
other names, tensors that reach beyond their bytes, compressed members.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES = {
    "torch ByteStorage": "u1",
    "torch CharStorage": "i1",
    "torch ShortStorage": "<i2",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
}
_REBUILD, _HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_MOST_OPCODES, _MOST_PICKLE_BYTES = 50_000_000, 2**30
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class UnreadableError(ValueError):
    """The file is not what torch.save makes of tensors, numbers, texts, lists, tuples and dictionaries."""


@dataclass(frozen=True)
class _Name:
    text: str


def is_torch_zip(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read_torch_zip(file: Path) -> Any:
    """The saved object, with arrays for tensors; raises UnreadableError, or what zipfile raises for a damaged archive."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableError(f"it has {len(pickles)} members named data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _member(archive, order, 16) != b"little":
            raise UnreadableError("its numbers are not little-endian")
        return _Machine(archive, folder, file.stat().st_size).run(_member(archive, pickles[0], _MOST_PICKLE_BYTES))


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most_bytes:
        raise UnreadableError(f"its member {name} is compressed or too large")
    return archive.read(info)


class _Machine:
    """Follows a pickle's opcodes with a stack and a memo of plain values."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, file_bytes: int) -> None:
        self._archive, self._folder, self._bytes_left = archive, folder, file_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], npt.NDArray[Any]] = {}

    def run(self, pickled: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if count > _MOST_OPCODES:
                raise UnreadableError("its description is too long")
            if opcode.name == "STOP":
                if len(self._stack) != 1:
                    raise UnreadableError("its description does not end in one object")
                return self._stack[0]
            self._step(opcode.name, argument)
        raise UnreadableError("its description has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in _TUPLES:
            stack.append(tuple(self._pop() for _ in range(_TUPLES[name]))[::-1])
        elif name in ("APPEND", "APPENDS"):
            values = [self._pop()] if name == "APPEND" else self._to_mark()
            self._top_as(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._to_mark()
            if not all(type(key) in (str, int) for key in values[::2]):  # hashing nested tuples can take for ever
                raise UnreadableError("it has a dictionary whose keys are neither texts nor numbers")
            self._top_as(dict).update(zip(values[::2], values[1::2], strict=True))
        elif name == "GLOBAL":
            if argument not in _TYPES and argument not in (_REBUILD, _HOOKS):
                raise UnreadableError(f"it names {argument}, which is no tensor")
            stack.append(_Name(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            arguments, called = self._pop(), self._pop()
            stack.append(self._call(called, arguments))
        elif name != "PROTO":
            raise UnreadableError(f"its description has the opcode {name}")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise UnreadableError("its description takes more than it has")
        return self._stack.pop()

    def _top(self) -> Any:
        self._stack.append(self._pop())
        return self._stack[-1]

    def _top_as(self, kind: type[Any]) -> Any:
        if type(top := self._top()) is not kind:
            raise UnreadableError(f"its description adds to what is no {kind.__name__}")
        return top

    def _to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self._stack and self._stack[-1] is not _MARK:
            values.append(self._stack.pop())
        if not self._stack:
            raise UnreadableError("its description takes more than it has")
        self._stack.pop()
        return values[::-1]

    def _storage(self, reference: Any) -> npt.NDArray[Any]:
        match reference:
            case ("storage", _Name(text=kind), str(key), str(), int()) if kind in _TYPES:
                # One read for a storage, however often it is named, and no more in all than the file has bytes: members may overlap.
                if (kind, key) not in self._storages:
                    data = _member(self._archive, f"{self._folder}data/{key}", self._bytes_left)
                    self._bytes_left -= len(data)
                    self._storages[kind, key] = np.frombuffer(data, dtype=_TYPES[kind])
                return self._storages[kind, key]
        raise UnreadableError("it has a storage of an unknown kind")

    def _call(self, called: Any, arguments: Any) -> Any:
        match called, arguments:
            case _Name(text=text), () if text == _HOOKS:
                return {}
            case _Name(text=text), (np.ndarray() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict()) if text == _REBUILD:
                return _tensor(storage, offset, shape, strides)
        raise UnreadableError("it makes something other than tensors")


def _tensor(storage: npt.NDArray[Any], offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> npt.NDArray[Any]:
    if len(shape) != len(strides) or len(shape) > 32 or not all(type(x) is int and x >= 0 for x in (offset, *shape, *strides)):
        raise UnreadableError("it has a tensor of an unknown form")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # More values than are stored (strides of 0, windows that overlap) would let a small file fill memory.
    if math.prod(shape) > len(storage) or (0 not in shape and last >= len(storage)):
        raise UnreadableError(f"a tensor of shape {shape} reaches beyond its {len(storage)} values")
    if 0 in shape:
        return np.empty(shape, dtype=storage.dtype)
    width = storage.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [stride * width for stride in strides], writeable=False)
