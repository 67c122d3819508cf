"""Experts that are put together with one copy are those that transformers puts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remoe_cli.model.checkpoint import find
from remoe_cli.model.expert_stack import ExpertStack
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.loader import load, read_config, select, skeleton
from tests.support.families import FAMILIES, save
from tests.support.quantised import save_quantised

# Experts of one tensor each, with gate and up apart, together, and with none; the others' hub layout is fused or has other operations.
STACKED = ("deepseek_v3", "mixtral", "nemotron_h", "qwen3_moe")


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_parameters_are_those_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, for some experts of a layer and for all of another."""
    whole = save(family, dtype, tmp_path, fused=False)
    checkpoint, layers = find(str(tmp_path)), [x.layer for x in expert_layers(whole)]
    keep = {layers[0]: (1, 4, 6), layers[-1]: tuple(range(8))}
    made = load(checkpoint, keep).state_dict()
    stacks = [source for source in _selected(checkpoint, keep).values() if isinstance(source, ExpertStack)]
    assert stacks or family not in STACKED
    monkeypatch.setattr("remoe_cli.model.loader.stack", lambda state, places, probe: state)
    theirs = load(checkpoint, keep).state_dict()
    assert made.keys() == theirs.keys()
    assert all(torch.equal(made[name], theirs[name]) and made[name].dtype == theirs[name].dtype for name in made)


def _selected(checkpoint: Any, keep: dict[int, tuple[int, ...]]) -> dict[str, Any]:
    probe = skeleton(read_config(checkpoint))
    return select(checkpoint, probe, {x.layer: keep.get(x.layer, ()) for x in expert_layers(probe)}, stacked=True)


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Expert 10 comes after expert 9, although its name comes before."""
    config = FAMILIES["mixtral"]()
    config.num_local_experts, config.num_hidden_layers = 12, 1
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.save_pretrained(tmp_path, save_original_format=True)
    part = load(find(str(tmp_path)), {0: (2, 9, 10, 11)})
    mine, full = (expert_layers(model)[0].parameters() for model in (part, whole))
    assert all(torch.equal(mine[name], full[name][[2, 9, 10, 11]]) for name in full)


def test_quantised_experts_are_stacked_as_they_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_quantised("qwen3_moe", "fp8", tmp_path)
    checkpoint = find(str(tmp_path))
    made = load(checkpoint).state_dict()
    monkeypatch.setattr("remoe_cli.model.loader.stack", lambda state, places, probe: state)
    assert all(torch.equal(made[name], tensor) for name, tensor in load(checkpoint).state_dict().items())


def test_experts_of_different_shapes_are_left_to_transformers(tmp_path: Path) -> None:
    save("mixtral", torch.float32, tmp_path, fused=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stacked = {name for name, source in _selected(find(str(tmp_path)), {0: (0, 1), 1: (2, 3)}).items() if isinstance(source, ExpertStack)}
    assert {name.split(".")[2] for name in stacked if "gate_up" in name} == {"0"}
