"""Families whose experts do not go through transformers' experts interface, made to.

An adapter gives a family's experts module the attributes that the interface gives to others, and lets its block call the hook.

- Llama 4 multiplies an expert's input by the router's score, where all others multiply its output: so the hook gets scaled rows, and
  weights of one. Its own code sends every token through every expert, those that were not chosen with zeros, which adds nothing.
- LongCat-Flash has experts that return what they get. They have no weights, so the block adds them, after the others, as their ids are
  higher.
- Step 3.5's and 3.7's experts lack the interface's attributes alone.
- DBRX has the rows of all experts in one matrix. Here each has a matrix of its own, of the same rows (`by_expert`).
- JetMoE's block has its experts in two modules of its own. Its attention has experts too, which stay with the main function: they are
  no part of a layer's routed experts.

Each family's code takes time to import, so only a model that needs an adapter has this module imported (experts.py).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter, WeightRenaming
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE, JetMoeTopKGating
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts, LongcatFlashMoE
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from remoe_cli.errors import ModelError
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


class _Stacked(Adapted):
    """Stacked matrices of gate and up, and of down.

    Ids of `num_experts` and more are those of experts without weights.
    """

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module
    sum_dtype: torch.dtype | None = None  # in which outputs are added up; None: that of the hidden states

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden, dtype=self.sum_dtype)
        for expert in torch.unique(index[index < self.num_experts]).tolist():
            slots, rows = torch.where((index == expert).T)
            gate, up = F.linear(hidden[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            computed = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, rows, (computed * weights[rows, slots, None]).to(out.dtype))
        return out.to(hidden.dtype)


class _LongcatExperts(_Stacked, LongcatFlashExperts):  # type: ignore[misc]
    """The experts that have weights."""


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


class _DbrxExperts(_Stacked, DbrxExperts):  # type: ignore[misc]
    """Experts that get the hidden states of all sequences in one matrix, as others do."""

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().__call__(hidden.reshape(-1, hidden.shape[-1]), index, weights).view(hidden.shape)


class _JetMoeExperts(_Stacked, nn.Module):
    """The experts of a block, whose outputs are added up in one call: torch does that in float32."""

    sum_dtype = torch.float32

    def __init__(self, block: JetMoeMoE) -> None:
        super().__init__()
        self.num_experts, self.act_fn = block.input_linear.num_experts, block.activation
        self.gate_up_proj, self.down_proj = block.input_linear.weight, block.output_linear.weight


class _JetMoe(JetMoeMoE):  # type: ignore[misc]
    """A block that hands its tokens to the hook."""

    def forward(self, layer_input: Tensor) -> Tensor:
        hidden = layer_input.reshape(-1, self.input_size)
        top, index = self.router.layer(hidden).float().topk(self.router.top_k, dim=1)
        out: Tensor = self.experts(hidden, index, torch.softmax(top, dim=1).type_as(hidden)).view(layer_input.shape) + self.bias
        return out


class _JetMoeGating(JetMoeTopKGating):  # type: ignore[misc]
    """A router of attention's experts; of tensors without numbers, every token goes to the first one."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        if not hidden.is_meta:
            routed: tuple[Tensor, Tensor, Tensor, list[int], Tensor] = super().forward(hidden)
            return routed
        rows = len(hidden) * self.top_k
        places = torch.arange(rows, device="meta")
        counts = [rows, *([0] * (self.num_experts - 1))]
        return places, places // self.top_k, hidden.new_ones(rows), counts, self.layer(hidden).float()


# By family, the tensors of checkpoints whose parameters an adapter gives other names.
_NAMES: dict[str, list[WeightConverter | WeightRenaming]] = {
    "dbrx": [
        WeightConverter(["experts.mlp.w1", "experts.mlp.v1"], "experts.gate_up_proj", [Concatenate(dim=1)]),
        WeightConverter("experts.mlp.w2", "experts.down_proj", [Transpose(1, 2)]),
    ],
    "jetmoe": [
        WeightRenaming(r"mlp\.input_linear\.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming(r"mlp\.output_linear\.weight", "mlp.experts.down_proj"),
    ],
}


class RowsOfExperts:
    """A matrix with the rows of all experts one after the other, read as one matrix for each.

    Shapes: [E R, C] of the checkpoint is [E, R, C] here.
    """

    def __init__(self, source: Any, rows: int) -> None:
        self._source, self.rows = source, rows

    def get_shape(self) -> list[int]:
        rows, columns = self._source.get_shape()
        return [rows // self.rows, self.rows, columns]

    def get_dtype(self) -> str:
        return str(self._source.get_dtype())

    def __getitem__(self, experts: slice) -> Tensor:
        first, last, _ = experts.indices(self.get_shape()[0])
        rows: Tensor = self._source[first * self.rows : last * self.rows]
        return rows.view(last - first, *self.get_shape()[1:])


def rows_each(source: Any) -> int:
    """Count the rows of a checkpoint's stacked tensor that are one expert's."""
    return source.rows if isinstance(source, RowsOfExperts) else 1


def by_expert(model: PreTrainedModel, name: str, source: Any) -> Any:
    """Return what reads a tensor of a checkpoint expert by expert.

    That is the tensor itself, but where it is a matrix with the rows of all experts.

    Raises: ModelError where such a matrix has no whole number of experts, or is quantised.
    """
    if model.config.model_type != "dbrx" or not re.search(r"experts\.mlp\.(w1|v1|w2)$", name):
        return source
    rows, shape = model.config.ffn_config.ffn_hidden_size, source.get_shape()
    if len(shape) != 2 or shape[0] % rows or source.get_dtype() not in ("BF16", "F16", "F32"):
        raise ModelError(
            f"{name} of the checkpoint is {list(shape)} in {source.get_dtype()}, and its config.json says {rows} rows for each expert.",
            "Check that the checkpoint is complete, and that it is in bfloat16, float16 or float32.",
        )
    return RowsOfExperts(source, rows)


def adapt(model: PreTrainedModel) -> None:
    """Adapt the blocks of a model that have an adapter: Llama 4's with one expert a token, as published."""
    for block in list(model.modules()):
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
        elif type(block) is DbrxExperts:
            _adapt_dbrx(block)
        elif type(block) is JetMoeMoE:
            block.__class__, block.experts = _JetMoe, _JetMoeExperts(block)
            del block.input_linear, block.output_linear
        elif type(block) is JetMoeTopKGating:
            block.__class__ = _JetMoeGating
    if (names := _NAMES.get(model.config.model_type)) is not None:
        register_checkpoint_conversion_mapping(model.config.model_type, names, overwrite=True)


def _adapt_dbrx(experts: Any) -> None:
    gate, up, down = (
        w.data.view(-1, experts.ffn_hidden_size, experts.hidden_size) for w in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)
    )
    experts.__class__, experts.act_fn = _DbrxExperts, experts.mlp.activation_fn
    del experts.mlp
    experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1), requires_grad=False)
    experts.down_proj = nn.Parameter(down.transpose(1, 2).contiguous(), requires_grad=False)
