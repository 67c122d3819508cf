"""Tiny assistants: random models with the vocabulary of the tiny families, and such a family itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from remoe_cli.model.assistant import Assistant, load_assistant
from remoe_cli.model.checkpoint import Checkpoint
from tests.support.families import VOCAB_SIZE, build

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def save_dense(folder: Path, **update: Any) -> Path:
    """Write a random model without experts, whose logits are far apart."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**DENSE | update))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter
    model.save_pretrained(folder)
    return folder


@cache
def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of a tiny family, or of a random model without experts (`dense`)."""
    folder = Path(mkdtemp(prefix="remoe-test-assistant-"))
    if name == "dense":
        save_dense(folder)
    else:
        build(name).save_pretrained(folder)
    return Checkpoint(name, folder)


@cache
def assistant_of(name: str) -> Assistant:
    """The same, loaded."""
    return load_assistant(checkpoint_of(name), VOCAB_SIZE)


def nothing_found(tokens: Sequence[int], most: int) -> list[int]:
    """A lookup (model/draft.py) that never finds anything."""
    return []
