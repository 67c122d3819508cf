"""The experts of a quantised checkpoint as expert functions get them.

They are the checkpoint's own tensors, and a description of what is made of them.

A parameter of an expert is one matrix, or several whose rows follow each other in the order that transformers' conversion has. That it is
so is not believed: one expert of each shard is put together by that conversion too, and compared bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import STORED, Stored, dequantise
from remoe_cli.function.expert_ffn import Array, FfnSpec
from remoe_cli.function.weights import TYPES, Quantised
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.ffn import describe, from_storage, prove_same
from remoe_cli.model.loader import parameters_of
from remoe_cli.model.quantised import QuantisedMatrix, array_of


@dataclass(frozen=True)
class _Part:
    """One part of a parameter of one expert; `row` is that of the expert where `source` has one for each expert."""

    order: int
    pattern: str | None
    source: Any
    row: int | None

    @property
    def form(self) -> str:
        return self.source.form if isinstance(self.source, QuantisedMatrix) else "plain"

    def stored(self) -> dict[str, Stored]:
        """Read its tensors, by role."""
        if isinstance(self.source, QuantisedMatrix):
            return self.source.stored(self.row)
        tensor = self.source[...] if self.row is None else self.source[self.row : self.row + 1][0]
        return {"codes": (self.source.get_dtype(), array_of(tensor))}


# By name of a parameter, its parts in order.
_Parts = Mapping[str, Sequence[_Part]]


class StoredExperts:
    """The routed experts of a quantised checkpoint, of which nothing is read before it is asked for."""

    def __init__(self, checkpoint: Checkpoint, probe: PreTrainedModel) -> None:
        self._checkpoint, self._probe = checkpoint, probe
        self.layers = {x.layer: x for x in expert_layers(probe)}
        self._converters = [m for m in get_model_conversion_mapping(probe) if isinstance(m, WeightConverter)]
        held = checkpoint.held()
        owner = {f"{x.name}.{p}": (x.layer, p) for x in self.layers.values() for p in x.parameters()}
        self._parts: dict[tuple[int, int], dict[str, list[_Part]]] = {}
        for key, source, target, pattern in parameters_of(checkpoint, probe):
            if target not in owner:
                continue
            layer, name = owner[target]
            number = re.search(r"experts\.(\d+)\.", key)
            order = self._converter(pattern).source_patterns.index(pattern) if pattern is not None else 0
            experts = range(self.layers[layer].experts) if held is None else held.get(layer, ())
            for row, expert in [(None, int(number[1]))] if number else enumerate(experts):
                self._parts.setdefault((layer, expert), {}).setdefault(name, []).append(_Part(order, pattern, source, row))

    def _converter(self, pattern: str) -> WeightConverter:
        return next(c for c in self._converters if pattern in c.source_patterns)

    @property
    def is_quantised(self) -> bool:
        """Whether any expert is."""
        return any(part.form != "plain" for parts in self._parts.values() for some in parts.values() for part in some)

    def parts(self, layer: int, expert: int) -> _Parts:
        """Return the parts of an expert.

        Raises: ModelError for an expert that the checkpoint lacks.
        """
        parts = {name: sorted(some, key=lambda part: part.order) for name, some in self._parts.get((layer, expert), {}).items()}
        if parts.keys() != self.layers[layer].parameters().keys():
            raise ModelError(
                f"The checkpoint {self._checkpoint.path} is missing parameters of expert {expert} of layer {layer}.",
                "Check that the checkpoint is complete.",
            )
        return dict(sorted(parts.items()))

    def described(self, layer: int, expert: int) -> tuple[FfnSpec, dict[str, Quantised]]:
        """Describe the arithmetic of a layer's experts and how they are stored, and prove both on one.

        Raises: ModelError for experts that an expert function cannot serve.
        """
        where, parts = self.layers[layer], self.parts(layer, expert)
        shapes = {name: tuple(p.shape[1:]) for name, p in where.parameters().items()}
        quantised: dict[str, Quantised] = {}
        for name, some in parts.items():
            forms = {part.form for part in some}
            if len(forms) > 1:
                raise ModelError(
                    f"{name} of layer {layer} is stored in several forms: {', '.join(sorted(forms))}.", "Keep all experts local."
                )
            if forms != {"plain"} or len(some) > 1 or self._is_other_type(some, layer):
                transposed = isinstance(some[0].source, QuantisedMatrix) and some[0].source.transposed
                quantised[name] = Quantised(forms.pop(), len(some), shapes[name], transposed)
        dtype = where.parameters()["down_proj"].dtype
        module = type(where.module).__new__(type(where.module))
        module.__dict__.update({**where.module.__dict__, "_parameters": dict(where.module._parameters)})
        for name, some in parts.items():
            module._parameters[name] = nn.Parameter(self._converted(some, dtype)[None], requires_grad=False)
        one = replace(where, module=module)
        spec = describe(one)
        for name, parameter in one.parameters().items():
            mine = from_storage(np.ascontiguousarray(self._assembled(parts[name], quantised.get(name), spec.dtype)), dtype)
            if mine.shape != shapes[name] or not torch.equal(mine.view(torch.uint8), parameter[0].contiguous().view(torch.uint8)):
                raise ModelError(
                    f"The function's {name} of layer {layer} is not what transformers makes of the checkpoint's tensors.",
                    "Keep all experts local, and report the checkpoint.",
                )
        prove_same(one, 0, spec)
        return spec, quantised

    def _is_other_type(self, parts: Sequence[_Part], layer: int) -> bool:
        """Tell whether numbers that are not quantised are of another type than the model's, which the function would take them for."""
        model_type = self.layers[layer].parameters()["down_proj"].dtype
        return any(part.form == "plain" and part.source.get_dtype() != TYPES[str(model_type).removeprefix("torch.")] for part in parts)

    def _converted(self, parts: Sequence[_Part], dtype: torch.dtype) -> Tensor:
        """Put a parameter of one expert together by transformers' own conversion."""
        tensors = [x.source.matrix(x.row) if isinstance(x.source, QuantisedMatrix) else _plain(x).to(dtype) for x in parts]
        if parts[0].pattern is None:
            return tensors[0]
        converter = self._converter(parts[0].pattern)
        found: Any = {part.pattern: [tensor] for part, tensor in zip(parts, tensors, strict=True)}
        for operation in converter.operations:
            found = operation.convert(
                found, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns, config=self._probe.config
            )
        (tensor,) = found.values()
        merged: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return merged[0]

    def _assembled(self, parts: Sequence[_Part], quantised: Quantised | None, dtype: str) -> Array:
        """Put it together as the function does."""
        matrix = np.concatenate([dequantise(part.form, part.stored(), dtype) for part in parts])
        return matrix.T if quantised is not None and quantised.transposed else matrix

    def tensors(self, layer: int, expert: int, quantised: Mapping[str, Quantised]) -> list[tuple[str, str, Array]]:
        """Read an expert's tensors as a shard has them: name, type and array, by name.

        Raises: ModelError for an expert that is stored otherwise than `quantised` says.
        """
        read = []
        for name, some in self.parts(layer, expert).items():
            expected = quantised.get(name)
            stored_as = ({x.form for x in some}, len(some))
            is_other = stored_as != (({"plain"}, 1) if expected is None else ({expected.form}, expected.parts))
            is_other = is_other or (expected is None and self._is_other_type(some, layer))
            if is_other:
                raise ModelError(
                    f"{name} of expert {expert} of layer {layer} is not stored as in the other experts.", "Keep all experts local."
                )
            for number, part in enumerate(some):
                for role, (kind, array) in part.stored().items():
                    read.append((f"{name}.{number}.{role}" if name in quantised else name, kind, np.ascontiguousarray(array, STORED[kind])))
        return sorted(read, key=lambda entry: entry[0])


def _plain(part: _Part) -> Tensor:
    tensor: Tensor = part.source[...] if part.row is None else part.source[part.row : part.row + 1][0]
    return tensor


def as_json(quantised: Mapping[str, Quantised]) -> dict[str, Any]:
    """Give the description of quantised parameters as a shard's head has it."""
    return {name: asdict(entry) for name, entry in quantised.items()}
