"""A shard: the expert weights of one function, in one safetensors file, each expert one contiguous range.

The format is the plain safetensors one (8 bytes of header length, a JSON header, raw tensors), so any tool can open the
file; reading it here takes no library. The first two parts are the head, which is padded so that tensors begin at a
multiple of ALIGNMENT. Tensors are named `EEEEE.NAME` (expert id in five digits). `__metadata__` holds, as JSON, the
FfnSpec under `ffn`, and under `sha256` the digest of each expert's range by its id.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import STORAGE

ALIGNMENT = 4096
# What safetensors calls the types of codec.py.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_STORAGE = {name: STORAGE[dtype] for dtype, name in TYPES.items()}
Array = npt.NDArray[Any]


class WeightsError(ValueError):
    """A weights file that is damaged or does not hold what was asked for."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: from byte `first` of the file to `last`, exclusive."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Head:
    """What a shard says of itself. `ffn` is the dictionary of an FfnSpec, `sha256` that of each expert's range, `file_bytes` its size."""

    ffn: Mapping[str, Any]
    sha256: Mapping[int, str]
    tensors: Mapping[int, Mapping[str, Tensor]]
    file_bytes: int

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """Raises WeightsError when it is not the head of a shard."""
        try:
            header = json.loads(head[8:])
            metadata = header.pop("__metadata__")
            tensors: dict[int, dict[str, Tensor]] = {}
            for name, entry in header.items():
                expert, _, parameter = name.partition(".")
                first, last = (len(head) + offset for offset in entry["data_offsets"])
                tensors.setdefault(int(expert), {})[parameter] = Tensor(_STORAGE[entry["dtype"]], tuple(entry["shape"]), first, last)
            sha256 = {int(expert): digest for expert, digest in json.loads(metadata["sha256"]).items()}
            if sha256.keys() != tensors.keys():
                raise ValueError("it does not give one digest for each expert")
            return cls(json.loads(metadata["ffn"]), sha256, tensors, max(t.last for x in tensors.values() for t in x.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"this is not the head of a shard: {error}") from None

    def range(self, expert: int) -> tuple[int, int]:
        """First and last byte (exclusive) of the expert in the file."""
        tensors = self.tensors[expert].values()
        return min(t.first for t in tensors), max(t.last for t in tensors)


def read_head(path: Path) -> bytes:
    """The head of a shard on disk, not yet parsed."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


class ExpertFile:
    """A shard on disk, mapped: only the pages of experts that are asked for are ever read."""

    def __init__(self, path: Path) -> None:
        try:
            self.head = Head.parse(read_head(path))
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self.head.file_bytes != len(self._map):
                raise WeightsError("its tensors do not end where the file ends")
        except WeightsError as error:
            raise WeightsError(f"{path} is not a shard of experts: {error}") from None

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(sorted(self.head.tensors))

    def tensors(self, expert: int) -> dict[str, Array]:
        """The expert's parameters as views into the file (bfloat16 as uint16); raises WeightsError for an unknown id."""
        if expert not in self.head.tensors:
            raise WeightsError(f"expert {expert} is not in this function, which holds {list(self.experts)}")
        return {name: self._view(tensor) for name, tensor in self.head.tensors[expert].items()}

    def _view(self, tensor: Tensor) -> Array:
        count = (tensor.last - tensor.first) // tensor.dtype.itemsize
        return np.frombuffer(self._map, tensor.dtype, count, tensor.first).reshape(tensor.shape)
