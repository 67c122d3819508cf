"""What an adapter (adapters.py) gives to an experts module that lacks transformers' interface."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

Hook = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Adapted(nn.Module):
    """What transformers' experts interface gives to an experts module.

    Calls go to the hook, or to the family's `forward` where there is none.
    """

    has_gate = is_concatenated = True
    is_transposed = has_bias = has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = _default_apply_gate
    hook: Hook | None = None

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = super().__call__(hidden, index, weights) if self.hook is None else self.hook(self, hidden, index, weights)
        return out


def hooked(module: nn.Module, hook: Hook) -> None:
    """Let an adapted experts module call the hook; others find it by the name of its implementation."""
    if isinstance(module, Adapted):
        module.hook = hook
