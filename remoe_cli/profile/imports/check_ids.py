"""Checks of the expert ids of single tokens against the model's sizes.

Ids may miss whole tokens: -1, or with more than one expert a token 0, in every slot of every recorded layer. Servers mark tokens so that
a prefix cache answered, or whose routing they lost. They count for the lengths and not for the routing.

Source: vllm-project/tpu-inference, pull request 3583 (zeros for tokens of a prompt); sgl-project/sglang, python/sglang/srt/eplb/
expert_distribution.py (-1 where nothing was recorded).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import (
    MAX,
    Array,
    Bools,
    CheckedRouting,
    Counts,
    Ints,
    PlacedLayers,
    TracedRouting,
    check_size,
    chunks,
    not_empty,
    place_layers,
    refuse,
    unrecorded_remark,
    whole,
)
from remoe_cli.profile.record import TRACE_TOKENS, Phase

_MOST_TOKENS = 2**24  # of a file; beside their ids they take 0.75 GB


def traced_rows(found: TracedRouting, spec: MoeSpec, where: str) -> CheckedRouting:
    """Check and count ids, and keep those of some tokens, evenly chosen.

    Decode tokens are kept if there are any, else prompt tokens.

    Raises: UsageError with the first token that does not fit the model.
    """
    ids, top_k, name = found.ids, spec.top_k, f"{where}: ids"
    if ids.ndim != 3:
        raise refuse(name, f"it has shape {ids.shape}, and [tokens, layers, top-k] is needed")
    if ids.shape[2] != top_k:
        raise refuse(name, f"it has {ids.shape[2]} experts a token, and the model chooses {top_k}")
    all_layers = place_layers(ids.shape[1], found.layers, spec, name)
    if len(ids) > _MOST_TOKENS:
        raise refuse(name, f"it has {len(ids):,} tokens, and {_MOST_TOKENS:,} is the most", "Import fewer tokens.")
    offsets = _offsets(found.offsets, len(ids), where)
    check_size(len(offsets) - 1, spec, where)
    lengths = np.diff(offsets)
    prompt = _prompt_tokens(found.prompt_tokens, lengths, where)
    layers = all_layers.only(_recorded(ids, all_layers, spec, name), spec.moe_layers)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    early = _early(offsets, prompt, len(ids))
    missing = np.zeros(len(ids), dtype=np.bool_)
    counts: dict[Phase, Counts] = {}
    for part, numbers in _parts(ids, layers, name):
        missing[part] = (numbers == -1).all(axis=(1, 2)) | ((numbers == 0).all(axis=(1, 2)) & (top_k > 1))
        _check_ids(numbers, missing[part], spec.experts_per_layer, name, [spec.moe_layers[p] for p in layers.places], part.start)
        for phase, chosen in _by_phase(early[part], missing[part]).items():
            if chosen.any():
                if phase not in counts:
                    counts[phase] = np.zeros((len(lengths), len(spec.moe_layers), spec.experts_per_layer), dtype=np.int32)
                _count(numbers[chosen], owner[part][chosen], layers.places, counts[phase])
    counts = {phase: counts[phase] for phase in _by_phase(early, missing) if phase in counts}
    tokens = {phase: prompt if phase == "prefill" else lengths - prompt for phase in counts}
    not_empty({phase: array.sum(axis=(1, 2), dtype=np.int64) for phase, array in counts.items()}, where)
    traced: Phase = "decode" if "decode" in counts else "prefill"
    picked = _pick(np.flatnonzero(_by_phase(early, missing)[traced]), owner, len(lengths))
    trace = np.full((len(picked), len(spec.moe_layers), top_k), -1, dtype=np.int16)
    trace[:, layers.places] = ids[picked][:, layers.kept]
    remarks = unrecorded_remark(where, all_layers, layers, spec)
    if missing.any():
        remarks += (f"{where}: {int(missing.sum()):,} of {len(ids):,} tokens have no routing; they count for the lengths alone.",)
    return CheckedRouting(counts, tokens, trace, owner[picked].astype(np.int32), traced, layers.held, remarks)


def _early(offsets: Ints, prompt: Ints, tokens: int) -> Bools:
    """Tell for each token whether it is of its row's prompt."""
    change = np.zeros(tokens + 1, dtype=np.int8)  # +1 where a prompt begins, -1 where it ends
    begins = offsets[:-1][prompt > 0]
    change[begins] += 1
    change[begins + prompt[prompt > 0]] -= 1
    early: Bools = np.cumsum(change, dtype=np.int8)[:-1] > 0
    return early


def _by_phase(early: Bools, missing: Bools) -> dict[Phase, Bools]:
    return {"prefill": early & ~missing, "decode": ~early & ~missing}


