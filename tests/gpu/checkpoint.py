"""A checkpoint with random weights in the sizes of a real model: what takes time and memory, without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig

from remoe_cli.model.loader import skeleton

# OLMoE-1B-7B: 13.8 GB in bfloat16, of which 12.9 GB are experts.
REAL = OlmoeConfig(dtype="bfloat16", eos_token_id=None)
# The same with a 4,000th of the weights, for machines without a GPU.
SMALL = OlmoeConfig(
    dtype="bfloat16",
    eos_token_id=None,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    vocab_size=512,
)
_POOL = 2**25  # random numbers, drawn once: every tensor is cut out of them at another place


def write(config: OlmoeConfig, folder: Path) -> Path:
    """Write config.json and a safetensors file for each layer, in transformers' own names."""
    folder.mkdir(parents=True)
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, parameter) in enumerate(skeleton(config).state_dict().items()):
        file = f"{'-'.join(name.split('.')[1:3])}.safetensors"
        files.setdefault(file, {})[name] = _cut(pool, parameter.shape, 7919 * number, is_norm="norm" in name)
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _cut(pool: torch.Tensor, shape: torch.Size, start: int, *, is_norm: bool) -> torch.Tensor:
    if is_norm:
        return torch.ones(shape, dtype=pool.dtype)
    start, count = start % (len(pool) // 2), shape.numel()
    piece = pool[start : start + min(count, len(pool) // 2)]
    return piece.repeat(-(-count // len(piece)))[:count].reshape(shape)
