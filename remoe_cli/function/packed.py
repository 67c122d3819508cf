"""Products of quantised matrices straight from the bytes that a checkpoint stores.

A matrix is never dequantised as a whole, so an expert takes the memory of its stored bytes. Weights are those of the dequantised matrix to
the bit: the library rounds each to bfloat16 after its scale, as dequantise.py does, where it is not exact anyway. So products differ by the
order of sums only. What no trained model has is left out: scales at the ends of their range, and the code of FP8 that is no number.

The library is built from kernel/ for both processors of Lambda. docs/adr/0011-packed-experts.md says why it is our own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .dequantise import FormError, Tensors, block, eight_bits, numbers
from .errors import FunctionProcessorError
from .expert_ffn import Array, Floats, rounded

_GROUP = 32  # weights that the library takes at once
_WHOLE = 24  # powers of two of rows, and of groups, that no matrix has more of
_EXPONENTS = ("U8", "F8_E8M0")
_FLOATS = ("F32", "BF16", *_EXPONENTS)
_BFLOAT16 = ("bfloat16",)
_ALL = ("bfloat16", "float16", "float32")
# The library's forms by number: see FORMS in kernel/packed.c. Integers are exact under scales of few digits, else rounded.
_MXFP4, _NVFP4, _E4M3, _E5M2 = 0, 7, 5, 6
_INTEGERS = {("I32", 4): (1, 3), ("I8", 8): (2, 4), ("I32", 8): (8, 9)}
_INTEGERS_FP32 = 10  # those of 8 bits in bytes


@dataclass(frozen=True)
class _Part:
    """Rows of a matrix as the library takes them.

    number        its form in the library
    scales        as they are stored, or float32
    numbers       the number of each of 256 scales; empty for scales of more than a byte
    down, across  a scale holds for 2^down rows and 2^across groups of 32
    """

    number: int
    rows: int
    codes: Array
    scales: Array
    numbers: Floats
    down: int = 0
    across: int = 0


_NONE: Floats = np.zeros(0, dtype=np.float32)


def _grid(shape: Sequence[int], rows: int) -> tuple[int, int]:
    """Count the rows and columns of scales: one, one a row, or a grid."""
    if len(shape) == 2:
        return shape[0], shape[1]
    size = int(np.prod(shape, dtype=np.int64))
    if size in (1, rows):
        return size, 1
    raise FormError(f"{size} scales do not fit {rows} rows")


def _shift(length: int, count: int, unit: int) -> int:
    """Compute the power of two of `unit` for which one of `count` scales holds."""
    if count == 1:
        return _WHOLE
    steps, rest = divmod(block(length, count), unit)
    if rest or steps & (steps - 1) or steps == 0:
        raise FormError(f"{count} scales for {length} weights have no packed product")
    return steps.bit_length() - 1


def _shifts(scales: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    down, across = _grid(scales, rows)
    return _shift(rows, down, 1), _shift(columns, across, _GROUP)


def _four(tensors: Tensors, columns: int, dtype: str) -> _Part:
    (_, codes), (kind, scales) = tensors["codes"], tensors["scales"]
    if scales.ndim != 2 or not scales.size:
        raise FormError(f"scales {list(scales.shape)} do not fit codes {list(codes.shape)}")
    if kind in _EXPONENTS:
        return _Part(_MXFP4, len(scales), codes, scales, _halves(kind))
    table = eight_bits(kind)
    with np.errstate(over="ignore"):  # the same arithmetic as where it is dequantised
        if "multiplier" in tensors:
            table = table * numbers(tensors["multiplier"]).reshape(-1)[0]
        if "divisor" in tensors:
            table = table / numbers(tensors["divisor"]).reshape(-1)[0]
    return _Part(_NVFP4, len(scales), codes, scales, np.ascontiguousarray(table * np.float32(0.5), dtype=np.float32))


def _integers(tensors: Tensors, columns: int, dtype: str) -> _Part:
    (kind, codes), (scale_kind, scales) = tensors["codes"], tensors["scales"]
    down, across = _shifts(scales.shape, len(codes), columns)
    if scale_kind == "F32":
        return _Part(_INTEGERS_FP32, len(codes), codes, scales, _NONE, down, across)
    bits = 8 if kind == "I8" else 32 * codes.shape[-1] // columns
    if codes.ndim != 2 or codes.shape[1] * codes.itemsize * 8 != bits * columns or (kind, bits) not in _INTEGERS:
        raise FormError(f"codes {list(codes.shape)} do not hold rows of {columns} weights of 4 or 8 bits")
    exact, rounds = _INTEGERS[kind, bits]
    # A product has the digits of both: those of a code, and those of bfloat16's 8 that the scale has.
    is_exact = not (scales & (0x7F if bits == 8 else 0x07)).any()
    if dtype == "float16":
        grid = np.abs(numbers((scale_kind, scales)).astype(np.float64)) * 2.0**24
        if (grid % 1).any() or grid.max(initial=0) > 2.0**32:
            raise FormError("its weights are not numbers of float16")
    return _Part(exact if is_exact else rounds, len(codes), codes, scales, _NONE, down, across)


def _fp8(tensors: Tensors, columns: int, dtype: str) -> _Part:
    (kind, codes), scales = tensors["codes"], numbers(tensors["scales"])
    down, across = _shifts(scales.shape, len(codes), columns)
    number, unit = (_E4M3, 256) if kind == "F8_E4M3" else (_E5M2, 1)
    return _Part(number, len(codes), codes, np.ascontiguousarray(scales * np.float32(unit), dtype=np.float32), _NONE, down, across)


@cache
def _halves(kind: str) -> Floats:
    """Make the table of half the number of each scale: the library's numbers of codes are doubled."""
    halves: Floats = np.ascontiguousarray(eight_bits(kind) * np.float32(0.5))
    return halves


