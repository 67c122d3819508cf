"""Quantising experts on request: integers of 8 or 4 bits, and a scale for each 32 weights of a row.

The tensors are those of compressed-tensors for symmetric integers in groups: `int-quantized` for 8 bits, `pack-quantized` for 4. They take
8.5 and 4.5 bits a weight, as ggml's Q8_0 and Q4_0 do. Each weight becomes the nearest of its group's numbers, so no data are needed.

A scale is what compressed-tensors takes (the largest weight over half of the range of codes), rounded up: to a power of two for 8 bits, to
5 binary digits for 4. So every quantised weight is a number of bfloat16, and also of float16 and float32: the main function, an expert
function and whoever loads the tensors elsewhere have the same weights to the bit, and products need no rounding of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import Floats, Stored
from remoe_cli.function.expert_ffn import narrow
from remoe_cli.function.weights import TYPES
from remoe_cli.model.experts import ExpertLayer

GROUP = 32


@dataclass(frozen=True)
class Integers:
    """A number type for experts.

    form         that of function/dequantise.py
    digits       binary digits of a scale
    """

    name: str
    bits: int
    form: str
    digits: int

    def matrix_bytes(self, weights: int) -> int:
        """Count the bytes of a matrix of so many weights, and those of its shape where that is stored."""
        return weights * self.bits // 8 + weights // GROUP * 2 + (16 if self.form == "words" else 0)


INT8, INT4 = Integers("int8", 8, "int8", 1), Integers("int4", 4, "words", 5)
BY_NAME = {to.name: to for to in (INT8, INT4)}
# Scales below these make weights that the type does not have; no trained group of 32 is that small.
_LEAST_BIT = {"float16": -24, "bfloat16": -100, "float32": -100}
# Scales above these make weights that the type, or a packed product of it (function/packed.py), does not have.
_LARGEST_SCALE = {"float16": 2.0**8, "bfloat16": 2.0**100, "float32": 2.0**100}


def quantised_bytes(layer: ExpertLayer, to: str, settings: Mapping[str, Any] | None) -> int:
    """Count the bytes of one expert of a layer in the form `to`.

    `settings` are those of a checkpoint that is quantised already.

    Raises: ModelError for experts that cannot be quantised.
    """
    if settings is not None:
        raise ModelError(
            f"The checkpoint is quantised already ({settings.get('quant_method', 'by an unknown method')}), so its experts cannot be"
            f" quantised to {to.upper()}.",
            "Leave --experts out: experts are served as they are stored.",
        )
    total = 0
    for name, parameter in layer.parameters().items():
        weights = parameter.numel() // layer.experts
        if name.endswith("_bias"):
            total += weights * parameter.element_size()
            continue
        if str(parameter.dtype).removeprefix("torch.") not in TYPES:
            raise ModelError(f"The experts are in {parameter.dtype}, which cannot be quantised.", "Leave --experts out.")
        if (columns := parameter.shape[1 if layer.module.is_transposed else 2]) % GROUP:
            raise ModelError(
                f"The rows of {name} have {columns} weights, which groups of {GROUP} do not divide, so they cannot be quantised.",
                "Leave --experts out.",
            )
        total += BY_NAME[to].matrix_bytes(weights)
    return total


def quantise(weights: Floats, to: Integers, dtype: str) -> dict[str, Stored]:
    """Quantise a matrix [rows, columns] of a model in `dtype`; return its tensors by role.

    >>> stored = quantise(np.linspace(-1, 1, 32, dtype=np.float32)[None], INT8, "bfloat16")
    >>> stored["codes"][1][0, [0, -1]].tolist(), narrow(np.array([2**-6], np.float32), "bfloat16") == stored["scales"][1][0]
    ([-64, 64], array([ True]))

    Raises: ModelError for weights that are no numbers or too large, and for rows that groups do not fill.
    """
    rows, columns = weights.shape
    if columns % GROUP or not columns:
        raise ModelError(f"Rows of {columns} weights cannot be quantised in groups of {GROUP}.", "Leave --experts out.")
    groups = weights.reshape(rows, -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    if not np.isfinite(largest).all():
        raise ModelError("Some weights of experts are no finite numbers, so they cannot be quantised.", "Leave --experts out.")
    half = 1 << (to.bits - 1)
    fraction, exponent = np.frexp(largest / np.float32(half - 0.5))
    steps = 1 << to.digits
    exponent = np.maximum(exponent, _LEAST_BIT[dtype] + to.digits)
    # A fraction is at least 1/2, so one of `digits` digits is a whole number of 2 ** -digits.
    scales = np.ldexp(np.maximum(np.ceil(fraction * np.float32(steps)), np.float32(steps // 2)) / np.float32(steps), exponent)
    scales = scales.astype(np.float32)
    if scales.max() > _LARGEST_SCALE[dtype]:
        raise ModelError(
            f"Some weights of experts are as large as {largest.max():.3g}, which {to.name.upper()} cannot hold in a model in {dtype}.",
            "Leave --experts out.",
        )
    codes = np.clip(np.rint(groups / scales[:, :, None]), -half, half - 1).reshape(rows, columns).astype(np.int8)
    stored: dict[str, Stored] = {"scales": ("BF16", narrow(scales, "bfloat16"))}
    if to.bits == 8:
        return stored | {"codes": ("I8", codes)}
    nibbles = (codes + 8).astype(np.uint8)
    words = np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4).view("<i4")
    return stored | {"codes": ("I32", words), "shape": ("I64", np.array([rows, columns], dtype=np.int64))}
