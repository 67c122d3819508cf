"""What several tests share: experts served in this process by the function's own code, and reference generations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.function.expert_ffn import Expert, FfnSpec
from remoe_cli.model.experts import Attachment, ExpertLayer, attach, expert_layers, run_experts
from remoe_cli.model.ffn import describe, from_storage, to_storage

PROMPT = torch.arange(1, 41).reshape(2, 20)


class InProcessExperts:
    """Answers as expert functions would, frames and base64 included, from the weights of a whole model."""

    def __init__(self, whole: PreTrainedModel) -> None:
        self._layers = {x.layer: x for x in expert_layers(whole)}
        self._ready: dict[tuple[int, int], Expert] = {}
        self.rows = 0

    def _expert(self, layer: int, expert: int) -> Expert:
        if (layer, expert) not in self._ready:
            source = self._layers[layer]
            # Through JSON, as in a shard's header.
            spec = FfnSpec(**json.loads(json.dumps(asdict(describe(source)))))
            self._ready[layer, expert] = Expert.of({n: to_storage(p[expert]) for n, p in source.parameters().items()}, spec)
        return self._ready[layer, expert]

    def send(self, layer: ExpertLayer, rows: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        dtype = next(iter(rows.values())).dtype
        arrays = {e: to_storage(x) for e, x in rows.items()}
        sent = Batch(
            str(dtype).removeprefix("torch."), tuple(arrays), tuple(map(len, arrays.values())), np.concatenate(list(arrays.values()))
        )
        batch = unpack(from_wire(to_wire(pack(sent))))
        self.rows += len(batch.data)
        ends = np.cumsum(batch.rows)
        parts = {
            e: self._expert(layer.layer, e).run(batch.data[end - n : end])
            for e, n, end in zip(batch.experts, batch.rows, ends, strict=True)
        }
        return lambda: {e: from_storage(part, dtype) for e, part in parts.items()}


def serve(model: PreTrainedModel, local: dict[int, tuple[int, ...]], remote: Any) -> Attachment:
    """Attach to a model that holds the experts `local`; the others go to `remote`."""
    rows = {layer: {e: i for i, e in enumerate(experts)} for layer, experts in local.items()}
    return attach(model, lambda layer, hidden, index, weights: run_experts(layer, hidden, index, weights, rows[layer.layer], remote))


def greedy(model: PreTrainedModel, tokens: int = 16) -> Tensor:
    with torch.inference_mode():
        output: Any = model.generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=tokens,
            do_sample=False,
            disable_compile=True,
            pad_token_id=0,
        )
    return output  # type: ignore[no-any-return]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT).logits.float()  # type: ignore[no-any-return]


def clear_steps(logits: Tensor) -> Tensor:
    """Where the two best logits [..., V] differ by more than two steps of bfloat16."""
    best = logits.topk(2).values
    step = torch.exp2(best[..., 0].abs().clamp_min(2.0**-20).log2().floor() - 7)
    return best[..., 0] - best[..., 1] > 2 * step
