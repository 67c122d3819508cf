"""Products of MXFP4 matrices straight from the bytes that a checkpoint stores.

A matrix is never dequantised as a whole, so an expert takes the memory of its stored bytes: about a quarter of bfloat16's. Every weight is
exact in bfloat16, so products are those of the dequantised matrix, but for the order of sums. Only scales near the ends of their range,
which no trained model has, could let a product overflow in one form and not in the other.

The library is built from kernel/ for both processors of Lambda. docs/adr/0011-packed-experts.md says why it is our own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .dequantise import FormError, Tensors, eight_bits
from .errors import FunctionProcessorError
from .expert_ffn import Array, Floats, rounded

_GROUP = 32  # weights that share a scale
_SCALES = ("U8", "F8_E8M0")
_ROLES = {"codes", "scales"}


def refusal(form: str, types: Mapping[str, str], dtype: str) -> str | None:
    """Say why a matrix cannot be multiplied as it is stored; None if it can.

    `form` is that of dequantise.py, `types` are those of its tensors by role.

    >>> refusal("fp4", {"codes": "U8", "scales": "U8"}, "bfloat16")
    >>> refusal("fp8", {"codes": "F8_E4M3", "scales": "F32"}, "bfloat16")
    'fp8 with scales in F32 has no packed product'
    """
    if dtype != "bfloat16":
        return f"packed products are for models in bfloat16, not {dtype}"
    if form != "fp4" or types.keys() != _ROLES or types["scales"] not in _SCALES:
        return f"{form} with scales in {types.get('scales', 'no type')} has no packed product"
    return None


@cache
def library() -> Any:
    """Load the library for this processor.

    Raises: FunctionProcessorError for a processor that it is not for.
    """
    machine = os.uname().machine
    path = Path(__file__).with_name(f"mxfp4-{machine}.so")
    if not path.is_file():
        raise FunctionProcessorError(f"packed experts run on x86_64 and aarch64, and there is no library for {machine}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise FunctionProcessorError(f"{path.name} cannot be loaded: {error}") from None
    if not loaded.remoe_mxfp4_runs_here():
        raise FunctionProcessorError("packed experts need a processor with AVX2 and FMA, and this one lacks them")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.remoe_mxfp4_product.argtypes = (
        *(pointer, number, pointer, number, pointer, number, number),  # the matrix
        *(pointer, number, pointer, number),  # what it is multiplied by, and the product
    )
    return loaded


@cache
def _halves(kind: str) -> Floats:
    """Make the table of half the number of each scale: the library's numbers of codes are doubled."""
    halves: Floats = np.ascontiguousarray(eight_bits(kind) * np.float32(0.5))
    return halves


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix [rows, columns] as it is stored.

    halves   half the number of each scale
    parts    codes and scales of the parts, whose rows follow each other
    """

    dtype: str
    columns: int
    halves: Floats
    parts: tuple[tuple[Array, Array], ...]

    @classmethod
    def of(cls, parts: Sequence[Tensors], form: str, dtype: str) -> PackedMatrix:
        """Take the stored tensors of each part, by role, without copying them.

        Raises: FormError for tensors that do not fit each other, or that have no packed product.
        """
        if not parts:
            raise FormError("a packed matrix has no parts")
        taken = []
        for tensors in parts:
            if (reason := refusal(form, {role: kind for role, (kind, _) in tensors.items()}, dtype)) is not None:
                raise FormError(reason)
            codes, scales = (np.ascontiguousarray(tensors[role][1]) for role in ("codes", "scales"))
            if scales.ndim != 2 or codes.nbytes != _GROUP // 2 * scales.size or not scales.size:
                raise FormError(f"scales {list(scales.shape)} do not fit codes {list(codes.shape)}")
            codes = codes.reshape(-1).view(np.uint8).reshape(len(scales), -1)
            taken.append((codes, scales))
        kinds, widths = {tensors["scales"][0] for tensors in parts}, {codes.shape[1] for codes, _ in taken}
        if len(kinds) > 1 or len(widths) > 1:
            raise FormError("parts of a packed matrix differ in width or in the type of their scales")
        return cls(dtype, 2 * widths.pop(), _halves(kinds.pop()), tuple(taken))

    @property
    def rows(self) -> int:
        """The width of a product."""
        return sum(len(codes) for codes, _ in self.parts)

    @property
    def held_bytes(self) -> int:
        """The memory that it takes beside its shard, of which it is a view."""
        return 0

    def apply(self, x: Floats) -> Floats:
        """Multiply x [n, columns] to [n, rows], rounded once.

        Raises: FormError for an x of another width.
        """
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise FormError(f"rows of width {x.shape[-1]} do not fit a matrix of {self.columns} columns")
        # The order in which the library takes the numbers of a group: those with even places first.
        ordered = np.ascontiguousarray(x.reshape(len(x), self.columns // _GROUP, _GROUP // 2, 2).swapaxes(2, 3), dtype=np.float32)
        product = np.empty((len(x), self.rows), dtype=np.float32)
        start = product.ctypes.data
        for codes, scales in self.parts:
            status = library().remoe_mxfp4_product(
                *(codes.ctypes.data, codes.nbytes, scales.ctypes.data, scales.nbytes, self.halves.ctypes.data),
                *(len(codes), self.columns, ordered.ctypes.data, len(x), start, self.rows),
            )
            if status:
                raise FormError(f"the library refuses a matrix of {len(codes)} x {self.columns}")
            start += len(codes) * product.itemsize
        return rounded(product, self.dtype)
