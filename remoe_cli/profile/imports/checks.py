"""What the readers of all formats return, and the checks that counts and ids have in common.

check_counts.py and check_ids.py hold counts and ids against the model's sizes and make a profile's arrays of them. File formats, prompts
and the place of the profile are not known here.

A MoE layer without any routing in the whole file is left out, and a remark says so: some programs do not record layers whose experts
are chosen by a table instead of a router.

Source: sgl-project/sglang, issue 29040 and pull request 25961 (the first layers of DeepSeek-V4 are zero in responses and dumps).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.record import Phase

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
MAX = 2**31 - 1
_MOST_COUNTS = 2**27  # of a profile; they take 0.5 GiB, and as much for the other phase
_MOST_ROWS = 2**20  # of a profile
_CHUNK = 2**22  # numbers that are checked at once, so that checks take little memory beside the numbers
_HINT = "Check that the file is whole and belongs to this model."


@dataclass(frozen=True)
class CountedRouting:
    """Counts as a reader found them: P rows of L' layers.

    format   what the profile calls the format
    counts   [P, L', E] by phase; the key None stands for a phase that the file does not name
    tokens   [P] by phase, where the file states them
    layers   the L' layers as the file names them; None when they come in order
    row      what one row stands for
    remarks  sentences on what the file holds that the profile does not
    """

    format: str
    counts: Mapping[Phase | None, Array]
    tokens: Mapping[Phase | None, Array]
    layers: tuple[int, ...] | None = None
    row: str = "prompt"
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TracedRouting:
    """Expert ids of single tokens as a reader found them: T tokens in P rows, L' layers.

    format          what the profile calls the format
    ids             [T, L', k]
    offsets         [P + 1]; row p has the tokens offsets[p] to offsets[p + 1]
    prompt_tokens   [P]: how many of a row's tokens are prefill, the others are decode; None where the file does not say
    layers          the L' layers as the file names them; None when they come in order
    row             what one row stands for
    remarks         sentences on what the file holds that the profile does not
    requests        [P]: the number of each row's request among all `read` requests of the file, from 0; None when each request is a row
    """

    format: str
    ids: Array
    offsets: Array
    prompt_tokens: Array | None
    layers: tuple[int, ...] | None = None
    row: str = "prompt"
    remarks: tuple[str, ...] = ()
    requests: Ints | None = None
    read: int = 0


Routing = CountedRouting | TracedRouting


@dataclass(frozen=True)
class CheckedRouting:
    """Routing in the shapes of a profile.

    counts, tokens   by phase: [P, L, E] and [P]
    trace_ids        [T, L, k], trace_prompt [T]: traced tokens and their rows; none where the file has counts
    trace_phase      the phase of the traced tokens
    layers           hidden-layer indices of the layers that have routing; None for all
    remarks          sentences on what the file lacks
    """

    counts: dict[Phase, Counts]
    tokens: dict[Phase, Ints]
    trace_ids: npt.NDArray[np.int16]
    trace_prompt: npt.NDArray[np.int32]
    trace_phase: Phase | None
    layers: tuple[int, ...] | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlacedLayers:
    """Where the layers of a file belong.

    places   the places of the kept layers among the MoE layers
    kept     their indices in the file
    held     their hidden-layer indices, ascending; None for all MoE layers
    """

    places: list[int]
    kept: list[int]
    held: tuple[int, ...] | None

    def only(self, recorded: Bools, moe: tuple[int, ...]) -> PlacedLayers:
        """Keep the layers whose place is `recorded`."""
        pairs = [(place, index) for place, index in zip(self.places, self.kept, strict=True) if recorded[place]]
        return _placed([place for place, _ in pairs], [index for _, index in pairs], moe)


def refuse(where: object, what: str, hint: str = _HINT) -> UsageError:
    """Make the error that says what is wrong at a place of a file."""
    return UsageError(f"{where}: {what}.", hint)


def whole(array: Array, where: str, least: int = 0, first: int = 0) -> Array:
    """Return the array as integers from `least` to 2**31 - 1. Its first index is `first` in messages.

    Raises: UsageError for any other value; it names the first.
    """
    kind = array.dtype.kind
    if kind not in "iuf":
        raise refuse(where, f"it holds {array.dtype}, not whole numbers")
    array = array.astype(np.float64) if kind == "f" else array
    wrong = ~((array >= least) & (array <= MAX))  # also where it is NaN
    if kind == "f":
        wrong |= np.floor(array) != array
    if wrong.any():
        at = tuple(int(x[0]) for x in np.nonzero(wrong))
        raise refuse(f"{where}{[at[0] + first, *at[1:]] if at else []}", f"{array[at]} is not a whole number from {least} to {MAX}")
    return array.astype(np.int32) if kind == "f" else array


def place_layers(width: int, named: tuple[int, ...] | None, spec: MoeSpec, name: str) -> PlacedLayers:
    """Find the MoE layers that a file's `width` layers are.

    Without names they are all MoE layers in order, or all hidden layers, of which the dense ones are left out. Names are indices of
    hidden layers, or places among the MoE layers, where only one of the two is possible.

    Raises: UsageError when the number or the names of the layers do not fit the model.
    """
    moe = spec.moe_layers
    if named is None and width == len(moe):
        return PlacedLayers(list(range(width)), list(range(width)), None)
    if named is None and width == spec.hidden_layers:
        return PlacedLayers(list(range(len(moe))), list(moe), None)
    if named is None:
        raise refuse(name, f"it has {width} layers, and the model has {len(moe)} with experts among {spec.hidden_layers}")
    if len(named) != width or len(set(named)) != len(named) or not named:
        raise refuse(name, f"its layers {list(named)[:99]} do not name {width} different layers")
    readings = {places for places in (_hidden_places(named, moe), _moe_places(named, moe)) if places}
    if len(readings) != 1:
        why = "may be indices of hidden layers or of MoE layers" if readings else f"are not among the model's {len(moe)} MoE layers"
        raise refuse(name, f"its layers {list(named)[:99]} {why}", "Name hidden layers, and all MoE layers where that is ambiguous.")
    return _placed(list(readings.pop()), list(range(width)), moe)


def _placed(places: list[int], kept: list[int], moe: tuple[int, ...]) -> PlacedLayers:
    return PlacedLayers(places, kept, None if len(places) == len(moe) else tuple(sorted(moe[place] for place in places)))


def _hidden_places(named: tuple[int, ...], moe: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(moe.index(layer) for layer in named) if set(named) <= set(moe) else ()


def _moe_places(named: tuple[int, ...], moe: tuple[int, ...]) -> tuple[int, ...]:
    return named if all(0 <= layer < len(moe) for layer in named) else ()


def chunks(length: int, size: int) -> Iterator[slice]:
    """Cut `length` things of `size` numbers each into slices that are checked at once."""
    step = max(1, _CHUNK // max(1, size))
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def check_size(rows: int, spec: MoeSpec, name: str) -> None:
    """Check that the profile of so many rows is not too large.

    Raises: UsageError when it is; it says the limit.
    """
    size = rows * spec.experts
    if size > _MOST_COUNTS:
        raise refuse(name, f"its {rows} rows make {size} counts, and a profile may have {_MOST_COUNTS}", "Import fewer rows.")
    if rows > _MOST_ROWS:
        raise refuse(name, f"it has {rows:,} rows, and a profile may have {_MOST_ROWS:,}", "Import fewer rows.")


def unrecorded_remark(where: str, before: PlacedLayers, after: PlacedLayers, spec: MoeSpec) -> tuple[str, ...]:
    """Say which MoE layers hold no routing in the file; nothing when all do."""
    lost = sorted(spec.moe_layers[place] for place in set(before.places) - set(after.places))
    if not lost:
        return ()
    which = f"layers {listed(lost)} hold" if len(lost) > 1 else f"layer {lost[0]} holds"
    return (
        f"{where}: {which} no routing in the whole file, so the profile has {len(after.places)} of the model's {len(spec.moe_layers)} MoE "
        "layers. It predicts for these, and cannot be planned from.",
    )


def not_empty(tokens: Mapping[Phase, Array], where: str) -> None:
    """Check that there are rows, and that each of them has routing.

    Raises: UsageError with the first that has none.
    """
    total = sum(tokens.values())
    if not isinstance(total, np.ndarray) or not len(total) or not total.all():
        row = int((total == 0).argmax()) if isinstance(total, np.ndarray) and len(total) else None
        raise refuse(where, "it has no rows" if row is None else f"row {row} holds no routing")


def listed(names: Iterable[object], most: int = 20) -> str:
    """List names that a file holds for a message, at most so many and none at length.

    >>> print(listed(["id", "choices", "two\\nlines"]))
    id, choices, two\\nlines
    """
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in map(str, names)]
    return ", ".join(name[:40] for name in shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "") or "nothing"
