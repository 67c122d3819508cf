"""The weights of a quantised checkpoint: which tensors belong together, and what they stand for.

A quantised matrix is several tensors of the checkpoint: codes, scales and their like. `fold` puts them together under the name that the
matrix has where it is not quantised. What is behind that name is read and dequantised when it is asked for, so that the loader, which knows
nothing of quantisation, never has more of it in memory than it loads. The arithmetic is that of the expert functions.

Formats are told apart by the names and types of their tensors. The configuration is asked only whether remoe serves the format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import Array, FormError, Stored, dequantise
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.stored import quantisation, refuse_format

# Endings of tensors' names: that of the matrix in their place, and their role in function/dequantise.py. Longer ones first.
_ENDINGS = (
    *((f".weight{ending}", (".weight", role)) for ending, role in (("_packed", "codes"), ("_scale_inv", "scales"), ("_scale", "scales"))),
    *((f".weight{ending}", (".weight", role)) for ending, role in (("_scale_2", "multiplier"), ("_global_scale", "divisor"))),
    *((f".weight{ending}", (".weight", role)) for ending, role in (("_shape", "shape"), ("_zero_point", "zero_points"))),
    (".scale", (".weight", "scales")),
    *((ending, ("", role)) for ending, role in (("_blocks", "codes"), ("_scales", "scales"), ("_scale_inv", "scales"))),
)
# Scales of activations and of the KV cache: no weights, and transformers leaves them out where it dequantises.
_UNREAD = (".input_scale", ".input_global_scale", ".input_zero_point", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
_CODES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8", "U8": "fp4", "I32": "words"}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8, torch.float8_e8m0fnu: torch.uint8}
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def array_of(tensor: torch.Tensor) -> Array:
    """Give a tensor as numpy has it; types that numpy lacks as their bits."""
    tensor = tensor.contiguous()
    return (tensor.view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor).numpy()


@dataclass(frozen=True)
class QuantisedMatrix:
    """A quantised matrix of a checkpoint, or one for each expert of a layer, read when it is indexed.

    name      of the matrix where it is not quantised
    form      in function/dequantise.py
    tensors   by role, the name of the checkpoint's tensor and the slice that reads it
    dtype     what it becomes
    stacked   whether it is one matrix for each expert
    """

    name: str
    form: str
    tensors: Mapping[str, tuple[str, Any]]
    dtype: str
    stacked: bool

    @property
    def transposed(self) -> bool:
        """Whether the parameter is [in, out], which is so in the one family with such blocks."""
        return "_blocks" in self.tensors["codes"][0][-7:]

    @property
    def matrix_shape(self) -> list[int]:
        """The shape of one matrix as the parameter has it."""
        first = 1 if self.stacked else 0
        codes = list(self.tensors["codes"][1].get_shape())[first:]
        if self.form == "words":
            return [int(side) for side in self.tensors["shape"][1][...]]
        shape = [codes[0], 2 * prod(codes[1:])] if self.form == "fp4" else codes
        return shape[::-1] if self.transposed else shape

    def get_shape(self) -> list[int]:
        return [*([self.tensors["codes"][1].get_shape()[0]] if self.stacked else []), *self.matrix_shape]

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]

    def stored(self, row: int | None = None) -> dict[str, Stored]:
        """Read the checkpoint's own tensors of one matrix, by role; `row` is that of a stacked one."""
        read = {role: (source, source[...] if row is None else source[row : row + 1][0]) for role, (_, source) in self.tensors.items()}
        return {role: (source.get_dtype(), array_of(tensor)) for role, (source, tensor) in read.items()}

    def matrix(self, row: int | None = None) -> torch.Tensor:
        """Read one matrix, dequantised, as the parameter has it.

        Raises: ModelError for tensors that do not fit each other.
        """
        try:
            weights = dequantise(self.form, self.stored(row), self.dtype)
        except FormError as error:
            raise ModelError(
                f"The tensors of {self.name} cannot be dequantised: {error}.", "Check that the checkpoint is complete."
            ) from None
        tensor = torch.from_numpy(weights)
        tensor = tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor
        return tensor.T.contiguous() if self.transposed else tensor

    def __getitem__(self, key: Any) -> torch.Tensor:
        if not self.stacked:
            return self.matrix()[key]
        shape = self.get_shape()
        rows = range(shape[0])[key] if isinstance(key, slice) else range(shape[0])
        out = torch.empty((len(rows), *shape[1:]), dtype=_TORCH[self.dtype])
        for place, row in enumerate(rows):
            out[place] = self.matrix(row)
        return out


def fold(checkpoint: Checkpoint, tensors: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Put the tensors of each quantised matrix together; the others stay as they are.

    Raises: ModelError for a format that remoe does not serve, and for tensors of one that it does not know.
    """
    settings = quantisation(checkpoint.path)
    if settings is None:
        return dict(tensors)
    refuse_format(settings)
    groups: dict[str, dict[str, tuple[str, Any]]] = defaultdict(dict)
    for name, source in tensors.items():
        for matrix, role in _places(name, source):
            groups[matrix][role] = (name, source)
    folded, used = {}, set()
    for name, roles in groups.items():
        if {"codes", "scales"} <= roles.keys():
            folded[name] = _matrix(name, roles, str(dtype).removeprefix("torch."))
            used |= {tensor for tensor, _ in roles.values()}
    rest = {name: source for name, source in tensors.items() if name not in used and not name.endswith(_UNREAD)}
    if strange := [name for name in rest if name.endswith((".weight_g_idx", ".pre_quant_scale"))]:
        raise ModelError(
            f"The checkpoint {checkpoint.path} has weights for reordered or scaled inputs ({strange[0]}), which remoe does not serve.",
            "Use a checkpoint without them, or a bfloat16 copy.",
        )
    return rest | folded


def _places(name: str, source: Any) -> Iterator[tuple[str, str]]:
    """Find the matrix and the role that a tensor may have in it, by its name and type."""
    for ending, (own, role) in _ENDINGS:
        if name.endswith(ending):
            yield name.removesuffix(ending) + own, role
            return
    if source.get_dtype() in _CODES:
        yield name, "codes"


def _matrix(name: str, roles: Mapping[str, tuple[str, Any]], dtype: str) -> QuantisedMatrix:
    codes, scales = (roles[role][1] for role in ("codes", "scales"))
    form = _CODES.get(codes.get_dtype())
    if form == "int8" and scales.get_dtype() in ("U8", "F8_E8M0") and not roles["scales"][0].endswith("_scale"):
        form = "fp4"  # DeepSeek-V4 keeps pairs of 4-bit floats in signed bytes
    asymmetric = "zero_points" in roles and form != "words"
    if form is None or asymmetric or (form == "words") != ("shape" in roles):
        raise ModelError(
            f"remoe does not know how {name} is quantised: {', '.join(f'{x} in {s.get_dtype()}' for x, s in roles.values())}.",
            "Use a bfloat16 copy of the model, and report the checkpoint.",
        )
    return QuantisedMatrix(name, form, roles, dtype, stacked=not name.endswith(".weight"))
