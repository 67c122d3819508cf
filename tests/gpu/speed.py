"""One placement of a model with random weights, in a process of its own: times and memory, as one JSON document.

python -m tests.gpu.speed FOLDER CHECKPOINT DEVICE PLACEMENT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from remoe_cli import cages
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from tests.gpu.measure import answer_s, resident_bytes

PROMPT_TOKENS, NEW_TOKENS = 64, 24
FUNCTION_MB = 3008
# Of each layer's experts the share on the GPU, on the CPU beside it, and in functions. None: transformers' own offloading, which has as
# much GPU memory as the last placement.
PLACEMENTS: dict[str, tuple[float, float, float] | None] = {
    "CPU": (0.0, 1.0, 0.0),
    "CPU and functions": (0.0, 0.5, 0.5),
    "GPU, CPU and functions": (0.5, 0.25, 0.25),
    "transformers' offloading": None,
}


def measured(folder: Path, checkpoint_path: str, device: str, placement: str) -> dict[str, Any]:
    from tests.support.split import split_model

    checkpoint = find(checkpoint_path)
    spec, shares = read_spec(checkpoint), PLACEMENTS[placement]
    if shares is None:
        return _offloaded(checkpoint_path, spec.nonexpert_bytes + spec.routed_bytes // 2)
    experts = spec.experts_per_layer
    first, second = round(shares[0] * experts), round((shares[0] + shares[1]) * experts)
    gpu, local, remote = (tuple(range(a, b)) for a, b in ((0, first), (first, second), (second, experts)))
    layers = spec.moe_layers
    before = resident_bytes("RssAnon")
    with split_model(
        checkpoint,
        dict.fromkeys(layers, local),
        dict.fromkeys(layers, (remote,)) if remote else {},
        folder,
        cages.probe("remoe-gpu-speed"),
        memory_mb=FUNCTION_MB,
        gpu=dict.fromkeys(layers, gpu),
        device=device,
    ) as (model, _):
        loaded = resident_bytes("RssAnon")
        ttft_s, tpot_s = answer_s(model, PROMPT_TOKENS, NEW_TOKENS)
    return {
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "host_bytes": loaded - before,
        "host_expected_bytes": len(local) * len(layers) * spec.expert_bytes + (0 if device == "cuda" else spec.nonexpert_bytes),
        "device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "device_expected_bytes": spec.nonexpert_bytes + len(gpu) * len(layers) * spec.expert_bytes,
        "token_bytes": spec.nonexpert_bytes + spec.top_k * len(layers) * spec.expert_bytes,
    }


def _offloaded(checkpoint_path: str, device_bytes: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_path, dtype=torch.bfloat16, device_map="auto", max_memory={0: device_bytes, "cpu": "110GiB"}
    )
    ttft_s, tpot_s = answer_s(model, PROMPT_TOKENS, NEW_TOKENS)
    return {"ttft_s": ttft_s, "tpot_s": tpot_s, "device_bytes": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), *sys.argv[2:])))
