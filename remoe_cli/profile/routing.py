"""Recording which experts each prompt uses, in prefill and in decode.

Prompts run through the model's own `generate` in left-padded batches; the hook keeps the expert ids of every forward
pass and hands the rows on to transformers' own eager experts. What counts is decided afterwards, when it is known which
rows were padding and where each sequence ended: padding and finished sequences leave no trace in the counts.

This module does not know about files, datasets or progress bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.model.experts import ExpertLayer

Ints = npt.NDArray[np.int32]


@dataclass
class RoutingRecorder:
    """A Runner that keeps the ids it sees: `seen[layer]` has one [rows, k] tensor for each forward pass."""

    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.seen.setdefault(layer.layer, []).append(index)
        # The class's forward before transformers decorated it: the eager loop that every family defines.
        eager: Any = type(layer.module).forward
        return eager.__wrapped__(layer.module, hidden, index, weights)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BatchRouting:
    """Routing of B prompts: see profile/record.py for the arrays' meaning. `trace_ids` holds at most `trace` tokens a prompt."""

    prefill_counts: Ints
    decode_counts: Ints
    prompt_tokens: Ints
    decode_tokens: Ints
    trace_ids: npt.NDArray[np.int16]
    trace_prompt: Ints


def record_batch(
    model: PreTrainedModel, recorder: RoutingRecorder, prompts: Sequence[Sequence[int]], experts: int, max_new_tokens: int, trace: int
) -> BatchRouting:
    """Generate greedily from the prompts' token ids and count the experts used; the recorder must be attached to the model."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    recorder.seen.clear()
    with torch.inference_mode():
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            disable_compile=True,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
    decoded = _decode_steps(output[:, length:], model.generation_config.eos_token_id)
    layers = sorted(recorder.seen)
    prefill = np.stack([recorder.seen[x][0].cpu().numpy() for x in layers]).reshape(len(layers), len(prompts), length, -1)
    # [L, steps, B, k]
    steps = np.stack([np.stack([t.cpu().numpy() for t in recorder.seen[x][1:]] or [np.empty((0, 0))]) for x in layers])
    steps = steps.reshape(len(layers), -1, len(prompts), prefill.shape[-1]).astype(np.int64)
    recorder.seen.clear()
    kept = mask.numpy().astype(bool)
    alive = np.arange(steps.shape[1])[:, None] < decoded[None, :]  # [steps, B]
    trace_mask = alive & (np.arange(steps.shape[1])[:, None] < trace)
    order = [(s, b) for b in range(len(prompts)) for s in range(steps.shape[1]) if trace_mask[s, b]]
    traced = np.array([steps[:, s, b] for s, b in order], dtype=np.int16).reshape(len(order), len(layers), prefill.shape[-1])
    return BatchRouting(
        prefill_counts=np.stack([_count(prefill[:, b, kept[b]], experts) for b in range(len(prompts))]),
        decode_counts=np.stack([_count(steps[:, alive[:, b], b], experts) for b in range(len(prompts))]),
        prompt_tokens=np.array([len(p) for p in prompts], dtype=np.int32),
        decode_tokens=decoded.astype(np.int32),
        trace_ids=np.where((traced >= 0) & (traced < experts), traced, -1).astype(np.int16),
        trace_prompt=np.array([b for _, b in order], dtype=np.int32),
    )


def _decode_steps(generated: Tensor, eos: int | list[int] | None) -> npt.NDArray[np.int64]:
    """Single-token forward passes that belong to each sequence: N tokens up to its end take N - 1 of them."""
    ends = torch.isin(generated, torch.tensor([eos] if isinstance(eos, int) else eos or [-1]))
    first_end = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), generated.shape[1] - 1)
    return first_end.numpy().astype(np.int64)


def _count(ids: npt.NDArray[np.int64], experts: int) -> Ints:
    """ids [L, tokens, k] -> counts [L, experts]; ids outside 0..experts-1 mean "no expert"."""
    return np.stack([np.bincount(x[(x >= 0) & (x < experts)].ravel(), minlength=experts) for x in ids.astype(np.int64)]).astype(np.int32)


def prompt_vector(embeddings: Tensor, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Sum of the L2-normalised embeddings of a prompt's tokens, [d]; its cosines are the paper's SCS (method section 5)."""
    rows = embeddings[torch.tensor(list(ids), dtype=torch.long)].float()
    total: npt.NDArray[np.float32] = torch.nn.functional.normalize(rows, dim=1).sum(dim=0).numpy()
    return total
