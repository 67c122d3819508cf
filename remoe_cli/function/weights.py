"""Expert weights in one memory-mapped safetensors file, each expert one contiguous range.

Only the pages of experts that are asked for are ever read. The format is the plain safetensors one (8 bytes of
header length, a JSON header, raw tensors), so any tool can open the file; reading it here takes no library.
Tensors are named `EEEEE.NAME` (expert id in five digits); `__metadata__.ffn` holds the FfnSpec as JSON.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
Array = npt.NDArray[Any]


class WeightsError(ValueError):
    """A weights file that is damaged or does not hold what was asked for."""


class ExpertFile:
    """A shard of experts. `ffn` is the dictionary of an FfnSpec, `experts` the ids it holds."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
            self.ffn: dict[str, Any] = json.loads(header.pop("__metadata__")["ffn"])
            self._entries: dict[int, dict[str, dict[str, Any]]] = {}
            for name, entry in header.items():
                expert, _, parameter = name.partition(".")
                self._entries.setdefault(int(expert), {})[parameter] = entry
            self._data = 8 + length
            if max(e["data_offsets"][1] for part in self._entries.values() for e in part.values()) + self._data != len(self._map):
                raise ValueError("its tensors do not end where the file ends")
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is not a shard of experts: {error}") from None

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(sorted(self._entries))

    def tensors(self, expert: int) -> dict[str, Array]:
        """The expert's parameters as views into the file (bfloat16 as uint16); raises WeightsError for an unknown id."""
        if expert not in self._entries:
            raise WeightsError(f"expert {expert} is not in this function, which holds {list(self.experts)}")
        return {name: self._view(entry) for name, entry in self._entries[expert].items()}

    def range(self, expert: int) -> tuple[int, int]:
        """First and last byte (exclusive) of the expert in the file."""
        offsets = [entry["data_offsets"] for entry in self._entries[expert].values()]
        return self._data + min(o[0] for o in offsets), self._data + max(o[1] for o in offsets)

    def _view(self, entry: dict[str, Any]) -> Array:
        dtype = _TYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        return np.frombuffer(self._map, dtype, (last - first) // dtype.itemsize, self._data + first).reshape(entry["shape"])
