"""One expert's feed-forward network, rounded where torch's eager path rounds.

A bfloat16 model gives the same tokens only if every intermediate is rounded to bfloat16 where torch writes a tensor: after each matmul,
bias, activation and product (with float32 intermediates greedy tokens differ, as measured). So values are float32 arrays that hold
numbers of the model's type, and `rounded` is called at these points.

numkong multiplies matrices of 16-bit weights (float32 accumulation, weights made ready once), numpy those of float32 weights, and
products.py those of bfloat16 where the processor has no instructions for it.
docs/adr/0003-function-arithmetic.md has the measurement behind this choice. Quantised weights may stay as they are stored (packed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numkong
import numpy as np
import numpy.typing as npt

from .codec import STORAGE
from .products import are_needed, fits, multiply, order_for

Array = npt.NDArray[Any]
Floats = npt.NDArray[Any]  # float32; numpy's stubs widen float32 expressions to float64
_NUMKONG: dict[str, Any] = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class FfnSpec:
    """The arithmetic of a family's experts.

    gate          how the up projection becomes the hidden activation: see `_GATES`
    activation    a name in `_ACTIVATIONS`, for the gates that have one
    limit         clamp, for the gates that have one
    alpha         scale of the sigmoid, for the gates that have one
    interleaved   rows of gate and up alternate (g0 u0 g1 u1 ..); otherwise all rows of gate come first
    transposed    weights are stored [in, out]; otherwise [out, in]
    """

    dtype: str
    gate: str
    activation: str = "silu"
    limit: float = 0.0
    alpha: float = 0.0
    interleaved: bool = False
    transposed: bool = False


def widen(stored: Array, dtype: str) -> Floats:
    """Convert stored numbers to float32, exactly.

    >>> widen(narrow(np.array([1.0, 1.001], dtype=np.float32), "bfloat16"), "bfloat16").tolist()
    [1.0, 1.0]
    """
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(stored, dtype=np.float32)


def narrow(values: Floats, dtype: str) -> Array:
    """Convert float32 to stored numbers, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return values.astype(STORAGE[dtype])


def rounded(values: Floats, dtype: str) -> Floats:
    """Round float32 numbers to those of a type."""
    return values if dtype == "float32" else widen(narrow(values, dtype), dtype)


def _silu(x: Floats) -> Floats:
    return x / (np.float32(1) + np.exp(-x))


def _sigmoid(x: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def _gelu_tanh(x: Floats) -> Floats:
    y: Floats = np.float32(0.5) * x * (np.float32(1) + np.tanh(np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x * x * x)))
    return y


# Each computes in float32 and rounds once at the end, as torch's CPU kernels do.
_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.square(np.maximum(x, np.float32(0))),
}


def _split(h: Floats, spec: FfnSpec) -> tuple[Floats, Floats]:
    if spec.interleaved:
        return h[:, ::2], h[:, 1::2]
    half = h.shape[1] // 2
    return h[:, :half], h[:, half:]


def _gate_none(h: Floats, spec: FfnSpec) -> Floats:
    return rounded(_ACTIVATIONS[spec.activation](h), spec.dtype)


def _gate_standard(h: Floats, spec: FfnSpec) -> Floats:
    gate, up = _split(h, spec)
    return rounded(rounded(_ACTIVATIONS[spec.activation](gate), spec.dtype) * up, spec.dtype)


def _gate_wide(h: Floats, spec: FfnSpec) -> Floats:
    gate, up = _split(h, spec)
    return rounded(_ACTIVATIONS[spec.activation](gate) * up, spec.dtype)


def _limit(spec: FfnSpec) -> Any:
    """The limit in the model's type, in which torch clamps."""
    return rounded(np.array([spec.limit], dtype=np.float32), spec.dtype)[0]


def _clamp(h: Floats, spec: FfnSpec) -> tuple[Floats, Floats]:
    gate, up = _split(h, spec)
    limit = _limit(spec)
    return np.minimum(gate, limit), np.clip(up, -limit, limit)


def _gate_clamped(h: Floats, spec: FfnSpec) -> Floats:
    gate, up = _clamp(h, spec)
    return rounded(rounded(_ACTIVATIONS[spec.activation](gate), spec.dtype) * up, spec.dtype)


def _gate_clamped_after(h: Floats, spec: FfnSpec) -> Floats:
    gate, up = _split(h, spec)
    limit = _limit(spec)
    activated = np.minimum(rounded(_ACTIVATIONS[spec.activation](gate), spec.dtype), limit)
    return rounded(activated * np.clip(up, -limit, limit), spec.dtype)


def _gate_sigmoid(h: Floats, spec: FfnSpec) -> Floats:
    gate, up = _clamp(h, spec)
    d = spec.dtype
    swish = rounded(gate * rounded(_sigmoid(rounded(gate * np.float32(spec.alpha), d)), d), d)
    return rounded(rounded(up + np.float32(1), d) * swish, d)


