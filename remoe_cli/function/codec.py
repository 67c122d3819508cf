"""The wire format between dispatcher and expert function: a binary frame in a base64 JSON string.

Lambda takes only JSON, so the whole event is one JSON string: a quote, base64, a quote.

    frame = magic "RMO2" | dtype u8 | 0 u8 | experts u16 | width u32 | compute_us u32 | origin u32 | check u32
          | experts x ( id u32 | rows u32 ) | rows of hidden states, `width` numbers each, in the order of the table

All numbers are little-endian. The response has the same table and the experts' outputs, unweighted. Parsing is strict: a frame that is
not consistent is a FrameError, never a guess.

`check` is the CRC-32 of all else, so a damaged frame is noticed. `origin` says what a response answers: it is made of the digest of the
function's shard and of the request's `check` (`origin_of`). So the answer of another function, or to other rows, is noticed too.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pybase64

MAGIC = b"RMO2"
_HEAD = struct.Struct("<4sBBHIIII")
_CHECK = struct.Struct("<I")
_BEFORE_CHECK = _HEAD.size - _CHECK.size
_MOST = 2**32 - 1
# numpy has no bfloat16: its bits are sent as uint16.
STORAGE: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2")}
_CODES = ("float32", "bfloat16", "float16")
# The exponent bits that are all ones in an infinity or a NaN.
_EXPONENT = {"float32": (np.uint32, 0x7F80_0000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


class FrameError(ValueError):
    """A frame that is not valid."""


@dataclass(frozen=True)
class Batch:
    """Rows of hidden states by expert.

    data         [sum(rows), width] in STORAGE[dtype]
    compute_us   time that the experts took, in responses
    origin       in responses, what they answer (`origin_of`); 0 in requests
    check        of the frame that the batch was read from
    """

    dtype: str
    experts: tuple[int, ...]
    rows: tuple[int, ...]
    data: npt.NDArray[Any]
    compute_us: int = 0
    origin: int = 0
    check: int = 0


def frame_bytes(rows: int, experts: int, width: int, dtype: str) -> int:
    """Compute the bytes of a frame, before base64."""
    return _HEAD.size + 8 * experts + rows * width * STORAGE[dtype].itemsize


def wire_bytes(frame: int) -> int:
    """Compute the bytes on the wire of a frame of `frame` bytes: base64 and two quotes.

    >>> wire_bytes(frame_bytes(rows=4, experts=2, width=576, dtype="bfloat16"))
    6202
    """
    return 4 * ((frame + 2) // 3) + 2


def pack(batch: Batch) -> bytes:
    """Write a batch as a frame.

    >>> frame = pack(Batch("float32", (3, 7), (1, 2), np.zeros((3, 64), dtype="<f4")))
    >>> unpack(frame).experts, unpack(frame).data.shape, len(frame) == frame_bytes(3, 2, 64, "float32")
    ((3, 7), (3, 64), True)
    """
    code, compute_us = _CODES.index(batch.dtype), min(batch.compute_us, _MOST)
    head = _HEAD.pack(MAGIC, code, 0, len(batch.experts), batch.data.shape[1], compute_us, batch.origin, 0)[:_BEFORE_CHECK]
    table = np.array([batch.experts, batch.rows], dtype="<u4").T.tobytes()
    rows = np.ascontiguousarray(batch.data).tobytes()
    return b"".join((head, _CHECK.pack(_checked(head, table, rows)), table, rows))


def check_of(frame: bytes) -> int:
    """Return the `check` that a frame has."""
    return int(_CHECK.unpack_from(frame, _BEFORE_CHECK)[0])


def origin_of(head_sha256: str, check: int) -> int:
    """Compute the `origin` of a response.

    It answers the request with this `check`, and comes from the function whose shard has this head.

    >>> origin_of("0a", 1) == origin_of("0b", 1), origin_of("0a", 1) == origin_of("0a", 2)
    (False, False)
    """
    return zlib.crc32(f"{head_sha256} {check}".encode())


def _checked(*parts: bytes | memoryview) -> int:
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return check


def unpack(frame: bytes) -> Batch:
    """Read a frame as a batch.

    Raises: FrameError when a length, a type, an id or a number is not valid.
    """
    if len(frame) < _HEAD.size:
        raise FrameError(f"frame of {len(frame)} bytes is shorter than its head")
    magic, code, zero, experts, width, compute_us, origin, check = _HEAD.unpack_from(frame)
    if magic != MAGIC or zero or code >= len(_CODES):
        raise FrameError("not a remoe frame, or one of another version")
    dtype = _CODES[code]
    start = _HEAD.size + 8 * experts
    if len(frame) < start:
        raise FrameError("frame ends inside its table of experts")
    view = memoryview(frame)
    if _checked(view[:_BEFORE_CHECK], view[_HEAD.size :]) != check:
        raise FrameError("frame is damaged: its check differs")
    table = np.frombuffer(frame, dtype="<u4", count=2 * experts, offset=_HEAD.size).reshape(experts, 2)
    ids, rows = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    if (np.diff(ids) <= 0).any() or (rows == 0).any():
        raise FrameError("experts must ascend and each must have rows")
    total = int(rows.sum())
    if len(frame) != start + total * width * STORAGE[dtype].itemsize or not total * width:
        raise FrameError(f"frame of {len(frame)} bytes does not hold {total} rows of {width} {dtype}")
    data = np.frombuffer(frame, dtype=STORAGE[dtype], offset=start).reshape(total, width)
    integer, exponent = _EXPONENT[dtype]
    if ((data.view(integer) & exponent) == exponent).any():
        raise FrameError("rows hold an infinity or a NaN")
    return Batch(dtype, tuple(ids.tolist()), tuple(rows.tolist()), data, compute_us, origin, check)


def to_wire(frame: bytes) -> bytes:
    """Encode a frame as the JSON string that Invoke sends."""
    return b'"' + pybase64.b64encode(frame) + b'"'


def from_wire(body: bytes) -> bytes:
    """Decode the frame inside a JSON string.

    Raises: FrameError when the body is not such a string.
    """
    if len(body) < 2 or body[:1] != b'"' or body[-1:] != b'"':
        raise FrameError("body is not one JSON string")
    try:
        return pybase64.b64decode(body[1:-1], validate=True)
    except ValueError as error:
        raise FrameError(f"body is not base64: {error}") from None
