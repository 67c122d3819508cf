"""Runs shared experts on the device while the host waits for the routed ones.

Many families compute a block's shared experts after its routed ones, from the same input. Here they are started in the experts hook, and
the call that follows gets their output. Which families do so is learned in the first pass: a block whose call has another input, or comes
before the routed experts, is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli.model.experts import ExpertLayer, expert_layers

_NAME = re.compile(r"shared_(experts?|mlp)")
_Place = tuple[int, int, Any]


@dataclass
class _Shared:
    """The shared experts of one block.

    forward    what they compute
    early      whether they are started in the hook; None before the first pass has told
    place      memory of the hidden states that the hook got last
    computed   the output that waits for its call
    """

    forward: Callable[..., Tensor]
    early: bool | None = None
    place: _Place | None = None
    computed: Tensor | None = None

    def start(self, hidden: Tensor) -> None:
        self.place = _place(hidden)
        self.computed = self.forward(hidden) if self.early else None  # also without the output of a pass that failed

    def call(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        same = self.place == _place(x) and not arguments and not named
        computed, self.place, self.computed = self.computed, None, None
        if self.early is not False:
            self.early = same
        if computed is not None and same:
            return computed.view(*x.shape[:-1], computed.shape[-1])
        return self.forward(x, *arguments, **named)


def _place(x: Tensor) -> _Place:
    return x.data_ptr(), x.numel(), x.dtype


def start_early(model: PreTrainedModel) -> dict[int, Callable[[Tensor], None]]:
    """Let a model's shared experts be started in the hook; returns what starts them, by hidden layer."""
    starts: dict[int, Callable[[Tensor], None]] = {}
    for layer in expert_layers(model):
        for module in _shared(model, layer):
            shared = _Shared(module.forward)
            module.forward = shared.call
            starts[layer.layer] = shared.start
    return starts


def _shared(model: PreTrainedModel, layer: ExpertLayer) -> Iterator[nn.Module]:
    """Find a layer's shared experts: beside its experts module, or beside the block that holds that."""
    block = layer.name.rpartition(".")[0]
    for parent in (block, block.rpartition(".")[0]):
        yield from (module for name, module in model.get_submodule(parent).named_children() if _NAME.fullmatch(name))
