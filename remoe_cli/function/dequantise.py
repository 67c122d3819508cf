"""Dequantising the weights of a checkpoint, with the results of transformers.

Every weight is a code times a scale. It is computed in float32 and rounded once, to the model's type (integers first to the type of their
scales, as compressed-tensors does). A code is a number of 4 or 8 bits; neighbours share a scale, by blocks, groups or rows.

`FORMS` names the forms. The tensors of a form are those of the checkpoint, to the byte:

fp8     codes [out, in] FP8, scales [r, c]: blocks of equal size, but for those at the edges
int8    the same with signed integers
fp4     codes [out, in / 2] or [out, groups, bytes], the lower half of a byte first; scales [out, groups], numbers or exponents of two,
        times `multiplier` or over `divisor` where there is one
words   codes [out, words]: whole numbers of 4 or 8 bits, larger by half their range, from the lowest bit of a word on; shape [2]; scales
        [out, groups]; where there are any, zero_points [words, groups], packed in the same way along the first axis
plain   numbers that are not quantised

docs/adr/0010-quantised-experts.md says why it is numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .codec import STORAGE
from .expert_ffn import narrow, widen

Array = npt.NDArray[Any]
Floats = npt.NDArray[Any]
# The types of stored tensors by their names in safetensors. numpy has no 8-bit floats and no bfloat16: these are their bits.
STORED: dict[str, np.dtype[Any]] = {
    **{"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")},
    **{"U8": np.dtype("u1"), "I8": np.dtype("i1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")},
    **{"F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1")},
}
# A tensor and the name of its type.
Stored = tuple[str, Array]
Tensors = Mapping[str, Stored]
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_CHUNK_WEIGHTS = 1 << 19  # computed at once, so that they stay in the cache


class FormError(ValueError):
    """Tensors that are not what their form says."""


@cache
def eight_bits(kind: str) -> Floats:
    """Make the table of the 256 numbers of an 8-bit type."""
    bits = np.arange(256)
    if kind in ("U8", "F8_E8M0"):
        with np.errstate(over="ignore"):
            numbers = np.exp2((bits - 127).astype(np.float32))  # of U8, 255 is infinity, as transformers has it
        if kind == "F8_E8M0":
            numbers[255] = np.nan
        return numbers
    mantissa_bits, bias = (3, 7) if kind == "F8_E4M3" else (2, 15)
    exponent, mantissa = (bits & 127) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    fraction = np.where(exponent == 0, 0, 1) + mantissa / (1 << mantissa_bits)
    numbers = fraction * np.exp2(np.maximum(exponent, 1) - bias)
    if kind == "F8_E4M3":
        numbers[(bits & 127) == 127] = np.nan
    else:
        numbers[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    signed: Floats = np.where(bits < 128, numbers, -numbers).astype(np.float32)
    return signed


@cache
def _fp4_pairs() -> Array:
    """Make the table of the two numbers of each byte, as one 64-bit word."""
    both = np.concatenate([_FP4, -_FP4])
    byte = np.arange(256)
    return np.ascontiguousarray(np.stack([both[byte & 15], both[byte >> 4]], axis=1)).view(np.uint64)[:, 0]


def numbers(stored: Stored) -> Floats:
    """Convert stored numbers to float32, exactly; bytes are exponents of two."""
    kind, array = stored
    if kind in ("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"):
        return eight_bits(kind)[array]
    return widen(array, "bfloat16" if kind == "BF16" else "float32")


def block(length: int, count: int) -> int:
    """Compute the length of the blocks of which `count` cover `length`, the last one perhaps in part.

    All known formats have powers of two, or divide without a rest.

    >>> block(7168, 56), block(576, 5), block(96, 3), block(10, 1)
    (128, 128, 32, 16)

    Raises: FormError where no length does.
    """
    least = -(-length // count) if count else 0
    power = 1 << max(0, least - 1).bit_length()
    if count and -(-length // power) == count:
        return power
    if count and length % count == 0:
        return length // count
    raise FormError(f"{count} scales do not fit {length} weights")


def _product(out: Array, take: Callable[[slice], Floats], columns: int, scales: Floats, dtype: str, first: str | None = None) -> None:
    """Write the products of codes and scales to `out`, a few rows at a time.

    `take` converts rows of codes. `first` is a type that they are rounded to before `dtype`.
    """
    rows = len(out)
    across, down = block(columns, scales.shape[1]), block(rows, scales.shape[0])
    step = max(1, _CHUNK_WEIGHTS // max(1, columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        values = take(slice(start, stop))
        mine = scales[np.arange(start, stop) // down] if down > 1 else scales[start:stop]
        if columns % across == 0:
            shaped = values.reshape(stop - start, -1, across)
            product = np.multiply(shaped, mine[:, :, None], out=shaped).reshape(stop - start, columns)
        else:
            product = values * np.repeat(mine, across, axis=1)[:, :columns]
        if first is not None and first != dtype:
            product = widen(narrow(product, first), first)
        out[start:stop] = narrow(product, dtype)


def _grid(scales: Floats, rows: int) -> Floats:
    """Bring scales to two dimensions: one, one a row, or a grid."""
    if scales.ndim == 2:
        return scales
    if scales.size in (1, rows):
        return scales.reshape(-1, 1)
    raise FormError(f"{scales.size} scales do not fit {rows} rows")


def _eight(tensors: Tensors, dtype: str) -> Array:
    kind, codes = tensors["codes"]
    scales = _grid(numbers(tensors["scales"]), len(codes))
    out = np.empty(codes.shape, STORAGE[dtype])
    if kind == "I8":
        first = {"BF16": "bfloat16", "F16": "float16"}.get(tensors["scales"][0])
        _product(out, lambda rows: codes[rows].astype(np.float32), codes.shape[1], scales, dtype, first)
    else:
        table = eight_bits(kind)
        _product(out, lambda rows: table[codes[rows]], codes.shape[1], scales, dtype)
    return out


def _four(tensors: Tensors, dtype: str) -> Array:
    codes = tensors["codes"][1].view(np.uint8)
    codes = codes.reshape(len(codes), -1)
    scales = numbers(tensors["scales"])
    if "multiplier" in tensors:
        scales = scales * numbers(tensors["multiplier"]).reshape(-1)[0]
    if "divisor" in tensors:
        scales = scales / numbers(tensors["divisor"]).reshape(-1)[0]
    pairs = _fp4_pairs()
    out = np.empty((len(codes), 2 * codes.shape[1]), STORAGE[dtype])
    _product(out, lambda rows: pairs[codes[rows]].view(np.float32), out.shape[1], _grid(scales, len(codes)), dtype)
    return out


def _unpack(words: Array, bits: int, length: int) -> Floats:
    """Unpack whole numbers of `bits` bits along the last axis."""
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return codes[..., :length].astype(np.float32) - np.float32(1 << (bits - 1))


def _words(tensors: Tensors, dtype: str) -> Array:
    (kind, stored), words = tensors["scales"], tensors["codes"][1]
    rows, columns = map(int, tensors["shape"][1])
    scales = _grid(widen(stored, "bfloat16" if kind == "BF16" else "float32"), rows)
    bits = next((bits for bits in (4, 8) if -(-columns * bits // 32) == words.shape[1]), None)
    if bits is None or len(words) != rows:
        raise FormError(f"{list(words.shape)} words do not hold {rows} x {columns} numbers of 4 or 8 bits")
    zeros = None
    if "zero_points" in tensors:
        zeros = _unpack(tensors["zero_points"][1].T, bits, rows).T
    width = block(columns, scales.shape[1])

    def take(some: slice) -> Floats:
        values = _unpack(words[some], bits, columns)
        return values if zeros is None else values - np.repeat(zeros[some], width, axis=1)[:, :columns]

    out = np.empty((rows, columns), STORAGE[dtype])
    _product(out, take, columns, scales, dtype, {"BF16": "bfloat16", "F16": "float16"}.get(kind))
    return out


def _plain(tensors: Tensors, dtype: str) -> Array:
    kind, array = tensors["codes"]
    if STORED[kind] != STORAGE[dtype]:
        return narrow(numbers(tensors["codes"]), dtype)
    return array


FORMS: dict[str, Callable[[Tensors, str], Array]] = {"fp8": _eight, "int8": _eight, "fp4": _four, "words": _words, "plain": _plain}


def dequantise(form: str, tensors: Tensors, dtype: str) -> Array:
    """Compute the weights [out, in] of one matrix as stored numbers of `dtype`.

    >>> codes, scales = np.array([[0x38, 0xB8]], dtype=np.uint8), np.array([[0.5]], dtype=np.float32)
    >>> dequantise("fp8", {"codes": ("F8_E4M3", codes), "scales": ("F32", scales)}, "float32").tolist()
    [[0.5, -0.5]]

    Raises: FormError for tensors that do not fit each other.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return FORMS[form](tensors, dtype)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise FormError(f"tensors of form {form} do not fit each other: {error}") from None
