"""Writing the experts that leave: one safetensors file a function, each expert one contiguous range.

function/weights.py reads what is written here, without torch and without the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from remoe_cli.artifacts import atomic_path
from remoe_cli.errors import ModelError
from remoe_cli.function.weights import ExpertFile
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import ExpertLayer, expert_layers
from remoe_cli.model.ffn import describe, prove_same
from remoe_cli.model.loader import load

# Experts held in memory at once while packaging; those of one function are never divided.
_BATCH_BYTES = 2 << 30


def write_shard(path: Path, layer: ExpertLayer, experts: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """Write the shard of `experts`, after proving the function's arithmetic on one; `rows` are theirs in the layer's parameters, by
    default the first ones in that order. Raises ModelError for experts that a function cannot serve."""
    from safetensors.torch import save_file

    spec = describe(layer)
    prove_same(layer, 0, spec)
    rows = range(len(experts)) if rows is None else rows
    # Sorted by name, which is how safetensors lays tensors of one dtype out, an expert's tensors stand together.
    tensors = {
        f"{e:05d}.{name}": p[row].contiguous() for e, row in zip(experts, rows, strict=True) for name, p in layer.parameters().items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"ffn": json.dumps(asdict(spec))})
        _check_contiguous(ExpertFile(temporary), layer)


def _check_contiguous(shard: ExpertFile, layer: ExpertLayer) -> None:
    ranges = [shard.range(e) for e in shard.experts]
    if any(last > first for (_, last), (first, _) in pairwise(ranges)):
        raise ModelError(
            f"The experts of layer {layer.layer} mix number types, so an expert is not one range of a file.", "Keep this model local."
        )


@dataclass(frozen=True)
class Shard:
    """The experts of one function, in one file."""

    layer: int
    experts: tuple[int, ...]
    path: Path


def write_shards(checkpoint: Checkpoint, parts: Mapping[int, Sequence[Sequence[int]]], expert_bytes: int, folder: Path) -> Iterator[Shard]:
    """Write a shard for each group of experts in `parts`, by hidden layer; yields each as it is done. Memory stays bounded.

    They are named `layer-NNN.safetensors`, or `layer-NNN-P.safetensors`, P from 0, where a layer has several.
    """
    batch: list[Shard] = []
    for shard in _shards(parts, folder):
        if batch and sum(len(x.experts) for x in (*batch, shard)) * expert_bytes > _BATCH_BYTES:
            yield from _write_batch(checkpoint, batch)
            batch = []
        batch.append(shard)
    if batch:
        yield from _write_batch(checkpoint, batch)


def _shards(parts: Mapping[int, Sequence[Sequence[int]]], folder: Path) -> Iterator[Shard]:
    for layer in sorted(parts):
        for part, experts in enumerate(parts[layer]):
            suffix = f"-{part}" if len(parts[layer]) > 1 else ""
            yield Shard(layer, tuple(experts), folder / f"layer-{layer:03d}{suffix}.safetensors")


def _write_batch(checkpoint: Checkpoint, batch: Sequence[Shard]) -> Iterator[Shard]:
    held: dict[int, list[int]] = {}
    for shard in batch:
        held[shard.layer] = sorted((*held.get(shard.layer, ()), *shard.experts))
    layers = {x.layer: x for x in expert_layers(load(checkpoint, held))}
    for shard in batch:
        write_shard(shard.path, layers[shard.layer], shard.experts, [held[shard.layer].index(e) for e in shard.experts])
        yield shard
