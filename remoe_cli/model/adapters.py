"""Families whose experts do not go through transformers' experts interface, made to.

An adapter gives a family's experts module the attributes that the interface gives to others, and lets its block call the hook.

- Llama 4 multiplies an expert's input by the router's score, where all others multiply its output: so the hook gets scaled rows, and
  weights of one. Its own code sends every token through every expert, those that were not chosen with zeros, which adds nothing.
- LongCat-Flash has experts that return what they get. They have no weights, so the block adds them, after the others, as their ids are
  higher.
- Step 3.5's and 3.7's experts lack the interface's attributes alone.

Each family's code takes time to import, so only a model that needs an adapter has this module imported (experts.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts, LongcatFlashMoE
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from remoe_cli.model.adapted import Adapted


class _Llama4Experts(Adapted, Llama4TextExperts):  # type: ignore[misc]
    """Stacked, transposed matrices of gate and up, and of down."""

    is_transposed = True
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module

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
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)
        index = torch.topk(logits, 1, dim=1).indices
        scores = scores.gather(1, index)
        routed = self.experts(hidden * scores, index, torch.ones_like(scores))
        return self.shared_expert(hidden).add_(routed), logits


class _LongcatExperts(Adapted, LongcatFlashExperts):  # type: ignore[misc]
    """The experts that have weights; higher ids are none of theirs."""

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index[index < self.num_experts]).tolist():
            slots, rows = torch.where((index == expert).T)
            gate, up = F.linear(hidden[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            computed = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, rows, (computed * weights[rows, slots, None]).to(out.dtype))
        return out


class _LongcatMoe(LongcatFlashMoE):  # type: ignore[misc]
    """A block that adds the weighted rows of experts without weights, by rising id."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, index = self.router(hidden_states)
        out: Tensor = self.experts(hidden, index, weights)
        ids, order = index.sort(dim=1)
        weights = weights.gather(1, order).where(ids >= self.experts.num_experts, 0.0)
        for slot in range(ids.shape[1]):
            out = out + (hidden * weights[:, slot, None]).to(out.dtype)
        return out.view(hidden_states.shape)


class _Step3p7Experts(Adapted, Step3p7Experts):  # type: ignore[misc]
    _apply_gate = Step3p7Experts._apply_gate


def adapt(model: PreTrainedModel) -> None:
    """Adapt the blocks of a model that have an adapter: Llama 4's with one expert a token, as published."""
    for block in model.modules():
        if type(block) is Llama4TextMoe and block.top_k == 1:
            block.__class__, block.experts.__class__ = _Llama4Moe, _Llama4Experts
        elif type(block) is LongcatFlashMoE:
            experts: Any = block.experts
            block.__class__, experts.__class__ = _LongcatMoe, _LongcatExperts
            experts.num_experts = experts.num_routed_experts
            # Its own class makes rows of gate and up for experts without weights too.
            experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[: experts.num_experts], requires_grad=False)
        elif type(block) is Step3p7Experts:
            block.__class__ = _Step3p7Experts
