"""The tiny families are what the other tests take them for: routed, varied, seeded, endless, and saved in two layouts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.families import EXPERTS, FAMILIES, HIDDEN_SIZE, TOP_K, VOCAB_SIZE, build, save

PROMPTS = torch.tensor([[3, 17, 54, 99, 23, 8, 77, 120, 5, 60, 31, 2], [44, 9, 101, 13, 88, 70, 29, 6, 115, 52, 36, 91]])
families = pytest.mark.parametrize("name", FAMILIES)


def experts_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Modules of routed experts: those that transformers' experts decorator has marked."""
    return [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "num_experts")]


def generate(model: PreTrainedModel, ids: torch.Tensor) -> list[list[int]]:
    tokens: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return [[int(token) for token in row] for row in tokens[:, ids.shape[1] :]]


def test_there_are_enough_families() -> None:
    asked = "mixtral olmoe qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss granitemoe phimoe glm4_moe ernie4_5_moe minimax"
    assert set(asked.split()) <= set(FAMILIES)
    assert len(FAMILIES) >= 16


@families
def test_two_or_more_layers_of_routed_experts(name: str) -> None:
    model = build(name)
    modules = experts_modules(model)
    assert len(modules) >= 2
    assert model.config._experts_implementation == "eager"
    assert (model.config.hidden_size, model.config.vocab_size) == (HIDDEN_SIZE, VOCAB_SIZE)
    for module in modules:
        assert module.num_experts == EXPERTS
        assert all(parameter.shape[0] == EXPERTS for parameter in module.parameters(recurse=False))


@pytest.mark.sweep
@families
def test_greedy_decoding_runs_to_the_length_asked_and_is_not_degenerate(name: str) -> None:
    model = build(name)
    first, second = generate(model, PROMPTS)
    assert len(first) == len(second) == 8
    assert len(set(first + second)) >= 4
    assert first != second
    with torch.no_grad():
        spread = model(PROMPTS).logits[:, -1].std(dim=-1)
    assert spread.min() > 0.5
    assert spread.max() < 4.0


@families
def test_routing_varies_between_tokens_layers_and_prompts(name: str) -> None:
    model = build(name)
    seen: list[torch.Tensor] = []
    for module in experts_modules(model):
        module.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    with torch.no_grad():
        model(PROMPTS)
    counts = []
    for index in seen:
        assert index.shape == (PROMPTS.numel(), TOP_K)
        assert index.min() >= 0
        assert index.max() < EXPERTS
        by_prompt = index.reshape(2, -1)
        counts += [tuple(torch.bincount(row, minlength=EXPERTS).tolist()) for row in by_prompt]
    assert len(counts) == 2 * len(experts_modules(model))
    assert len(set(counts)) == len(counts)
    assert all(sum(count > 0 for count in row) >= 4 for row in counts)


@families
def test_a_seed_is_a_model_and_the_caller_keeps_its_random_numbers(name: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = build(name)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(2)
    same, other = build(name).state_dict(), build(name, seed=1).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in one.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in one.state_dict().items())


@pytest.mark.sweep
@families
def test_half_precision_generates(name: str) -> None:
    model = build(name, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for module in experts_modules(model) for parameter in module.parameters(recurse=False))
    assert [len(row) for row in generate(model, PROMPTS)] == [8, 8]


@pytest.mark.sweep
@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
@families
def test_a_saved_checkpoint_reads_back_as_the_same_model(name: str, fused: bool, tmp_path: Path) -> None:
    model = save(name, torch.bfloat16, tmp_path, fused)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager")
    assert again.config.eos_token_id is None
    assert again.generation_config.eos_token_id is None
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert generate(again, PROMPTS) == generate(model, PROMPTS)


@pytest.mark.parametrize(
    ("name", "hub", "fused"),
    [
        ("mixtral", "block_sparse_moe.experts.7.w1.weight", "mlp.experts.gate_up_proj"),
        ("qwen3_moe", "mlp.experts.7.gate_proj.weight", "mlp.experts.gate_up_proj"),
        ("granitemoe", "block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("nemotron_h", "mixer.experts.7.up_proj.weight", "mixer.experts.up_proj"),
    ],
)
def test_the_two_layouts_name_their_tensors_differently(name: str, hub: str, fused: str, tmp_path: Path) -> None:
    found = {}
    for layout in (False, True):
        save(name, torch.float32, tmp_path / str(layout), layout)
        with safe_open(tmp_path / str(layout) / "model.safetensors", "pt") as file:
            found[layout] = list(file.keys())
    assert any(key.endswith(hub) for key in found[False])
    assert not any(key.endswith(hub) for key in found[True])
    assert any(key.endswith(fused) for key in found[True])
    assert not any(key.endswith(fused) for key in found[False])


@families
def test_building_is_fast(name: str) -> None:
    build(name)  # imports the family
    start_s = time.process_time()
    build(name)
    assert time.process_time() - start_s < 0.3
