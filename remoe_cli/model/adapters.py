"""Families whose experts do not go through transformers' experts interface, made to.

An adapter gives a family's experts module the attributes that the interface gives to others, and lets its block call the hook.
Llama 4 multiplies an expert's input by the router's score, where all others multiply its output: so the hook gets scaled rows, and weights
of one. Its own code sends every token through every expert, those that were not chosen with zeros, which adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

Hook = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class _Llama4Experts(Llama4TextExperts):  # type: ignore[misc]
    """Stacked, transposed matrices of gate and up, and of down; called by the hook, or one after the other where there is none."""

    has_gate = is_transposed = is_concatenated = True
    has_bias = has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = _default_apply_gate
    hook: Hook | None = None

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index).tolist():
            rows = (index[:, 0] == expert).nonzero()[:, 0]
            gate, up = (hidden[rows] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            out[rows] = (up * self.act_fn(gate)) @ self.down_proj[expert]
        return out * weights


class _Llama4Moe(Llama4TextMoe):  # type: ignore[misc]
    """A block that hands scaled rows to the hook, each for one expert; also returns the router's logits [T, E]."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden, call = hidden_states.reshape(-1, self.hidden_dim), self.experts.hook or type(self.experts).forward
        scores, logits = self.router(hidden)
        index = torch.topk(logits, 1, dim=1).indices
        scores = scores.gather(1, index)
        routed = call(self.experts, hidden * scores, index, torch.ones_like(scores))
        return self.shared_expert(hidden).add_(routed), logits


def adapt(model: PreTrainedModel) -> None:
    """Adapt the blocks of a model that have an adapter: Llama 4's with one expert a token, as published."""
    for block in model.modules():
        if type(block) is Llama4TextMoe and block.top_k == 1:
            block.__class__, block.experts.__class__ = _Llama4Moe, _Llama4Experts


def hooked(module: nn.Module, hook: Hook) -> None:
    """Let an adapted experts module call the hook; others find it by the name of its implementation."""
    if isinstance(module, _Llama4Experts):
        module.hook = hook
