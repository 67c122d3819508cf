"""Weights in the blocks in which oneDNN computes: the same numbers as torch's, and sooner.

A weight lies in memory row after row. For every product in bfloat16 torch has oneDNN reorder it into blocks first, which for the few rows
of a decode step takes nearly as long as the product itself. Here it is reordered once, when the model is loaded. The product that follows
is oneDNN's own, so its numbers are torch's bit for bit: that is tried for each size of matrix, and a size that differs stays as it was.

Other types stay as they are: float32 goes to another library, which adds up in another order. Without bfloat16 instructions ordered.py has
other products.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRIED_ROWS = (1, 3, 8, 64)
_known: dict[tuple[torch.Size, bool], bool] = {}  # by size of a weight, and whether there is a bias
# Kept off the modules: a copy of a module with other weights must not compute with these.
_experts: WeakKeyDictionary[nn.Module, dict[str, list[Tensor]]] = WeakKeyDictionary()
_ATTRIBUTES: tuple[str, list[float], str] = ("none", [], "")  # nothing is done with the product


class BlockedLinear(nn.Linear):
    """An nn.Linear whose weight is in blocks; `weight` gives it row after row to whoever asks for it."""

    blocked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.blocked, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.blocked.to_dense()


def product(x: Tensor, blocked: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what F.linear does, with a weight in blocks.

    Shapes: x [..., columns], blocked [rows, columns]; returns [..., rows].
    """
    # oneDNN is told nothing of x's strides.
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), blocked, bias, *_ATTRIBUTES)  # type: ignore[no-any-return]


def block_weights(model: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Put the weights of a model's linear layers and of its experts modules into blocks, in place.

    Only those on the CPU, and where this changes no bit. Weights that another module uses too, such as an embedding, stay as they are, and
    so do those that the code around looks at itself.
    What is in blocks is this process's own memory, and no longer its file's. A second call changes nothing.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    modules = list(model.modules())
    uses = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    children = ((name, child, _source(type(module).__module__)) for module in modules for name, child in module.named_children())
    looked_at = {id(child) for name, child, source in children if f"self.{name}.weight" in source}
    for module in modules:
        if type(module) is not nn.Linear or uses[id(module.weight)] > 1 or id(module) in looked_at:
            continue
        if _same(module.weight, module.bias):
            blocked = _reordered(module.weight)
            del module._parameters["weight"]
            module.__class__, module.blocked = BlockedLinear, blocked
    for module in experts:
        _block_experts(module)


@cache
def _source(file: str) -> str:
    """Return the code of a module of Python; empty where it has none that can be read."""
    try:
        return inspect.getsource(sys.modules[file])
    except (OSError, TypeError):
        return ""


def _block_experts(module: Any) -> None:
    """Put a layer's experts into blocks, one by one; parameters of zero rows remain, which tell shapes."""
    weights = {name: w for name in ("gate_up_proj", "up_proj", "down_proj") if (w := module._parameters.get(name)) is not None and len(w)}
    if not all(_same(_rows(module, w)[0], None) for w in weights.values()):
        return
    for name, w in weights.items():
        _experts.setdefault(module, {})[name] = [_reordered(row) for row in _rows(module, w)]
        module._parameters[name] = nn.Parameter(w.new_empty(0, *w.shape[1:]), requires_grad=False)


def _rows(module: Any, weights: Tensor) -> list[Tensor]:
    return [row.t() if module.is_transposed else row for row in weights]


def blocks_of(module: nn.Module) -> Mapping[str, list[Tensor]]:
    """Return the blocks of a layer's experts, by parameter those of each row; nothing without blocks."""
    return _experts.get(module, {})


def blocked_bytes(module: nn.Module) -> int:
    """Count the bytes of a layer's experts that are in blocks."""
    return sum(row.numel() * row.element_size() for rows in blocks_of(module).values() for row in rows)


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)  # type: ignore[no-any-return]


def _same(weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether products keep their bits; each size is tried once."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    size = weight.shape, bias is not None
    if size not in _known:
        blocked, noise = _reordered(weight), torch.Generator().manual_seed(0)
        tried = (torch.randn(rows, weight.shape[1], generator=noise).to(weight.dtype) for rows in _TRIED_ROWS)
        _known[size] = all(torch.equal(F.linear(x, weight, bias), product(x, blocked, bias)) for x in tried)
    return _known[size]
