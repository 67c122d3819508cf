"""Checks of counts against the model's sizes.

Counts must be exactly tokens times top-k in every recorded layer: counts of a model that skips slots look the same as damaged ones, so
they are refused.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.imports.checks import (
    MAX,
    Array,
    Bools,
    CheckedRouting,
    CountedRouting,
    Counts,
    Ints,
    PlacedLayers,
    check_size,
    chunks,
    not_empty,
    place_layers,
    refuse,
    unrecorded_remark,
    whole,
)
from remoe_cli.profile.record import Phase


def counted_rows(found: CountedRouting, spec: MoeSpec, where: str) -> CheckedRouting:
    """Check counts and spread them over all MoE layers.

    Counts without a phase are taken as those of prompts.

    Raises: UsageError with the first row that does not fit the model, or whose sums do not fit each other.
    """
    names = {key: f"{where}: {key}_counts" if key else f"{where}: counts" for key in found.counts}
    placed = {key: _placed(array, found.layers, spec, names[key]) for key, array in found.counts.items()}
    recorded = np.zeros(len(spec.moe_layers), dtype=np.bool_)
    for key, array in found.counts.items():
        for part in chunks(len(array), array[:1].size):
            recorded[placed[key].places] |= array[part][:, placed[key].kept].any(axis=(0, 2))
    recorded |= not recorded.any()  # without any routing the first row is refused
    all_counts: dict[Phase, Counts] = {}
    all_tokens: dict[Phase, Ints] = {}
    for key, array in found.counts.items():
        counts, tokens = _checked(array, found.tokens.get(key), placed[key], recorded, spec, names[key])
        all_counts[key or "prefill"], all_tokens[key or "prefill"] = counts, tokens
    if len({len(tokens) for tokens in all_tokens.values()}) > 1:
        raise refuse(where, "prefill and decode differ in their rows")
    not_empty(all_tokens, where)
    nothing = np.empty((0, len(spec.moe_layers), spec.top_k), dtype=np.int16)
    before = next(iter(placed.values()))
    after = before.only(recorded, spec.moe_layers)
    remarks = unrecorded_remark(where, before, after, spec)
    return CheckedRouting(all_counts, all_tokens, nothing, np.empty(0, dtype=np.int32), None, after.held, remarks)


def _placed(array: Array, layers: tuple[int, ...] | None, spec: MoeSpec, name: str) -> PlacedLayers:
    if array.ndim != 3:
        raise refuse(name, f"it has shape {array.shape}, and [rows, layers, experts] is needed")
    if array.shape[2] != spec.experts_per_layer:
        raise refuse(name, f"it has {array.shape[2]} experts a layer, and the model has {spec.experts_per_layer}")
    placed = place_layers(array.shape[1], layers, spec, name)
    check_size(len(array), spec, name)
    whole(array[:0], name)
    return placed


def _checked(array: Array, stated: Array | None, placed: PlacedLayers, recorded: Bools, spec: MoeSpec, name: str) -> tuple[Counts, Ints]:
    """Check the rows part by part, and spread the recorded layers over all MoE layers."""
    if stated is not None and stated.shape != array.shape[:1]:
        raise refuse(name, f"its {len(array)} rows have token numbers of shape {stated.shape}")
    stated = None if stated is None else whole(stated, f"{name}, tokens").astype(np.int64)
    kept = placed.only(recorded, spec.moe_layers)
    dense = np.setdiff1d(np.arange(array.shape[1]), placed.kept)
    counts = np.zeros((len(array), len(spec.moe_layers), spec.experts_per_layer), dtype=np.int32)
    tokens = np.zeros(len(array), dtype=np.int64)
    for part in chunks(len(array), array[:1].size):
        numbers = whole(array[part], name, first=part.start)
        if numbers[:, dense].any():
            layer = dense[numbers[:, dense].any(axis=(0, 2))][0]
            raise refuse(name, f"layer {layer} has routing, and the model has no experts there")
        counts[part, kept.places] = numbers[:, kept.kept]
        given = None if stated is None else stated[part]
        tokens[part] = _tokens(numbers[:, kept.kept], given, spec, name, [spec.moe_layers[p] for p in kept.places], part.start)
    return counts, tokens


def _tokens(counts: Array, stated: Ints | None, spec: MoeSpec, name: str, layers: list[int], first: int) -> Ints:
    """Get the tokens of each row from its sums; the first row is row `first` of the file.

    The sums must be the same in all layers, and fit top-k and the `stated` tokens.
    """
    sums = counts.sum(axis=2, dtype=np.int64)
    tokens: Ints = sums[:, 0] // spec.top_k if stated is None else stated
    wrong = sums != tokens[:, None] * spec.top_k
    if wrong.any():
        row, layer = (int(x[0]) for x in np.nonzero(wrong))
        other = f"{tokens[row]} tokens" if stated is not None else f"a sum of {sums[row, 0]} in layer {layers[0]}"
        what = f"layer {layers[layer]} sums to {sums[row, layer]}, which does not fit {other} and top-{spec.top_k}"
        raise refuse(f"{name}[{row + first}]", what)
    often = counts > tokens[:, None, None]
    if often.any():
        row, layer, expert = (int(x[0]) for x in np.nonzero(often))
        times = f"{counts[row, layer, expert]} times for {tokens[row]} tokens"
        raise refuse(f"{name}[{row + first}]", f"expert {expert} of layer {layers[layer]} is chosen {times}")
    if (sums > MAX).any():
        raise refuse(f"{name}[{int((sums > MAX).any(axis=1).argmax()) + first}]", f"it sums to more than {MAX}")
    return tokens
