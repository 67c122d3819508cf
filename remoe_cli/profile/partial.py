"""What of a run is done: the folder partial/ of a profile, a file for each batch."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.merge import Arrays
from remoe_cli.profile.record import AssistantRef, DatasetRef, ModelRef, RecordingSettings

# The files of partial/ besides the fingerprint, also half-written ones.
_OF_A_RUN = re.compile(r"(batch-\d{7}\.safetensors|latency\.json|loss\.json|\..+\.remoe-[a-z0-9_]{8})")


class Inputs(artifacts.Document):
    """Everything that decides the counts.

    A rerun may use the batches of an earlier run if their inputs are equal."""

    schema_version: str = "remoe.profile-inputs/3"
    model: ModelRef
    dataset: DatasetRef
    settings: RecordingSettings
    spec: MoeSpec
    assistant: AssistantRef | None = Field(default=None, exclude_if=artifacts.is_none)


def batches_of(inputs: Inputs) -> range:
    """Return the numbers of the batches to run: all of the dataset, or those of the shard."""
    count = -(-inputs.dataset.prompts // inputs.settings.batch_size)
    if (shard := inputs.dataset.shard) is None:
        return range(count)
    if not 1 <= shard.number <= shard.of:
        raise UsageError(f"There is no shard {shard.number} of {shard.of}.", "Shards are counted from 1: --shard 1/4 to --shard 4/4.")
    if shard.of > count:
        raise UsageError(
            f"{inputs.dataset.prompts} prompts in batches of {inputs.settings.batch_size} cannot be cut into {shard.of} shards.",
            "Take fewer shards, or a smaller --batch-size for all of them.",
        )
    return range(count * (shard.number - 1) // shard.of, count * shard.number // shard.of)


def size_of(inputs: Inputs, batch: int) -> int:
    """Return the number of prompts in a batch."""
    size = inputs.settings.batch_size
    return min(size, inputs.dataset.prompts - batch * size)


def file_of(partial: Path, batch: int) -> Path:
    return partial / f"batch-{batch:07d}.safetensors"


def folder_of(out: Path, inputs: Inputs) -> Path:
    """Return the folder of finished batches, after deleting those of a run with other inputs."""
    partial = out / "partial"
    fingerprint = partial / "inputs.json"
    if is_of(fingerprint, inputs):
        return partial
    # Before the fingerprint changes, so that a crash between the two leaves no batch of another run behind.
    delete_batches(partial)
    artifacts.write_json(fingerprint, inputs)
    return partial


def delete_batches(partial: Path) -> None:
    for path in partial.iterdir() if partial.is_dir() else ():
        if _OF_A_RUN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def is_of(fingerprint: Path, inputs: Inputs) -> bool:
    try:
        return artifacts.read_json(fingerprint, Inputs) == inputs
    except ArtifactError:
        return False


def read_batch(file: Path) -> Arrays:
    try:
        return artifacts.read_arrays(file)
    except ArtifactError as error:
        raise ArtifactError(error.message, f"Delete {file} and repeat the command: it goes on from the other batches.") from None
