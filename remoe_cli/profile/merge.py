"""Joining profiles of parts: the batches of one run, and shards from several machines.

`prompt_index` says which prompts of the dataset a part holds. Joining puts the rows of all parts into the dataset's order, so the arrays
of merged shards are byte for byte those of one run over the whole dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.profile.loss_record import worst_loss
from remoe_cli.profile.record import (
    AXES,
    IN_SHARD,
    OPTIONAL,
    Profile,
    ProfileRecord,
    read_profile,
    refuse_foreign,
    write_profile,
)

Arrays = dict[str, npt.NDArray[Any]]
_AXES = AXES | {name: axes for kind in OPTIONAL for name, axes in kind.items()} | IN_SHARD


def merge(profiles: Sequence[Path], out: Path) -> Profile:
    """Merge all shards of a run, in any order, into the profile of the whole dataset at `out`.

    Latencies are the first shard's, because times of different machines cannot be mixed; so are the paths of model and dataset. What
    quantised experts lose all shards measure on the same prompts; machines may differ in rounding, and the worst shard's is kept.

    Raises: UsageError when a shard is missing or given twice, or the shards belong to different runs.
    """
    refuse_foreign(out)
    if any(out.resolve() == path.resolve() for path in profiles):
        raise UsageError(f"{out} is one of the shards.", "Give another directory with -o.")
    shards = sorted((read_profile(path) for path in profiles), key=_number)
    first = shards[0]
    for other in shards[1:]:
        _refuse_other_run(first, other)
    _refuse_gaps(shards)
    arrays = join([shard.arrays for shard in shards])
    if not np.array_equal(arrays.pop("prompt_index"), np.arange(first.record.dataset.prompts)):
        raise ArtifactError("The shards do not hold each prompt once.", "Profile all shards with the same version of remoe.")
    dataset = first.record.dataset.model_copy(update={"shard": None})
    loss = worst_loss([shard.record.loss for shard in shards])
    return write_profile(out, first.record.model_copy(update={"dataset": dataset, "loss": loss}), arrays)


def join(parts: Sequence[Arrays]) -> Arrays:
    """Join the arrays that all parts have into one part, with the prompts in the order of the dataset."""
    prompts = [part["prompt_index"] for part in parts]
    owners = {"P": prompts, "T": [index[part["trace_prompt"]] for index, part in zip(prompts, parts, strict=True)]}
    if "bag_sizes" in parts[0]:
        owners["N"] = [np.repeat(index, part["bag_sizes"]) for index, part in zip(prompts, parts, strict=True)]
    order = {axis: np.argsort(np.concatenate(owner), kind="stable") for axis, owner in owners.items()}
    names = [name for name in parts[0] if all(name in part for part in parts)]
    joined = {name: np.concatenate([part[name] for part in parts])[order[_AXES[name][0]]] for name in names}
    traced = np.concatenate(owners["T"])[order["T"]]
    return joined | {"trace_prompt": np.searchsorted(joined["prompt_index"], traced).astype(np.int32)}


def _number(profile: Profile) -> int:
    if profile.record.dataset.shard is None:
        raise UsageError(f"{profile.path} is not a slice: it was made without --shard I/N.", "Merge what 'remoe profile --shard I/N' made.")
    return profile.record.dataset.shard.number


def _refuse_other_run(one: Profile, other: Profile) -> None:
    a, b = _run_of(one.record), _run_of(other.record)
    if different := [name for name in a if a[name] != b[name]]:
        raise UsageError(
            f"{one.path} and {other.path} are shards of different runs. They differ in: {', '.join(different)}.",
            "Profile all shards of one dataset with the same options.",
        )


def _run_of(record: ProfileRecord) -> dict[str, object]:
    """List what all shards of a run have in common. Paths may differ from machine to machine."""
    shard = record.dataset.shard
    return {
        "model": (record.model.revision, record.spec.model_copy(update={"remote": None})),
        "form of experts (--experts)": record.spec.remote,
        "assistant": record.assistant and record.assistant.revision,
        "dataset": (record.dataset.sha256, record.dataset.prompts),
        "settings": record.settings,
        "number of shards": shard and shard.of,
    }


def _refuse_gaps(shards: Sequence[Profile]) -> None:
    paths: dict[int, Path] = {}
    for shard in shards:
        if (number := _number(shard)) in paths:
            raise UsageError(f"{paths[number]} and {shard.path} are both shard {number}.", "Give each shard once.")
        paths[number] = shard.path
    of = shards[0].record.dataset.shard.of if shards[0].record.dataset.shard else 0
    if missing := sorted(set(range(1, of + 1)) - set(paths)):
        raise UsageError(
            f"Shard {missing[0]} of {of} is missing.", f"Profile it with --shard {missing[0]}/{of}, and give it with the others."
        )
