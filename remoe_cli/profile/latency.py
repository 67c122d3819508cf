"""Measuring, on this machine, the times that the cost model needs (method section 2).

Every figure is a median over repetitions, fitted as fixed + per token. The main process's experts and the function's
are measured apart, because their arithmetic differs; the function's run in a process of their own, with one thread, as
they will in the function.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.errors import ModelError
from remoe_cli.model.experts import Attachment, ExpertLayer, attach, run_expert, run_experts
from remoe_cli.model.shards import write_shard
from remoe_cli.profile.record import Latency, Linear

_TOKENS = (1, 4, 16, 64, 256)
_PROMPT_TOKENS = (16, 64, 192)
_REPEAT_S = 0.25


def measure(model: PreTrainedModel, load_s: float) -> Latency:
    """Measure everything; replaces what is attached to the model's hook. Takes a few seconds."""
    attachment = attach(model, _without_experts)
    with torch.inference_mode():
        prefill = fit(_PROMPT_TOKENS, [_forward_s(model, n, cached=0) for n in _PROMPT_TOKENS])
        decode_s = _forward_s(model, 1, cached=64)
        local = fit(_TOKENS, [_local_expert_s(attachment, n) for n in _TOKENS])
    return Latency(
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        measured_on=date.today().isoformat(),
        main_vcpus=torch.get_num_threads(),
        nonexpert_prefill=prefill,
        nonexpert_decode_s=decode_s,
        local_expert=local,
        remote_expert=_function_expert(attachment.layers[0]),
        load_s=load_s,
    )


def fit(tokens: tuple[int, ...], seconds: list[float]) -> Linear:
    """Least squares on relative error of fixed + per_token * n, both at least zero."""
    n, t = np.array(tokens, dtype=float), np.array(seconds)
    a = np.stack([1 / t, n / t], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(a, np.ones(len(t)), rcond=None)
    if fixed < 0:
        fixed, slope = 0.0, float((a[:, 1] @ np.ones(len(t))) / (a[:, 1] @ a[:, 1]))
    elif slope < 0:
        fixed, slope = float((a[:, 0] @ np.ones(len(t))) / (a[:, 0] @ a[:, 0])), 0.0
    return Linear(fixed_s=float(fixed), per_token_s=float(slope))


def _median_s(work: Callable[[], object]) -> float:
    """Median time of `work` over about a quarter second, at least three times, after one warm-up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _REPEAT_S:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _without_experts(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The hook's own work with experts that cost nothing, so that grouping and adding count as non-expert time."""
    return run_experts(layer, hidden, index, weights, {}, lambda _, rows: lambda: rows)


def _forward_s(model: PreTrainedModel, tokens: int, cached: int) -> float:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, cached + tokens), generator=generator)
    if not cached:
        return _median_s(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    cache = model(input_ids=ids[:, :cached], use_cache=True, logits_to_keep=1).past_key_values
    return _median_s(lambda: model(input_ids=ids[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1))


def _local_expert_s(attachment: Attachment, tokens: int) -> float:
    layers = attachment.layers
    dtype = next(iter(layers[0].parameters().values())).dtype
    x = torch.randn((tokens, layers[0].width), generator=torch.Generator().manual_seed(0)).to(dtype)
    turn = iter(range(1 << 30))

    def one() -> Tensor:
        # Another expert each time, so that weights come from memory as they do in real decoding.
        i = next(turn)
        layer = layers[i % len(layers)]
        return run_expert(layer, (i // len(layers)) % layer.experts, x)

    return _median_s(one)


def _function_expert(layer: ExpertLayer) -> Linear:
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "layer.safetensors"
        write_shard(shard, layer, range(layer.experts))
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "remoe_cli.profile.function_timing", str(shard), *map(str, _TOKENS)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise ModelError(
            f"The function's arithmetic cannot be timed: {(run.stderr.strip().splitlines() or ['it said nothing'])[-1]}", "Run 'pip check'."
        )
    return fit(_TOKENS, json.loads(run.stdout))
