"""A shard: the expert weights of one function in one file, each expert one contiguous range.

The format is plain safetensors (8 bytes of header length, a JSON header, raw tensors), so any tool can open the file, and reading it here
needs no library. The first two are the head, which is padded so that tensors begin at a multiple of ALIGNMENT. Tensors are named
`EEEEE.NAME` (expert id in five digits). `__metadata__` holds, as JSON, the FfnSpec under `ffn`, and the digest of each expert's range by
its id under `sha256`.

Experts of a quantised checkpoint are stored as they are there. A parameter NAME is then the rows of its parts 0, 1, ..., each of one or
more tensors `EEEEE.NAME.PART.ROLE`, with the roles of dequantise.py. `__metadata__` describes these parameters under `quantised`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import STORAGE
from .dequantise import STORED, FormError, Tensors, dequantise
from .errors import FunctionStorageError, ShardDigestError, ShardTruncatedError, WeightsError
from .packed import PackedMatrix, refusal

ALIGNMENT = 4096
# The number types of codec.py by their names in safetensors.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor: from byte `first` of the file to `last`, exclusive.

    type   its number type, as safetensors names it
    """

    type: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Quantised:
    """A parameter of all experts that is stored quantised.

    form         in dequantise.py
    parts        whose rows follow each other
    shape        of the parameter
    transposed   whether the parameter is the transpose of what is stored
    """

    form: str
    parts: int
    shape: tuple[int, ...]
    transposed: bool

    @property
    def columns(self) -> int:
        """The width of what is stored."""
        return self.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Head:
    """What the head of a shard says.

    ffn          fields of an FfnSpec
    sha256       digest of each expert's range, by id
    tensors      place of each tensor, by expert and name
    file_bytes   size of the whole shard
    quantised    by name, the parameters that are stored quantised
    """

    ffn: Mapping[str, Any]
    sha256: Mapping[int, str]
    tensors: Mapping[int, Mapping[str, Tensor]]
    file_bytes: int
    quantised: Mapping[str, Quantised]

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
                tensors.setdefault(int(expert), {})[parameter] = Tensor(entry["dtype"], tuple(entry["shape"]), first, last)
            sha256 = {int(expert): digest for expert, digest in json.loads(metadata["sha256"]).items()}
            if sha256.keys() != tensors.keys():
                raise ValueError("it does not give one digest for each expert")
            if unknown := {t.type for x in tensors.values() for t in x.values()} - STORED.keys():
                raise ValueError(f"it has tensors in {min(map(str, unknown))[:20]!a}")
            quantised = {
                name: Quantised(entry["form"], entry["parts"], tuple(entry["shape"]), entry["transposed"])
                for name, entry in json.loads(metadata.get("quantised", "{}")).items()
            }
            last = max(t.last for x in tensors.values() for t in x.values())
            return cls(json.loads(metadata["ffn"]), sha256, tensors, last, quantised)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"this is not the head of a shard: {str(error)[:200]}") from None

    def range(self, expert: int) -> tuple[int, int]:
        """Return the first byte of the expert in the file, and the last, exclusive."""
        tensors = self.tensors[expert].values()
        return min(t.first for t in tensors), max(t.last for t in tensors)

    def parameters(self, expert: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the expert's parameters, by name."""
        plain = {name: t.shape for name, t in self.tensors[expert].items() if name.partition(".")[0] not in self.quantised}
        return plain | {name: x.shape for name, x in self.quantised.items()}

    def expert_bytes(self, expert: int) -> int:
        """Return the size of the expert in memory, where nothing of it is quantised."""
        number = STORAGE[self.ffn["dtype"]].itemsize
        return sum(prod(shape) * number for shape in self.parameters(expert).values())

    def stored_bytes(self, expert: int) -> int:
        """Return the size of the expert as it is stored."""
        first, last = self.range(expert)
        return last - first

    def packed_refusal(self) -> str | None:
        """Say why the experts cannot be multiplied as they are stored; None if they can."""
        for expert, tensors in sorted(self.tensors.items()):
            for name in self.parameters(expert):
                if not name.endswith("_bias") and (reason := self._packed_refusal(name, tensors)) is not None:
                    return f"{name} of expert {expert}: {reason}"
        return None

    def _packed_refusal(self, name: str, tensors: Mapping[str, Tensor]) -> str | None:
        if (stored := self.quantised.get(name)) is None:
            return "it is not quantised"
        if stored.transposed != self.ffn["transposed"]:
            return "its columns are stored as rows"
        for part in range(stored.parts):
            prefix = f"{name}.{part}."
            described = {key.removeprefix(prefix): (t.type, t.shape) for key, t in tensors.items() if key.startswith(prefix)}
            if (reason := refusal(stored.form, described, stored.columns, self.ffn["dtype"])) is not None:
                return reason
        return None

    def dequantised_bytes(self) -> int:
        """Return what is in memory while the largest parameter is dequantised: it and one of its parts.

        It is 0 where none is quantised.
        """
        number = STORAGE[self.ffn["dtype"]].itemsize
        return max((prod(x.shape) * number * (x.parts + 1) // x.parts for x in self.quantised.values()), default=0)


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

    def tensors(self, expert: int) -> Mapping[str, Array]:
        """Return the expert's parameters, bfloat16 as uint16.

        They are views into the file; those that are stored quantised are dequantised each time that one is looked up.
        """
        self.bring([expert])
        return _Parameters(self, expert)

    def packed(self, expert: int) -> Mapping[str, Array | PackedMatrix]:
        """Return the expert's parameters, with quantised matrices as they are stored.

        They are views into the file.
        """
        self.bring([expert])
        return _PackedParameters(self, expert)

    def close(self) -> None:
        """End connections and threads, where it has some; what was read stays."""

    def _fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring these ranges of bytes into the file."""

    def view(self, tensor: Tensor) -> Array:
        """View a tensor in the file."""
        dtype = STORED[tensor.type]
        return np.frombuffer(self._map, dtype, (tensor.last - tensor.first) // dtype.itemsize, tensor.first).reshape(tensor.shape)


class _Parameters(Mapping[str, Array]):
    """An expert's parameters by name. So one matrix at a time is in memory twice, not all of an expert."""

    def __init__(self, shard: Shard, expert: int) -> None:
        self._shard, self._expert = shard, expert
        self._shapes = shard.head.parameters(expert)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Array:
        places, head = self._shard.head.tensors[self._expert], self._shard.head
        if name not in head.quantised:
            return self._shard.view(places[name])
        stored = head.quantised[name]
        matrix = np.empty(stored.shape[::-1] if stored.transposed else stored.shape, STORAGE[head.ffn["dtype"]])
        end = 0
        try:
            for part in range(stored.parts):
                rows = dequantise(stored.form, self._stored(name, part), head.ffn["dtype"])
                matrix[end : (end := end + len(rows))] = rows
            if end != len(matrix):
                raise FormError(f"{end} rows are stored, not {len(matrix)}")
        except ValueError as error:
            raise self._unreadable(name, error) from None
        return matrix.T if stored.transposed else matrix

    def _stored(self, name: str, part: int) -> Tensors:
        prefix = f"{name}.{part}."
        places = self._shard.head.tensors[self._expert]
        roles = {x.removeprefix(prefix): t for x, t in places.items() if x.startswith(prefix)}
        return {role: (place.type, self._shard.view(place)) for role, place in roles.items()}

    def _unreadable(self, name: str, error: ValueError) -> WeightsError:
        return WeightsError(f"{name} of expert {self._expert} of {self._shard.where} cannot be read: {error}")


class _PackedParameters(Mapping[str, Array | PackedMatrix]):
    """The same with quantised matrices as they are stored."""

    def __init__(self, shard: Shard, expert: int) -> None:
        self._dequantised, self._head = _Parameters(shard, expert), shard.head

    def __iter__(self) -> Iterator[str]:
        return iter(self._dequantised)

    def __len__(self) -> int:
        return len(self._dequantised)

    def __getitem__(self, name: str) -> Array | PackedMatrix:
        stored = self._head.quantised.get(name)
        if stored is None or stored.form == "plain":
            return self._dequantised[name]
        try:
            parts = [self._dequantised._stored(name, part) for part in range(stored.parts)]
            matrix = PackedMatrix.of(parts, stored.form, stored.columns, self._head.ffn["dtype"])
            shape = stored.shape[::-1] if stored.transposed else stored.shape
            if (matrix.rows, matrix.columns) != tuple(shape):
                raise FormError(f"{matrix.rows} x {matrix.columns} weights are stored, not {shape[0]} x {shape[1]}")
        except ValueError as error:
            raise self._dequantised._unreadable(name, error) from None
        return matrix


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

    def __init__(self, url: str, head_bytes: int, head_sha256: str, environment: Mapping[str, str] = os.environ) -> None:
        from .s3 import S3Object  # a function whose shard is on disk does not need it

        self._object = S3Object(url, environment)
        try:
            head, object_bytes = self._object.read(0, head_bytes)
        except Exception:
            self._object.close()
            raise
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

    def close(self) -> None:
        self._object.close()
        os.close(self._file)  # what was read stays in the map

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