_GATES: dict[str, Callable[[Floats, FfnSpec], Floats]] = {
    "none": _gate_none,  # act(up): nemotron_h
    "standard": _gate_standard,  # act(gate) * up: nearly every family
    "wide": _gate_wide,  # the same without the rounding between: beam
    "clamped": _gate_clamped,  # clamps first: deepseek_v4, hy_v4
    "clamped after": _gate_clamped_after,  # clamps the activation: step3p7
    "sigmoid": _gate_sigmoid,  # clamps, gate * sigmoid(alpha gate) * (up + 1): gpt_oss, minimax_m3
}
GATES, ACTIVATIONS = tuple(_GATES), tuple(_ACTIVATIONS)


class Product(Protocol):
    """A weight matrix [rows, columns] to multiply by.

    It is a `Matrix` or an `OrderedMatrix` that was made ready, or a `PackedMatrix` (packed.py).
    """

    @property
    def rows(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...

    def apply(self, x: Floats) -> Floats: ...


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, ready to multiply: float32 [rows, columns], or in the order that numkong wants."""

    dtype: str
    rows: int
    weights: Any

    @classmethod
    def of(cls, stored: Array, spec: FfnSpec) -> Matrix:
        """Make a stored matrix ready."""
        matrix = stored.T if spec.transposed else stored
        if spec.dtype == "float32":
            return cls(spec.dtype, len(matrix), matrix)
        return cls(spec.dtype, len(matrix), numkong.dots_pack(_tensor(matrix, spec.dtype), dtype=_NUMKONG[spec.dtype]))

    @property
    def held_bytes(self) -> int:
        """The memory of its weights."""
        return int(self.weights.nbytes)

    def apply(self, x: Floats) -> Floats:
        """Multiply x [n, in] to [n, out], rounded once."""
        if self.dtype == "float32":
            product: Floats = (self.weights @ x.T).T  # a quarter sooner than x @ weights.T for a few rows
            return product
        product = np.asarray(numkong.dots_packed(_tensor(narrow(x, self.dtype), self.dtype), self.weights))
        return rounded(product, self.dtype)


@dataclass(frozen=True)
class OrderedMatrix:
    """A weight matrix in bfloat16 [rows, columns], whose products add up in torch's order (products.py)."""

    stored: Array

    @property
    def rows(self) -> int:
        return len(self.stored)

    @property
    def held_bytes(self) -> int:
        """The memory of its weights."""
        return self.stored.nbytes

    def apply(self, x: Floats) -> Floats:
        """Multiply x [n, in] to [n, out], rounded once."""
        narrowed = narrow(x, "bfloat16")
        y = np.empty((len(x), len(self.stored)), dtype=np.uint16)
        if len(x):
            sizes = (len(self.stored), self.stored.shape[1], len(x))
            multiply(order_for(len(x)), self.stored.ctypes.data, None, narrowed.ctypes.data, y.ctypes.data, sizes)
        return widen(y, "bfloat16")


def _tensor(stored: Array, dtype: str) -> Any:
    owner = np.ascontiguousarray(stored)
    return numkong.from_pointer(owner.ctypes.data, owner.shape, _NUMKONG[dtype], owner=owner)


def _product(stored: Any, spec: FfnSpec) -> Product:
    if not isinstance(stored, np.ndarray):
        product: Product = stored
        return product
    matrix = stored.T if spec.transposed else stored
    if spec.dtype == "bfloat16" and are_needed() and fits(*matrix.shape):
        return OrderedMatrix(np.array(matrix, order="C"))
    return Matrix.of(stored, spec)


@dataclass(frozen=True)
class Expert:
    """One expert, ready to run. `width` is that of the rows that enter and leave it."""

    spec: FfnSpec
    width: int
    up: Product
    down: Product
    up_bias: Floats | None
    down_bias: Floats | None

    @classmethod
    def of(cls, tensors: Mapping[str, Any], spec: FfnSpec) -> Expert:
        """Make an expert ready from gate_up_proj (or up_proj), down_proj and their biases.

        Matrices are stored numbers, or packed ones, which stay as they are.
        """
        name = "up_proj" if spec.gate == "none" else "gate_up_proj"
        biases = [widen(tensors[b], spec.dtype) if b in tensors else None for b in (name + "_bias", "down_proj_bias")]
        up, down = (_product(tensors[x], spec) for x in (name, "down_proj"))  # each is looked up once: that may dequantise it
        return cls(spec, down.rows, up, down, biases[0], biases[1])

    @property
    def weights_bytes(self) -> int:
        """The memory of its matrices."""
        return self.up.held_bytes + self.down.held_bytes

    def run(self, stored: Array) -> Array:
        """Compute the unweighted outputs [n, width] of rows [n, width], both as stored numbers."""
        d = self.spec.dtype
        h = self.up.apply(widen(stored, d))
        if self.up_bias is not None:
            h = rounded(h + self.up_bias, d)
        out = self.down.apply(_GATES[self.spec.gate](h, self.spec))
        if self.down_bias is not None:
            out = rounded(out + self.down_bias, d)
        return narrow(out, d)
