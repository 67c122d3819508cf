"""A profile for a mix of workloads: so many requests of one profile to so many of another.

A weight is a share of the requests. Requests are picked, never counted twice: as many as there can be so that the shares hold, and of each
profile evenly over its prompts. What follows:

- counts    are sums over the picked requests, as in every profile: a long request counts more than a short one, as it does in traffic.
- trace     Profiles trace only a part of long runs. Each is thinned to the least traced part of all, so that a traced token of one
            profile stands for as many tokens as one of another.
- intervals are those of the picked requests. Weights with decimals on few prompts would make them look surer than they are.
- held-out  prompts stay held out, because no prompt is there twice; the workloads alternate, so that both halves have the same mix.

Shapes: P prompts, T traced tokens (record.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.profile.loss_record import worst_loss
from remoe_cli.profile.merge import Arrays, join
from remoe_cli.profile.record import (
    AXES,
    OPTIONAL,
    Profile,
    ProfileRecord,
    read_profile,
    refuse_foreign,
    write_profile,
)

Ints = npt.NDArray[np.int64]


def mix(weights: Mapping[Path, float], out: Path) -> Profile:
    """Write the profile of requests that come from several profiles, with these shares.

    Shares are divided by their sum. Times, and the paths of model and vectors, are the first profile's. What quantised experts lose is
    what they lose on the worst profile's prompts.

    Raises: UsageError for a share that is not above 0, for profiles of different models or recorded in different ways, for slices and for
    routing whose rows are not prompts, and where `out` is one of the profiles.
    """
    refuse_foreign(out)
    if any(out.resolve() == path.resolve() for path in weights):
        raise UsageError(f"{out} is one of the profiles.", "Give another directory with -o.")
    if len(weights) < 2 or not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise UsageError("A mix needs two profiles or more, each with a share above 0.", "Give shares such as --weight chat=0.7,code=0.3.")
    parts = [read_profile(path) for path in weights]
    for part in parts:
        _refuse_unlike(parts[0], part)
    shares = [weight / math.fsum(weights.values()) for weight in weights.values()]
    counts = picked_counts([len(part.arrays["prompt_tokens"]) for part in parts], shares)
    rows = _alternating(counts)
    picked = [_picked(part, count) for part, count in zip(parts, counts, strict=True)]
    names = [*AXES, *(name for kind in OPTIONAL if all(kind.keys() <= part.keys() for part in picked) for name in kind)]
    traced = _evenly_traced(picked, parts[0].record)
    joined = join([{name: part[name] for name in names} | {"prompt_index": row} for part, row in zip(traced, rows, strict=True)])
    joined.pop("prompt_index")
    return write_profile(out, _record(parts, shares, sum(counts)), joined)


def picked_counts(prompts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Count the prompts to pick of each profile.

    They are as many as there can be so that the shares hold, to half a prompt.

    >>> picked_counts([100, 100], [0.75, 0.25]), picked_counts([10, 1000], [0.5, 0.5])
    ([100, 33], [10, 10])
    """
    total = min(count / share for count, share in zip(prompts, shares, strict=True))
    return [max(1, min(count, math.floor(total * share + 0.5))) for count, share in zip(prompts, shares, strict=True)]


def _alternating(counts: Sequence[int]) -> list[Ints]:
    """Give each profile's prompts their places in the mix, spread evenly over it.

    A profile's prompts go to even and odd places by turns: plans are tested on every other prompt.

    Shapes: per profile int64 [P]; all places together are 0 to the number of prompts.
    """
    places, odd = [np.empty(count, dtype=np.int64) for count in counts], 0
    halves: tuple[list[tuple[float, int, int]], ...] = ([], [])
    for part, count in enumerate(counts):
        for prompt in range(count):
            halves[(prompt + odd) % 2].append(((prompt + 0.5) / count, part, prompt))
        odd = (odd + count) % 2
    for half, prompts in enumerate(halves):
        for place, (_, part, prompt) in enumerate(sorted(prompts)):
            places[part][prompt] = 2 * place + half
    return places


