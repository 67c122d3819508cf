"""Weights in oneDNN's blocks: the model's numbers to the bit, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli.model import blocked
from remoe_cli.model.blocked import BlockedLinear, block_weights
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_expert, run_experts
from remoe_cli.model.gpu_experts import gpu_experts
from remoe_cli.model.loader import expert_bytes_held
from tests.support.families import FAMILIES, build

# Elsewhere torch does not give products in bfloat16 to oneDNN, and nothing may be put into blocks.
HERE = torch.ops.mkldnn._is_mkldnn_bf16_supported()
PROMPT = torch.arange(3, 24)[None]


def _all_local(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return run_experts(layer, hidden, index, weights, {expert: expert for expert in range(layer.experts)}, lambda *_: dict)


def _block(model: PreTrainedModel) -> None:
    block_weights(model, [layer.module for layer in expert_layers(model)])


def _logits(model: PreTrainedModel) -> Tensor:
    """Of a prompt and of two tokens after it."""
    with torch.inference_mode():
        out = model(PROMPT, use_cache=True)
        found = [out.logits]
        for token in (5, 6):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_of_a_model_stays(family: str) -> None:
    model = build(family, torch.bfloat16)
    attach(model, _all_local)
    expected, held = _logits(model), expert_bytes_held(model)
    _block(model)
    assert torch.equal(_logits(model), expected)
    assert expert_bytes_held(model) == held
    if HERE:
        assert any(isinstance(module, BlockedLinear) for module in model.modules())
        assert all(layer.is_blocked and not len(layer.parameters()["down_proj"]) for layer in expert_layers(model))
    else:
        assert not any(layer.is_blocked for layer in expert_layers(model))


def test_other_types_and_shared_weights_stay_as_they_are() -> None:
    single, tied = build("mixtral"), build("mixtral", torch.bfloat16, tie_word_embeddings=True)
    _block(single)
    _block(tied)
    assert not any(isinstance(module, BlockedLinear) for module in single.modules())
    assert type(tied.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


def test_weights_that_the_code_around_looks_at_stay_as_they_are() -> None:
    """They would be put together from blocks in every pass."""
    model: Any = build("jamba", torch.bfloat16)
    _block(model)
    assert type(model.model.layers[0].mamba.dt_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mamba.x_proj, BlockedLinear) == HERE


def test_a_product_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    product = blocked.product
    monkeypatch.setattr(blocked, "_known", {})
    monkeypatch.setattr(blocked, "product", lambda x, *rest: product(x, *rest) * (1.0 if len(x) == 1 else 1.01))
    model = build("mixtral", torch.bfloat16)
    _block(model)
    assert not any(isinstance(module, BlockedLinear) for module in model.modules())
    assert not any(layer.is_blocked for layer in expert_layers(model))


def test_a_blocked_layer_is_a_linear_layer() -> None:
    layer: Any = nn.Linear(48, 40, dtype=torch.bfloat16)
    weight, x = layer.weight.detach().clone(), torch.randn(6, 96, dtype=torch.bfloat16)[:, ::2]
    expected = F.linear(x.contiguous(), weight, layer.bias)
    block_weights(layer, [])
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)  # not contiguous
    assert torch.equal(layer.weight, weight)
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if HERE else ["weight", "bias"])


def test_a_copy_with_other_weights_computes_with_these() -> None:
    model = build("mixtral", torch.bfloat16)
    layer = expert_layers(model)[0]
    x = torch.linspace(-1, 1, layer.width).to(torch.bfloat16)[None]
    weights = {name: torch.randn_like(p[:1]) for name, p in layer.parameters().items()}
    expected = run_expert(replace(layer, module=gpu_experts(layer.module, [0], weights, layer.experts).module), 0, x)
    _block(model)
    assert torch.equal(run_expert(replace(layer, module=gpu_experts(layer.module, [0], weights, layer.experts).module), 0, x), expected)
