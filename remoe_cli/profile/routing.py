"""Recording which experts each prompt uses, in prefill and in decode.

Prompts run through the model's own `generate` in left-padded batches. The hook keeps references to the expert ids of every forward pass,
and passes the rows on to transformers' own eager experts. What counts is decided afterwards, when it is known which rows were padding and
where each sequence ended: padding and finished sequences do not enter the counts.

Experts run in eager mode, not in transformers' default (grouped_mm), because serving adds outputs in eager's order. In bfloat16 the other
order of sums sometimes picks another token. On a CPU eager is not slower (docs/measure/recording.py measures both).

Files, datasets and progress are not known here.
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
from transformers.generation.stopping_criteria import StoppingCriteriaList

from remoe_cli.model.assistant import Assistant
from remoe_cli.model.batch_cache import takes_drafts
from remoe_cli.model.exchange import Exchange
from remoe_cli.model.experts import ExpertLayer, run_experts
from remoe_cli.model.generation import StopStrings
from remoe_cli.profile.acceptance import answer_passes, assisted_passes

Ints = npt.NDArray[np.int32]


@dataclass
class RoutingRecorder:
    """A Runner that keeps the ids it sees: `seen[layer]` has one [rows, k] tensor for each pass."""

    seen: dict[int, list[Tensor]] = field(default_factory=dict)
    _exchange: Exchange = field(default_factory=Exchange)

    def __call__(self, layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.seen.setdefault(layer.layer, []).append(index)
        if layer.is_blocked or next(iter(layer.parameters().values())).device != hidden.device:
            return run_experts(layer, hidden, index, weights, {e: e for e in range(layer.experts)}, lambda *_: dict, self._exchange)
        # The class's forward before transformers decorated it: the eager loop that every family, or its adapter, defines.
        eager: Any = type(layer.module).forward
        return getattr(eager, "__wrapped__", eager)(layer.module, hidden, index, weights)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BatchRouting:
    """The routing of a batch of prompts; profile/record.py explains the arrays."""

    prefill_counts: Ints
    decode_counts: Ints
    prompt_tokens: Ints
    decode_tokens: Ints
    trace_ids: npt.NDArray[np.int16]
    trace_prompt: Ints
    draft_passes: Ints | None = None
    assisted_passes: Ints | None = None
    assistant_tokens: Ints | None = None


def record_batch(
    model: PreTrainedModel,
    recorder: RoutingRecorder,
    prompts: Sequence[Sequence[int]],
    experts: int,
    max_new_tokens: int,
    trace: int,
    stop: StopStrings | None = None,
    assistant: Assistant | None = None,
) -> BatchRouting:
    """Generate greedily from the prompts' token ids, and count the experts in use.

    The recorder must be attached to the model. At most `trace` tokens of each prompt are traced. `stop` ends answers at stop strings.
    An `assistant` says what it would have drafted, where the model takes drafts.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    recorder.seen.clear()
    with torch.inference_mode():
        output: Any = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            disable_compile=True,
            pad_token_id=model.generation_config.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([stop.begin(len(prompts), length)] if stop else []),
        )
    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else eos or []
    answers = output[:, length:].cpu()
    decoded = _decode_steps(answers, ends)
    if stop is not None:
        stopped = stop.ends.numpy()
        decoded = np.where(stopped > 0, np.minimum(decoded, stopped - length - 1), decoded)
    passes = [recorder.seen[layer] for layer in sorted(recorder.seen)]
    # [L, B, tokens, k] both
    prefill = np.stack([seen[0].reshape(len(prompts), length, -1).cpu().numpy() for seen in passes])
    steps = np.stack([_stacked(seen[1:], like=seen[0], batch=len(prompts)).cpu().numpy() for seen in passes])
    recorder.seen.clear()
    step = np.arange(steps.shape[2])
    alive = step < decoded[:, None]  # [B, steps]
    traced = alive & (step < trace)
    trace_ids = steps.transpose(1, 2, 0, 3)[traced]
    made = [answer[: count + 1].tolist() for answer, count in zip(answers.numpy(), decoded.tolist(), strict=True)]
    drafted = _drafted(prompts, made, max_new_tokens, ends, assistant) if takes_drafts(model) else {}
    return BatchRouting(
        prefill_counts=_counts(prefill, mask.numpy().astype(bool), experts),
        decode_counts=_counts(steps, alive, experts),
        prompt_tokens=np.array([len(p) for p in prompts], dtype=np.int32),
        decode_tokens=decoded.astype(np.int32),
        trace_ids=np.where((trace_ids >= 0) & (trace_ids < experts), trace_ids, -1).astype(np.int16),
        trace_prompt=np.nonzero(traced)[0].astype(np.int32),
        **drafted,
    )


def _drafted(
    prompts: Sequence[Sequence[int]], answers: Sequence[list[int]], most: int, ends: Sequence[int], assistant: Assistant | None
) -> dict[str, Ints]:
    """Count the passes that answers would have taken with drafts (acceptance.py)."""
    pairs = [*zip(prompts, answers, strict=True)]
    found = {"draft_passes": np.stack([answer_passes(prompt, answer, most, ends) for prompt, answer in pairs])}
    if assistant is None:
        return found
    with torch.inference_mode():
        guessed = [assistant.guesses([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
    each = [
        assisted_passes(prompt, answer, most, ends, guesses, assistant.positions)
        for (prompt, answer), guesses in zip(pairs, guessed, strict=True)
    ]
    passes, tokens = zip(*each, strict=True)
    return found | {"assisted_passes": np.stack(passes), "assistant_tokens": np.stack(tokens)}


def _stacked(passes: Sequence[Tensor], like: Tensor, batch: int) -> Tensor:
    """Stack the ids of single-token passes to [B, steps, k]; without a pass [B, 0, k]."""
    return torch.stack(list(passes), dim=1) if passes else like.new_empty((batch, 0, like.shape[-1]))


def _decode_steps(generated: Tensor, eos: list[int]) -> npt.NDArray[np.int64]:
    """Count the single-token passes of each sequence: N tokens up to its end take N - 1 of them."""
    ends = torch.isin(generated, torch.tensor(eos or [-1]))
    first_end = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), generated.shape[1] - 1)
    return first_end.numpy().astype(np.int64)


def _counts(ids: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_], experts: int) -> Ints:
    """Count the ids of valid tokens; ids outside 0 to experts - 1 mean "no expert".

    Shapes: ids [L, B, tokens, k], valid [B, tokens]; returns [B, L, experts].
    """
    layers, batch = ids.shape[:2]
    cell = np.arange(batch)[:, None, None] * layers + np.arange(layers)[:, None, None, None]
    kept = valid[:, :, None] & (ids >= 0) & (ids < experts)
    counts = np.bincount((cell * experts + ids)[kept], minlength=batch * layers * experts)
    return counts.reshape(batch, layers, experts).astype(np.int32)