def _picked(profile: Profile, count: int) -> Arrays:
    """Keep `count` prompts of a profile, evenly over all, with their traced tokens."""
    arrays = profile.arrays
    prompts = np.arange(count) * len(arrays["prompt_tokens"]) // count
    kept: dict[str, Any] = {"P": prompts, "T": np.flatnonzero(np.isin(arrays["trace_prompt"], prompts))}
    if "bag_sizes" in arrays:
        owner = np.repeat(np.arange(len(arrays["bag_sizes"])), arrays["bag_sizes"])
        kept["N"] = np.flatnonzero(np.isin(owner, prompts))
    axes = dict(AXES)
    for kind in OPTIONAL:
        axes |= kind if kind.keys() <= arrays.keys() else {}
    picked = {name: arrays[name][kept[axis[0]]] for name, axis in axes.items()}
    return picked | {"trace_prompt": np.searchsorted(prompts, picked["trace_prompt"]).astype(np.int32)}


def _evenly_traced(parts: Sequence[Arrays], record: ProfileRecord) -> list[Arrays]:
    """Thin the traced tokens of each part to the least traced part of the tokens of any."""
    tokens = "decode_tokens" if record.routing.trace == "decode" else "prompt_tokens"
    rates = [len(part["trace_prompt"]) / max(1, int(part[tokens].sum())) for part in parts]
    thinned = []
    for part, rate in zip(parts, rates, strict=True):
        number = np.arange(len(part["trace_prompt"]) + 1) * (min(rates) / rate if rate else 0.0)
        kept = np.flatnonzero(np.diff(np.floor(number + 1e-9)))
        thinned.append(part | {name: part[name][kept] for name in ("trace_ids", "trace_prompt")})
    return thinned


def _record(parts: Sequence[Profile], shares: Sequence[float], prompts: int) -> ProfileRecord:
    first = parts[0].record
    settings = [part.record.settings for part in parts if part.record.settings]
    longest = {
        name: max(getattr(one, name) for one in settings) for name in ("max_new_tokens", "max_prompt_tokens", "batch_size") if settings
    }
    source = " + ".join(f"{share:.3g} of {part.record.dataset.source}" for share, part in zip(shares, parts, strict=True))
    digests = "\n".join(f"{share!r} {part.record.dataset.sha256}" for share, part in zip(shares, parts, strict=True))
    dataset = first.dataset.model_copy(
        update={"source": source, "prompts": prompts, "sha256": hashlib.sha256(digests.encode()).hexdigest()}
    )
    update: dict[str, Any] = {
        "dataset": dataset,
        "settings": first.settings and first.settings.model_copy(update=longest),
        "loss": worst_loss([part.record.loss for part in parts]),
    }
    if first.routing.source == "imported":
        update["routing"] = first.routing.model_copy(update={"sha256": dataset.sha256})
    return first.model_copy(update=update)


def _refuse_unlike(first: Profile, other: Profile) -> None:
    if other.record.dataset.shard is not None:
        raise UsageError(f"{other.path} is a slice of a profile.", "Merge its slices first, without --weight.")
    if other.record.routing.row != "prompt":
        raise UsageError(
            f"The rows of {other.path} are no prompts ({other.record.routing.row}), so they are no share of requests.",
            "Import routing by prompt.",
        )
    a, b = _kind_of(first.record), _kind_of(other.record)
    if different := [name for name in a if a[name] != b[name]]:
        raise UsageError(
            f"{first.path} and {other.path} cannot be mixed. They differ in: {', '.join(different)}.",
            "Profile one model, in one way, on the prompts of each workload.",
        )


def _kind_of(record: ProfileRecord) -> dict[str, object]:
    """List what all parts of a mix have in common; how long prompts and answers may be is the workload's own."""
    settings = record.settings
    return {
        "model": (record.model.revision, record.spec.model_copy(update={"remote": None})),
        "form of experts (--experts)": record.spec.remote,
        "assistant": record.assistant and record.assistant.revision,
        "settings": settings and (settings.dtype, settings.chat_template),
        "routing": record.routing.model_copy(update={"sha256": None, "format": None}),
        "vectors": record.vectors and record.vectors.revision,
    }