@dataclass(frozen=True)
class _Rule:
    """Tensors of a form that have a packed product: types by role, the models' types, and what makes a part of them.

    order   whether codes are pairs, of which the library takes the first ones first
    """

    form: str
    types: Mapping[str, tuple[str, ...]]
    dtypes: tuple[str, ...]
    part: Callable[[Tensors, int, str], _Part]
    pairs: bool = False


_RULES = (
    _Rule("fp4", {"codes": ("U8", "I8"), "scales": _EXPONENTS}, _BFLOAT16, _four, True),
    _Rule("fp4", {"codes": ("U8", "I8"), "scales": ("F8_E4M3",), "multiplier": ("F32",)}, _BFLOAT16, _four, True),
    _Rule("fp4", {"codes": ("U8", "I8"), "scales": ("F8_E4M3",), "divisor": ("F32",)}, _BFLOAT16, _four, True),
    _Rule("words", {"codes": ("I32",), "scales": ("BF16",), "shape": ("I32", "I64")}, _ALL, _integers),
    _Rule("int8", {"codes": ("I8",), "scales": ("BF16",)}, _ALL, _integers),
    _Rule("int8", {"codes": ("I8",), "scales": ("F32",)}, _BFLOAT16, _integers),
    _Rule("fp8", {"codes": ("F8_E4M3", "F8_E5M2"), "scales": _FLOATS}, _BFLOAT16, _fp8),
)


def _rule(form: str, types: Mapping[str, str]) -> _Rule | None:
    for rule in _RULES:
        if rule.form == form and rule.types.keys() == types.keys() and all(kind in rule.types[role] for role, kind in types.items()):
            return rule
    return None


# The type and shape of a tensor by its role.
Described = Mapping[str, tuple[str, Sequence[int]]]


def refusal(form: str, tensors: Described, columns: int, dtype: str) -> str | None:
    """Say why a matrix of `columns` columns cannot be multiplied as it is stored; None if it can.

    `form` is that of dequantise.py.

    >>> refusal("fp4", {"codes": ("U8", (8, 32)), "scales": ("U8", (8, 2))}, 64, "bfloat16")
    >>> refusal("fp8", {"codes": ("F8_E4M3", (8, 64)), "scales": ("F16", (8, 1))}, 64, "bfloat16")
    'fp8 with scales in F16 has no packed product'
    """
    rule = _rule(form, {role: kind for role, (kind, _) in tensors.items()})
    if rule is None:
        return f"{form} with scales in {tensors['scales'][0] if 'scales' in tensors else 'no type'} has no packed product"
    if dtype not in rule.dtypes:
        return f"packed products of {form} are for models in {' or '.join(rule.dtypes)}, not {dtype}"
    if columns % _GROUP or not columns:
        return f"its rows have {columns} weights, not a multiple of {_GROUP}"
    try:
        if form != "fp4":
            _shifts(tensors["scales"][1], tensors["codes"][1][0], columns)
        elif tensors["scales"][1][-1] * (16 if len(rule.types) > 2 else _GROUP) != columns:
            return f"{tensors['scales'][1][-1]} scales for {columns} weights have no packed product"
    except (FormError, IndexError) as error:
        return str(error)
    return None


