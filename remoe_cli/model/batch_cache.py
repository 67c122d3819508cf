"""Caches of several sequences in one, so that one forward pass makes the next token of each.

A prompt is read with a cache of its own. Then its rows join the batch's cache: layer by layer along the batch, with padding on the left
where a layer holds one entry for each token. This works for all of transformers' layers that have nothing of the whole batch in them:
keys and values, sliding windows, latent attention, and states of linear attention. Families with other layers are served one request at a
time (`joinable`): those with a sparse attention's indexer chose other tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

_OF_TOKENS = ("keys", "values")  # of a layer: [rows, heads, tokens, width]
_JOINABLE = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}


_CROPPABLE = {DummyLayer, DynamicLayer, DynamicSlidingWindowLayer}

# Families with states of linear attention that read a prompt in parts and make the same of it. Others, such as jamba, begin anew.
_CONTINUED = {"lfm2_moe", "nemotron_h", "qwen3_next"}


def joinable(cache: Any) -> bool:
    """Tell whether this module can join caches like this one."""
    return type(cache) is DynamicCache and all(type(layer) in _JOINABLE for layer in cache.layers)


def can_continue(model: PreTrainedModel, cache: Any) -> bool:
    """Tell whether a model can read a prompt in parts with such a cache."""
    if not joinable(cache):
        return False
    states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    return not states or model.config.model_type in _CONTINUED


def croppable(cache: Any) -> bool:
    """Tell whether such a cache can take tokens back that it has read; a state of linear attention cannot."""
    return joinable(cache) and all(type(layer) in _CROPPABLE for layer in cache.layers)


def takes_drafts(model: PreTrainedModel) -> bool:
    """Tell whether a pass of the model may take draft tokens: what is wrong of them can be taken back."""
    return croppable(DynamicCache(config=model.config.get_text_config(decoder=True)))


def remember(cache: Cache, *, all_tokens: bool) -> None:
    """Let sliding windows keep what they would forget in the next pass, so that `crop` finds it, or not."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = all_tokens


def crop(cache: Cache, rows: Sequence[int], dropped: Sequence[int], tokens: int) -> None:
    """Keep some rows of a cache without their last tokens.

    The longest of them has then read so many `tokens`. Each row ends where its own tokens end, so all of them are padded on the left again.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            length = _held(layer, tokens)
            for name in _OF_TOKENS:
                held: Tensor = getattr(layer, name)
                ends = [held.shape[-2] - count for count in dropped]
                kept = [held[row : row + 1].narrow(-2, max(0, end - length), min(end, length)) for row, end in zip(rows, ends, strict=True)]
                setattr(layer, name, kept[0] if len(kept) == 1 else torch.cat([_padded(each, length) for each in kept]))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = tokens


def join(cache: Cache, tokens: int, other: Cache, other_tokens: int) -> None:
    """Add the rows of another cache, which is used up, to a cache.

    `tokens` and `other_tokens` are how many tokens they have read.
    """
    longest = max(tokens, other_tokens)
    for mine, new in zip(cache.layers, other.layers, strict=True):
        if isinstance(mine, DynamicLayer) and mine.is_initialized:
            for name in _OF_TOKENS:
                most = _held(mine, longest)
                setattr(mine, name, torch.cat([_padded(getattr(layer, name), most) for layer in (mine, new)]))
                setattr(new, name, None)
            if isinstance(mine, DynamicSlidingWindowLayer):
                mine.cumulative_length = longest
        if isinstance(mine, LinearAttentionCacheLayerMixin):
            for states, others in ((mine.conv_states, new.conv_states), (mine.recurrent_states, new.recurrent_states)):
                states.update({at: torch.cat([state, others[at]]) for at, state in states.items() if state is not None})


def keep(cache: Cache, rows: Sequence[int], tokens: int) -> None:
    """Keep some rows of a cache; the longest of them has read so many tokens."""
    for layer in cache.layers:
        # Not before the layer has keys: transformers looks for them.
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            index = torch.tensor(rows, device=layer.keys.device)
            for name in _OF_TOKENS:
                held: Tensor = getattr(layer, name)
                length = _held(layer, tokens)
                setattr(layer, name, held.narrow(-2, held.shape[-2] - length, length).index_select(0, index))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = tokens
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                for at, state in states.items():
                    states[at] = None if state is None else state.index_select(0, torch.tensor(rows, device=state.device))


def _held(layer: Any, tokens: int) -> int:
    """Return how many of the tokens that a layer has read it still holds."""
    return min(tokens, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else tokens


def _padded(held: Tensor, length: int) -> Tensor:
    missing = length - held.shape[-2]
    return held if missing <= 0 else torch.cat([held.new_zeros((*held.shape[:-2], missing, held.shape[-1])), held], dim=-2)
