"""What the readers of all formats return, and its checks against the model's sizes.

A profile's arrays are made here. File formats, prompts and the place of the profile are not known here.

Counts must be exactly tokens times top-k in every layer: counts of a model that skips slots look the same as damaged ones, so they are
refused. Ids may miss whole tokens (-1 in every slot of every layer, as servers mark tokens that a prefix cache answered): these count
for the lengths and not for the routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.record import TRACE_TOKENS, Phase

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
_MAX = 2**31 - 1
_MOST_COUNTS = 2**28  # of a profile: 2 GB while it is checked
_HINT = "Check that the file is whole and belongs to this model."


@dataclass(frozen=True)
class CountedRouting:
    """Counts as a reader found them: P rows of L' layers.

    format   what the profile calls the format
    counts   [P, L', E] by phase; the key None stands for a phase that the file does not name
    tokens   [P] by phase, where the file states them
    layers   the L' layers as the file names them; None when they come in order
    row      what one row stands for
    """

    format: str
    counts: Mapping[Phase | None, Array]
    tokens: Mapping[Phase | None, Array]
    layers: tuple[int, ...] | None = None
    row: str = "prompt"


@dataclass(frozen=True)
class TracedRouting:
    """Expert ids of single tokens as a reader found them: T tokens in P rows, L' layers.

    format          what the profile calls the format
    ids             [T, L', k]
    offsets         [P + 1]; row p has the tokens offsets[p] to offsets[p + 1]
    prompt_tokens   [P]: how many of a row's tokens are prefill, the others are decode; None where the file does not say
    layers          the L' layers as the file names them; None when they come in order
    row             what one row stands for
    """

    format: str
    ids: Array
    offsets: Array
    prompt_tokens: Array | None
    layers: tuple[int, ...] | None = None
    row: str = "prompt"


Routing = CountedRouting | TracedRouting


@dataclass(frozen=True)
class CheckedRouting:
    """Routing in the shapes of a profile.

    counts, tokens   by phase: [P, L, E] and [P]
    trace_ids        [T, L, k], trace_prompt [T]: traced tokens and their rows; none where the file has counts
    trace_phase      the phase of the traced tokens
    layers           hidden-layer indices of the layers that have routing; None for all
    """

    counts: dict[Phase, Ints]
    tokens: dict[Phase, Ints]
    trace_ids: npt.NDArray[np.int16]
    trace_prompt: npt.NDArray[np.int32]
    trace_phase: Phase | None
    layers: tuple[int, ...] | None


def refuse(where: object, what: str, hint: str = _HINT) -> UsageError:
    """Make the error that says what is wrong at a place of a file."""
    return UsageError(f"{where}: {what}.", hint)


def whole(array: Array, where: str, least: int = 0) -> Array:
    """Return the array as integers from `least` to 2**31 - 1.

    Raises: UsageError for any other value; it names the first.
    """
    kind = array.dtype.kind
    if kind not in "iuf":
        raise refuse(where, f"it holds {array.dtype}, not whole numbers")
    array = array.astype(np.float64) if kind == "f" else array
    wrong = ~((array >= least) & (array <= _MAX))  # also where it is NaN
    if kind == "f":
        wrong |= np.floor(array) != array
    if wrong.any():
        first = tuple(int(x[0]) for x in np.nonzero(wrong))
        raise refuse(f"{where}{list(first)}", f"{array[first]} is not a whole number from {least} to {_MAX}")
    return array.astype(np.int32) if kind == "f" else array


def counted_rows(found: CountedRouting, spec: MoeSpec, where: str) -> CheckedRouting:
    """Check counts and spread them over all MoE layers.

    Counts without a phase are taken as those of prompts.

    Raises: UsageError with the first row that does not fit the model, or whose sums do not fit each other.
    """
    all_counts: dict[Phase, Ints] = {}
    all_tokens: dict[Phase, Ints] = {}
    layers = None
    for key, array in found.counts.items():
        name = f"{where}: {key}_counts" if key else f"{where}: counts"
        if array.ndim != 3:
            raise refuse(name, f"it has shape {array.shape}, and [rows, layers, experts] is needed")
        if array.shape[2] != spec.experts_per_layer:
            raise refuse(name, f"it has {array.shape[2]} experts a layer, and the model has {spec.experts_per_layer}")
        places, kept, layers = place_layers(array.shape[1], found.layers, spec, name)
        _check_size(len(array), spec, name)
        counts = whole(array, name)
        dense = np.setdiff1d(np.arange(array.shape[1]), kept)
        if counts[:, dense].any():
            raise refuse(name, f"layer {dense[counts[:, dense].any(axis=(0, 2))][0]} has routing, and the model has no experts there")
        counts = counts[:, kept].astype(np.int64)
        all_tokens[key or "prefill"] = _tokens(counts, found.tokens.get(key), spec, name, [spec.moe_layers[p] for p in places])
        spread = np.zeros((len(counts), len(spec.moe_layers), spec.experts_per_layer), dtype=np.int64)
        spread[:, places] = counts
        all_counts[key or "prefill"] = spread
    if len({len(tokens) for tokens in all_tokens.values()}) > 1:
        raise refuse(where, "prefill and decode differ in their rows")
    _not_empty(all_tokens, where)
    nothing = np.empty((0, len(spec.moe_layers), spec.top_k), dtype=np.int16)
    return CheckedRouting(all_counts, all_tokens, nothing, np.empty(0, dtype=np.int32), None, layers)


def _tokens(counts: Ints, stated: Array | None, spec: MoeSpec, name: str, layers: list[int]) -> Ints:
    """Get the tokens of each row from its sums.

    The sums must be the same in all layers, and fit top-k and the `stated` tokens.
    """
    sums = counts.sum(axis=2)
    tokens: Ints = sums[:, 0] // spec.top_k
    if stated is not None:
        if stated.shape != tokens.shape:
            raise refuse(name, f"its {len(tokens)} rows have token numbers of shape {stated.shape}")
        tokens = whole(stated, f"{name}, tokens").astype(np.int64)
    wrong = sums != tokens[:, None] * spec.top_k
    if wrong.any():
        row, layer = (int(x[0]) for x in np.nonzero(wrong))
        other = f"{tokens[row]} tokens" if stated is not None else f"a sum of {sums[row, 0]} in layer {layers[0]}"
        raise refuse(f"{name}[{row}]", f"layer {layers[layer]} sums to {sums[row, layer]}, which does not fit {other} and top-{spec.top_k}")
    often = counts > tokens[:, None, None]
    if often.any():
        row, layer, expert = (int(x[0]) for x in np.nonzero(often))
        times = f"{counts[row, layer, expert]} times for {tokens[row]} tokens"
        raise refuse(f"{name}[{row}]", f"expert {expert} of layer {layers[layer]} is chosen {times}")
    if (sums > _MAX).any():
        raise refuse(f"{name}[{int((sums > _MAX).any(axis=1).argmax())}]", f"it sums to more than {_MAX}")
    return tokens


def traced_rows(found: TracedRouting, spec: MoeSpec, where: str) -> CheckedRouting:
    """Check and count ids, and keep those of some tokens, evenly chosen.

    Decode tokens are kept if there are any, else prompt tokens.

    Raises: UsageError with the first token that does not fit the model.
    """
    ids, top_k, experts = found.ids, spec.top_k, spec.experts_per_layer
    name = f"{where}: ids"
    if ids.ndim != 3:
        raise refuse(name, f"it has shape {ids.shape}, and [tokens, layers, top-k] is needed")
    if ids.shape[2] != top_k:
        raise refuse(name, f"it has {ids.shape[2]} experts a token, and the model chooses {top_k}")
    places, kept, layers = place_layers(ids.shape[1], found.layers, spec, name)
    offsets = _offsets(found.offsets, len(ids), where)
    _check_size(len(offsets) - 1, spec, where)
    ids = whole(ids[:, kept], name, -1).astype(np.int32)
    missing = (ids == -1).all(axis=(1, 2))
    _check_ids(ids, missing, experts, name, [spec.moe_layers[p] for p in places])
    lengths = np.diff(offsets)
    prompt = lengths if found.prompt_tokens is None else found.prompt_tokens
    if prompt.shape != lengths.shape:
        raise refuse(where, f"{len(lengths)} sequences have prompt lengths of shape {prompt.shape}")
    prompt = whole(prompt, f"{where}: prompt tokens").astype(np.int64)
    if (prompt > lengths).any():
        row = int((prompt > lengths).argmax())
        raise refuse(f"{name}, row {row}", f"{prompt[row]} prompt tokens are more than its {lengths[row]} tokens")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    early = np.arange(len(ids)) - offsets[owner] < prompt[owner]
    masks: dict[Phase, npt.NDArray[np.bool_]] = {"prefill": early & ~missing, "decode": ~early & ~missing}
    masks = {p: mask for p, mask in masks.items() if mask.any()}
    counts = {p: _count(ids, owner, mask, len(lengths), places, spec) for p, mask in masks.items()}
    tokens = {p: prompt if p == "prefill" else lengths - prompt for p in masks}
    _not_empty({p: c.sum(axis=(1, 2)) for p, c in counts.items()}, where)
    traced: Phase = "decode" if "decode" in masks else "prefill"
    picked = _pick(np.flatnonzero(masks[traced]), owner, len(lengths))
    trace = np.full((len(picked), len(spec.moe_layers), top_k), -1, dtype=np.int16)
    trace[:, places] = ids[picked]
    return CheckedRouting(counts, tokens, trace, owner[picked].astype(np.int32), traced, layers)


def _check_size(rows: int, spec: MoeSpec, name: str) -> None:
    size = rows * len(spec.moe_layers) * spec.experts_per_layer
    if size > _MOST_COUNTS:
        raise refuse(name, f"its {rows} rows make {size} counts, and a profile may have {_MOST_COUNTS}", "Import fewer rows.")


def place_layers(
    width: int, named: tuple[int, ...] | None, spec: MoeSpec, name: str
) -> tuple[list[int], list[int], tuple[int, ...] | None]:
    """Find the MoE layers that a file's `width` layers are.

    Without names they are all MoE layers in order, or all hidden layers, of which the dense ones are left out. Names are indices of
    hidden layers, or places among the MoE layers, where only one of the two is possible.

    Returns: the kept layers' places among the MoE layers; the file's indices of the kept layers; their hidden-layer indices, None for all.
    Raises: UsageError when the number or the names of the layers do not fit the model.
    """
    moe = spec.moe_layers
    if named is None and width == len(moe):
        return list(range(width)), list(range(width)), None
    if named is None and width == spec.hidden_layers:
        return list(range(len(moe))), list(moe), None
    if named is None:
        raise refuse(name, f"it has {width} layers, and the model has {len(moe)} with experts among {spec.hidden_layers}")
    if len(named) != width or len(set(named)) != len(named) or not named:
        raise refuse(name, f"its layers {list(named)[:99]} do not name {width} different layers")
    readings = {places for places in (_hidden_places(named, moe), _moe_places(named, moe)) if places}
    if len(readings) != 1:
        why = "may be indices of hidden layers or of MoE layers" if readings else f"are not among the model's {len(moe)} MoE layers"
        raise refuse(name, f"its layers {list(named)[:99]} {why}", "Name hidden layers, and all MoE layers where that is ambiguous.")
    places = list(readings.pop())
    held = None if len(places) == len(moe) else tuple(sorted(moe[p] for p in places))
    return places, list(range(width)), held


def _hidden_places(named: tuple[int, ...], moe: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(moe.index(layer) for layer in named) if set(named) <= set(moe) else ()


def _moe_places(named: tuple[int, ...], moe: tuple[int, ...]) -> tuple[int, ...]:
    return named if all(0 <= layer < len(moe) for layer in named) else ()


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


def _check_ids(ids: npt.NDArray[np.int32], missing: npt.NDArray[np.bool_], experts: int, name: str, layers: list[int]) -> None:
    wrong = (ids >= experts) | ((ids < 0) & ~missing[:, None, None])
    if wrong.any():
        token, layer, slot = (int(x[0]) for x in np.nonzero(wrong))
        raise refuse(f"{name}[{token}]", f"layer {layers[layer]} has expert {ids[token, layer, slot]}, and ids go from 0 to {experts - 1}")
    ordered = np.sort(ids, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & ~missing[:, None, None]
    if twice.any():
        token, layer, slot = (int(x[0]) for x in np.nonzero(twice))
        raise refuse(f"{name}[{token}]", f"layer {layers[layer]} has expert {ordered[token, layer, slot]} twice")


def _count(ids: npt.NDArray[np.int32], owner: Ints, chosen: npt.NDArray[np.bool_], rows: int, places: list[int], spec: MoeSpec) -> Ints:
    """Count the chosen tokens' ids, layer by layer: [P, L, E]."""
    counts = np.zeros((rows, len(spec.moe_layers), spec.experts_per_layer), dtype=np.int64)
    for index, place in enumerate(places):
        flat = owner[chosen, None] * spec.experts_per_layer + ids[chosen, index]
        counts[:, place] = np.bincount(flat.ravel(), minlength=rows * spec.experts_per_layer).reshape(rows, -1)
    return counts


def _pick(tokens: Ints, owner: Ints, rows: int) -> Ints:
    """Pick at most TRACE_TOKENS / rows tokens of each row, evenly spaced."""
    most = max(1, TRACE_TOKENS // rows)
    size = np.bincount(owner[tokens], minlength=rows)
    rank = np.arange(len(tokens)) - (np.cumsum(size) - size)[owner[tokens]]
    kept = np.minimum(size, most)[owner[tokens]]
    size = size[owner[tokens]]
    # Of `size` tokens the ones at which rank * kept / size reaches its next whole number: exactly `kept` of them.
    picked: Ints = tokens[(rank * kept) // size != ((rank - 1) * kept) // size]
    return picked


def _not_empty(tokens: Mapping[Phase, Ints], where: str) -> None:
    total = sum(tokens.values())
    if not isinstance(total, np.ndarray) or not len(total) or not total.all():
        row = int((total == 0).argmax()) if isinstance(total, np.ndarray) and len(total) else None
        raise refuse(where, "it has no rows" if row is None else f"row {row} holds no routing")
