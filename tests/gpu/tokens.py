"""Tiny models of six families with half of their experts in workers: the greedy tokens, copies and waits of each.

The reference is plain transformers on the same devices: all but the experts on the GPU, the experts where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_cli import cages
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from tests.gpu.measure import copies_and_waits
from tests.gpu.row import Row, at_most
from tests.support.families import save
from tests.support.harness import PROMPT, greedy
from tests.support.split import split_model

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoeshared")
NEW_TOKENS = 32


def rows(device: str, folder: Path) -> Iterator[Row]:
    """Two and three tiers of each family: of every layer's eight experts the odd ones are in functions."""
    for family in FAMILIES:
        save(family, torch.float32, folder / family / "model", fused=False)
        checkpoint = find(str(folder / family / "model"))
        whole = AutoModelForCausalLM.from_pretrained(checkpoint.path, experts_implementation="eager")
        layers = [layer.layer for layer in expert_layers(whole)]
        expected = greedy(_on_devices(whole, device), NEW_TOKENS).cpu()
        for tiers, on_gpu in (("CPU and functions", ()), ("GPU, CPU and functions", (0, 4))):
            local = dict.fromkeys(layers, tuple(e for e in (0, 2, 4, 6) if e not in on_gpu))
            gpu, parts = dict.fromkeys(layers, on_gpu), dict.fromkeys(layers, ((1, 3, 5, 7),))
            probed = cages.probe(f"remoe-gpu-{family.replace('_', '-')}")
            with split_model(checkpoint, local, parts, folder / family / str(len(on_gpu)), probed, gpu=gpu, device=device) as (split, _):
                same = torch.equal(greedy(split, NEW_TOKENS).cpu(), expected)
                yield Row(f"{family}: tokens, {tiers}", "equal" if same else "differ", "equal", same)
                if device == "cuda":
                    yield from _counted(split, f"{family}, {tiers}", len(layers))


def _counted(model: PreTrainedModel, what: str, layers: int) -> Iterator[Row]:
    with torch.inference_mode():
        cache = model(input_ids=PROMPT[:1].to(model.device), use_cache=True).past_key_values
    copies, waits = copies_and_waits(model, PROMPT[:1, :1].to(model.device), cache)
    yield at_most(f"{what}: copies a layer and step", copies / layers, 2)
    yield at_most(f"{what}: synchronisations a layer and step", waits / layers, 1)


def _on_devices(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Plain transformers with its experts on the CPU, and all else on the device."""
    model.to(device)
    for layer in expert_layers(model):
        layer.module.to("cpu")
        layer.module.register_forward_pre_hook(lambda _, arguments: tuple(each.cpu() for each in arguments))
        layer.module.register_forward_hook(lambda _, __, out: out.to(device))
    return model