def _prompt_tokens(stated: Array | None, lengths: Ints, where: str) -> Ints:
    if stated is None:
        return lengths
    if stated.shape != lengths.shape:
        raise refuse(where, f"{len(lengths)} sequences have prompt lengths of shape {stated.shape}")
    prompt: Ints = whole(stated, f"{where}: prompt tokens").astype(np.int64)
    if (prompt > lengths).any():
        row = int((prompt > lengths).argmax())
        raise refuse(f"{where}: ids, row {row}", f"{prompt[row]} prompt tokens are more than its {lengths[row]} tokens")
    return prompt


def _parts(ids: Array, layers: PlacedLayers, name: str) -> Iterator[tuple[slice, npt.NDArray[np.int32]]]:
    """Yield the ids of the layers part by part, as whole numbers."""
    for part in chunks(len(ids), ids[:1].size):
        yield part, whole(ids[part][:, layers.kept], name, -1, part.start).astype(np.int32)


def _recorded(ids: Array, layers: PlacedLayers, spec: MoeSpec, name: str) -> Bools:
    """Tell for each MoE layer whether the file has its routing.

    It has none where the layer has no id but -1, or the same id for every token in every slot. With one expert a token the same id may
    be routing, unless it is 0.

    Raises: UsageError when no layer has any.
    """
    recorded = np.zeros(len(spec.moe_layers), dtype=np.bool_)
    low, high = np.full(len(layers.kept), MAX), np.full(len(layers.kept), -1)
    for _, numbers in _parts(ids, layers, name):
        low = np.minimum(low, np.where(numbers < 0, MAX, numbers).min(axis=(0, 2)))
        high = np.maximum(high, numbers.max(axis=(0, 2)))
    recorded[layers.places] = (high >= 0) & ((low < high) | ((high > 0) & (spec.top_k == 1)))
    if len(ids) and not recorded.any():
        hint = "Record routing again: vLLM needs --enable-return-routed-experts, and SGLang return_routed_experts in each request."
        raise refuse(name, "all layers have the same ids for every token, so it holds no routing", hint)
    return recorded | (not len(ids))


def _offsets(offsets: Array, tokens: int, where: str) -> Ints:
    name = f"{where}: seq_offsets"
    if offsets.ndim != 1 or len(offsets) < 2:
        raise refuse(name, f"it has shape {offsets.shape}, and one more number than sequences is needed")
    checked: Ints = whole(offsets, name).astype(np.int64)
    if checked[0] != 0 or checked[-1] != tokens:
        raise refuse(name, f"it goes from {checked[0]} to {checked[-1]}, and the tokens from 0 to {tokens}")
    if (np.diff(checked) < 0).any():
        raise refuse(f"{name}[{int((np.diff(checked) < 0).argmax()) + 1}]", "it is less than the one before")
    return checked


def _check_ids(ids: npt.NDArray[np.int32], missing: Bools, experts: int, name: str, layers: list[int], first: int) -> None:
    wrong = (ids >= experts) | ((ids < 0) & ~missing[:, None, None])
    if wrong.any():
        token, layer, slot = (int(x[0]) for x in np.nonzero(wrong))
        what = f"layer {layers[layer]} has expert {ids[token, layer, slot]}, and ids go from 0 to {experts - 1}"
        raise refuse(f"{name}[{token + first}]", what)
    ordered = np.sort(ids, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & ~missing[:, None, None]
    if twice.any():
        token, layer, slot = (int(x[0]) for x in np.nonzero(twice))
        raise refuse(f"{name}[{token + first}]", f"layer {layers[layer]} has expert {ordered[token, layer, slot]} twice")


def _count(ids: npt.NDArray[np.int32], owner: npt.NDArray[np.int32], places: list[int], counts: Counts) -> None:
    """Add the tokens' ids to the counts of their rows, which ascend: counts [P, L, E]."""
    first, last, experts = owner[0], owner[-1] + 1, counts.shape[2]
    for index, place in enumerate(places):
        flat = (owner - first)[:, None] * experts + ids[:, index]
        counts[first:last, place] += np.bincount(flat.ravel(), minlength=(last - first) * experts).reshape(-1, experts)


def _pick(tokens: Ints, owner: npt.NDArray[np.int32], rows: int) -> Ints:
    """Pick at most TRACE_TOKENS / rows tokens of each row, evenly spaced."""
    most = max(1, TRACE_TOKENS // rows)
    size = np.bincount(owner[tokens], minlength=rows)
    kept = np.minimum(size, most)
    row = np.repeat(np.arange(rows), kept)
    number = np.arange(len(row)) - (np.cumsum(kept) - kept)[row]
    # Of `size` tokens the ones at which rank * kept / size reaches its next whole number: exactly `kept` of them.
    rank = -(-number * size[row] // kept[row])
    picked: Ints = tokens[(np.cumsum(size) - size)[row] + rank]
    return picked