@cache
def library() -> Any:
    """Load the library for this processor.

    Raises: FunctionProcessorError for a processor that it is not for.
    """
    machine = os.uname().machine
    path = Path(__file__).with_name(f"packed-{machine}.so")
    if not path.is_file():
        raise FunctionProcessorError(f"packed experts run on x86_64 and aarch64, and there is no library for {machine}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise FunctionProcessorError(f"{path.name} cannot be loaded: {error}") from None
    if not loaded.remoe_packed_runs_here():
        raise FunctionProcessorError("packed experts need a processor with AVX2, FMA and F16C, and this one lacks them")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.remoe_packed_product.argtypes = (
        *(number, pointer, number, pointer, number, pointer, number, number, number, number),  # the matrix
        *(pointer, number, pointer, number),  # what it is multiplied by, and the product
    )
    return loaded


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix [rows, columns] as it is stored, in parts whose rows follow each other."""

    dtype: str
    columns: int
    pairs: bool
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, parts: Sequence[Tensors], form: str, columns: int, dtype: str) -> PackedMatrix:
        """Take the stored tensors of each part, by role, without copying them.

        Raises: FormError for tensors that do not fit each other, or that have no packed product.
        """
        if not parts:
            raise FormError("a packed matrix has no parts")
        taken, pairs = [], False
        for tensors in parts:
            described = {role: (kind, array.shape) for role, (kind, array) in tensors.items()}
            rule = _rule(form, {role: kind for role, (kind, _) in tensors.items()})
            if (reason := refusal(form, described, columns, dtype)) is not None or rule is None:
                raise FormError(reason or form)
            given = {role: (kind, np.ascontiguousarray(array)) for role, (kind, array) in tensors.items()}
            taken.append(part := rule.part(given, columns, dtype))
            pairs = rule.pairs or (form == "words" and part.number in _INTEGERS["I32", 4])
            if part.rows * columns != part.codes.nbytes * (2 if pairs else 1):
                raise FormError(f"codes {list(part.codes.shape)} do not fit {part.rows} x {columns} weights")
        return cls(dtype, columns, pairs, tuple(taken))

    @property
    def rows(self) -> int:
        """The width of a product."""
        return sum(part.rows for part in self.parts)

    @property
    def held_bytes(self) -> int:
        """The memory that it takes beside its shard: that of scales that were made float32."""
        return sum(part.scales.nbytes for part in self.parts if part.number in (_E4M3, _E5M2))

    def apply(self, x: Floats) -> Floats:
        """Multiply x [n, columns] to [n, rows], rounded once.

        Raises: FormError for an x of another width.
        """
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise FormError(f"rows of width {x.shape[-1]} do not fit a matrix of {self.columns} columns")
        if self.pairs:  # the library takes the numbers of a group with even places first
            x = x.reshape(len(x), self.columns // _GROUP, _GROUP // 2, 2).swapaxes(2, 3)
        ordered = np.ascontiguousarray(x, dtype=np.float32)
        product = np.empty((len(x), self.rows), dtype=np.float32)
        start = product.ctypes.data
        for part in self.parts:
            status = library().remoe_packed_product(
                *(part.number, part.codes.ctypes.data, part.codes.nbytes, part.scales.ctypes.data, part.scales.nbytes),
                *(part.numbers.ctypes.data, part.down, part.across, part.rows, self.columns),
                *(ordered.ctypes.data, len(x), start, self.rows),
            )
            if status:
                raise FormError(f"the library refuses a matrix of {part.rows} x {self.columns}")
            start += part.rows * product.itemsize
        return rounded(product, self.dtype)
