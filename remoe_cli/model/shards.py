"""Writing remote experts: one safetensors file for each expert function.

Each expert is one contiguous range of the file.

function/weights.py reads these files, without torch and without the safetensors library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli import interrupts, owned, recognise
from remoe_cli.errors import ModelError
from remoe_cli.function.expert_ffn import Array, FfnSpec, widen
from remoe_cli.function.weights import ALIGNMENT, TYPES, Quantised
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import ExpertLayer, expert_layers
from remoe_cli.model.ffn import describe, prove_same, to_storage
from remoe_cli.model.loader import load, read_config, skeleton
from remoe_cli.model.names import function_name
from remoe_cli.model.quantise import Integers, quantise
from remoe_cli.model.stored import quantisation
from remoe_cli.model.stored_experts import StoredExperts, as_json

# Experts held in memory at once while packaging; those of one function are never divided.
_BATCH_BYTES = 2 << 30
# Name, type as safetensors names it, and array.
Tensors = Sequence[tuple[str, str, Array]]
_SHARD = recognise.Made("shard", lambda path: {"ffn", "sha256"} <= recognise.safetensors_metadata(path).keys())


def write_shard(
    path: Path,
    layer: ExpertLayer,
    experts: Sequence[int],
    rows: Sequence[int] | None = None,
    like: Sequence[Path] = (),
    to: Integers | None = None,
) -> None:
    """Write the shard of `experts`, after checking the function's arithmetic on one of them.

    `rows` are the experts' rows in the layer's parameters; by default the first ones, in this order. `like` are the files that they come
    from: the shard can be read by no one who cannot read these. `to` quantises them.

    Raises: ModelError for experts that an expert function cannot serve.
    """
    spec = describe(layer)
    prove_same(layer, 0, spec)
    parameters = sorted(layer.parameters().items())
    if len({p.dtype for _, p in parameters}) > 1:
        raise ModelError(f"The experts of layer {layer.layer} mix number types.", "Keep all experts local.")
    rows = range(len(experts)) if rows is None else rows
    made = {} if to is None else {name: p for name, p in parameters if not name.endswith("_bias")}
    stored = {
        e: [tensor for name, p in parameters for tensor in _tensors(name, to_storage(p[row]), spec, to if name in made else None)]
        for e, row in sorted(zip(experts, rows, strict=True))
    }
    described = {name: Quantised(to.form, 1, tuple(p.shape[1:]), spec.transposed) for name, p in made.items() if to is not None}
    _write(path, stored.__getitem__, sorted(stored), spec, {"quantised": json.dumps(as_json(described))} if described else {}, like)


def _tensors(name: str, stored: Array, spec: FfnSpec, to: Integers | None) -> Tensors:
    """Return a parameter of one expert as the shard has it: as it is, or quantised."""
    if to is None:
        return [(name, TYPES[spec.dtype], stored)]
    quantised = quantise(widen(stored.T if spec.transposed else stored, spec.dtype), to, spec.dtype)
    return [(f"{name}.0.{role}", kind, array) for role, (kind, array) in sorted(quantised.items())]


def _write(
    path: Path, read: Callable[[int], Tensors], experts: Sequence[int], spec: FfnSpec, quantised: dict[str, Any], like: Sequence[Path]
) -> None:
    """Write the shard of `experts`, ascending; each is read twice, for the head and for the file."""
    with owned.writing(path, _SHARD, like) as temporary, temporary.open("wb") as file:
        file.write(_head(read, experts, spec, quantised))
        for expert in experts:
            for _, _, array in read(expert):
                file.write(array.reshape(-1).view(np.uint8).data)


def _head(read: Callable[[int], Tensors], experts: Sequence[int], spec: FfnSpec, quantised: dict[str, Any]) -> bytes:
    """Make the file's first part, up to its tensors, padded with the spaces that the format allows.

    It holds the digests of the tensors. The safetensors library cannot be used: it writes whole files only.
    """
    entries: dict[str, Any] = {}
    digests: dict[int, str] = {}
    end = 0
    for expert in experts:
        digest = hashlib.sha256()
        for name, kind, array in read(expert):
            digest.update(array.reshape(-1).view(np.uint8).data)
            offsets = [end, end := end + array.nbytes]
            entries[f"{expert:05d}.{name}"] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        digests[expert] = digest.hexdigest()
    metadata = {"ffn": json.dumps(asdict(spec)), "sha256": json.dumps(digests)} | quantised
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


@dataclass(frozen=True)
class WrittenShard:
    """The file with the experts of one expert function."""

    layer: int
    experts: tuple[int, ...]
    path: Path


def write_stored_shard(path: Path, stored: StoredExperts, layer: int, experts: Sequence[int], like: Sequence[Path] = ()) -> None:
    """Write the shard of experts of a quantised checkpoint, in its own tensors.

    One expert at a time is in memory.

    Raises: ModelError for experts that an expert function cannot serve.
    """
    experts = sorted(experts)
    spec, quantised = stored.described(layer, experts[0])
    _write(path, lambda e: stored.tensors(layer, e, quantised), experts, spec, {"quantised": json.dumps(as_json(quantised))}, like)


def write_shards(
    checkpoint: Checkpoint,
    groups: Mapping[int, Sequence[Sequence[int]]],
    expert_bytes: int,
    folder: Path,
    to: Integers | None = None,
) -> Iterator[WrittenShard]:
    """Write a shard for each group of experts, by hidden layer, and yield each when it is written.

    At most 2 GiB of experts are in memory at once, or one group if it is larger; of a quantised checkpoint, one expert. Files are named
    after `names.function_name`. `to` quantises experts of a checkpoint that is not quantised.
    """
    if to is None and (stored := _stored(checkpoint)) is not None:
        for shard in _shards(groups, folder):
            interrupts.check()
            write_stored_shard(shard.path, stored, shard.layer, shard.experts, checkpoint.weight_files)
            yield shard
        return
    batch: list[WrittenShard] = []
    for shard in _shards(groups, folder):
        if batch and sum(len(x.experts) for x in (*batch, shard)) * expert_bytes > _BATCH_BYTES:
            yield from _write_batch(checkpoint, batch, to)
            batch = []
        batch.append(shard)
    if batch:
        yield from _write_batch(checkpoint, batch, to)


def _stored(checkpoint: Checkpoint) -> StoredExperts | None:
    """Find the experts of a checkpoint if they are quantised."""
    if quantisation(checkpoint.path) is None:
        return None
    stored = StoredExperts(checkpoint, skeleton(read_config(checkpoint)))
    return stored if stored.is_quantised else None


def _shards(groups: Mapping[int, Sequence[Sequence[int]]], folder: Path) -> Iterator[WrittenShard]:
    for layer in sorted(groups):
        for number, experts in enumerate(groups[layer]):
            yield WrittenShard(layer, tuple(experts), folder / f"{function_name(layer, number, len(groups[layer]))}.safetensors")


def _write_batch(checkpoint: Checkpoint, batch: Sequence[WrittenShard], to: Integers | None) -> Iterator[WrittenShard]:
    held: dict[int, list[int]] = {}
    for shard in batch:
        held[shard.layer] = sorted((*held.get(shard.layer, ()), *shard.experts))
    layers, files = {x.layer: x for x in expert_layers(load(checkpoint, held))}, checkpoint.weight_files
    for shard in batch:
        interrupts.check()
        rows = [held[shard.layer].index(e) for e in shard.experts]
        write_shard(shard.path, layers[shard.layer], shard.experts, rows, files, to)
        yield shard
