"""A shard: the expert weights of one function in one file, each expert one contiguous range.

The format is plain safetensors (8 bytes of header length, a JSON header, raw tensors), so any tool can open the file, and reading it here
needs no library. The first two are the head, which is padded so that tensors begin at a multiple of ALIGNMENT. Tensors are named
`EEEEE.NAME` (expert id in five digits). `__metadata__` holds, as JSON, the FfnSpec under `ffn`, and the digest of each expert's range by
its id under `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import STORAGE
from .errors import FunctionStorageError, ShardDigestError, ShardTruncatedError, WeightsError

ALIGNMENT = 4096
# The number types of codec.py by their names in safetensors.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_STORAGE = {name: STORAGE[dtype] for dtype, name in TYPES.items()}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor: from byte `first` of the file to `last`, exclusive."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Head:
    """What the head of a shard says.

    ffn          fields of an FfnSpec
    sha256       digest of each expert's range, by id
    tensors      place of each tensor, by expert and name
    file_bytes   size of the whole shard
    """

    ffn: Mapping[str, Any]
    sha256: Mapping[int, str]
    tensors: Mapping[int, Mapping[str, Tensor]]
    file_bytes: int

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """Parse the head of a shard.

        Raises: WeightsError when it is none.
        """
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"this is not the head of a shard: {str(error)[:200]}") from None

    def range(self, expert: int) -> tuple[int, int]:
        """Return the first byte of the expert in the file, and the last, exclusive."""
        tensors = self.tensors[expert].values()
        return min(t.first for t in tensors), max(t.last for t in tensors)

    def expert_bytes(self, expert: int) -> int:
        """Return the size of the expert."""
        first, last = self.range(expert)
        return last - first


def read_head(path: Path) -> bytes:
    """Read the head of a shard on disk."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


class Shard:
    """Experts in a mapped file, of which only the pages of experts in use are read.

    An expert is checked against its digest in the head when it is first asked for.
    """

    def __init__(self, head: Head, file: int, where: str) -> None:
        """Map the file with the descriptor `file`, which may be closed afterwards; `where` names the shard in errors."""
        self.head, self.where = head, where
        self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        self._checked: set[int] = set()

    @property
    def reads(self) -> int:
        """Requests to S3 so far."""
        return 0

    @property
    def experts(self) -> tuple[int, ...]:
        """All experts of the shard, ascending."""
        return tuple(sorted(self.head.tensors))

    def bring(self, experts: Iterable[int]) -> None:
        """Make sure that the tensors of these experts are in the file, and are the right ones.

        Raises: WeightsError for an expert that the shard does not have, ShardDigestError for one that differs from its digest.
        """
        if not (new := sorted(set(experts) - self._checked)):
            return
        for expert in new:
            if expert not in self.head.tensors:
                raise WeightsError(f"expert {expert} is not in this function, which holds {list(self.experts)}")
        self._fetch([self.head.range(expert) for expert in new])
        for expert in new:
            first, last = self.head.range(expert)
            if hashlib.sha256(memoryview(self._map)[first:last]).hexdigest() != self.head.sha256[expert]:
                raise ShardDigestError(f"expert {expert} of {self.where} is not the one that was deployed")
            self._checked.add(expert)

    def tensors(self, expert: int) -> dict[str, Array]:
        """Return the expert's parameters as views into the file, bfloat16 as uint16."""
        self.bring([expert])
        return {name: self._view(tensor) for name, tensor in self.head.tensors[expert].items()}

    def _fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring these ranges of bytes into the file."""

    def _view(self, tensor: Tensor) -> Array:
        count = (tensor.last - tensor.first) // tensor.dtype.itemsize
        return np.frombuffer(self._map, tensor.dtype, count, tensor.first).reshape(tensor.shape)


class ShardFile(Shard):
    """A shard on this machine's disk, whose head is checked against `head_sha256` if that is given.

    Raises: WeightsError when the file is no shard, ShardDigestError when its head is another one.
    """

    def __init__(self, path: Path, head_sha256: str | None = None) -> None:
        head = read_head(path)
        if head_sha256 is not None:
            _check_head(head, head_sha256, str(path))
        try:
            parsed = Head.parse(head)
            if parsed.file_bytes != path.stat().st_size:
                raise WeightsError("its tensors do not end where the file ends")
        except WeightsError as error:
            raise WeightsError(f"{path} is not a shard of experts: {error}") from None
        with path.open("rb") as file:
            super().__init__(parsed, file.fileno(), str(path))


class ShardObject(Shard):
    """A shard in S3. An expert is fetched when it is first asked for, into a file in /tmp.

    Experts are on disk and not in memory, so that making one ready takes no more memory than having it ready, and one that was dropped
    from memory comes back from disk. The file has holes for experts that nobody asked for. The head is checked against `head_sha256`,
    each expert against the head.

    Raises: the Shard..Errors and Function..Errors of errors.py.
    """

    def __init__(self, url: str, head_bytes: int, head_sha256: str) -> None:
        from .s3 import S3Object  # a function whose shard is on disk does not need it

        self._object = S3Object(url)
        head, object_bytes = self._object.read(0, head_bytes)
        _check_head(head, head_sha256, url)
        parsed = Head.parse(head)
        if parsed.file_bytes != object_bytes:
            raise ShardTruncatedError(f"{url} has {object_bytes} bytes, and its head says {parsed.file_bytes}")
        folder = os.environ.get("TMPDIR", "/tmp")
        space = os.statvfs(folder)
        if space.f_bavail * space.f_frsize < object_bytes:
            raise FunctionStorageError(f"{url} has {object_bytes} bytes, and {folder} has room for {space.f_bavail * space.f_frsize}")
        path = f"{folder}/remoe-{os.urandom(8).hex()}.shard"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        os.ftruncate(self._file, object_bytes)
        super().__init__(parsed, self._file, url)

    @property
    def reads(self) -> int:
        return self._object.reads

    def _fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._object.fetch(ranges, self._write)

    def _write(self, data: memoryview, at: int) -> None:
        try:
            while data:
                written = os.pwrite(self._file, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise FunctionStorageError(f"an expert of {self._object.url} cannot be written to /tmp: {error.strerror}") from None


def _check_head(head: bytes, sha256: str, where: str) -> None:
    if hashlib.sha256(head).hexdigest() != sha256:
        raise ShardDigestError(f"the head of {where} is not the one that was deployed")


def open_shard(environment: Mapping[str, str]) -> Shard:
    """Open the shard that the environment names.

    REMOE_SHARD is a path, or s3://BUCKET/KEY; REMOE_SHARD_HEADER=BYTES:SHA256 is the size and digest of its head.

    Raises: WeightsError and the other errors of errors.py.
    """
    where = environment["REMOE_SHARD"]
    head_bytes, _, head_sha256 = environment["REMOE_SHARD_HEADER"].partition(":")
    return ShardObject(where, int(head_bytes), head_sha256) if where.startswith("s3://") else ShardFile(Path(where), head_sha256)
