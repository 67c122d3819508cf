"""Writing the experts that leave: one safetensors file a layer, each expert one contiguous range.

function/weights.py reads what is written here, without torch and without the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from remoe_cli.artifacts import atomic_path
from remoe_cli.errors import ModelError
from remoe_cli.function.weights import ExpertFile
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import ExpertLayer, expert_layers
from remoe_cli.model.ffn import describe, prove_same
from remoe_cli.model.loader import load

# Experts held in memory at once while packaging; a layer is never divided.
_BATCH_BYTES = 2 << 30


def write_shard(path: Path, layer: ExpertLayer, experts: Sequence[int]) -> None:
    """Write the layer's rows as the shard of `experts` (row i is experts[i]), after proving the function's arithmetic on one."""
    from safetensors.torch import save_file

    spec = describe(layer)
    prove_same(layer, 0, spec)
    # Sorted by name, which is how safetensors lays tensors of one dtype out, an expert's tensors stand together.
    tensors = {f"{e:05d}.{name}": p[row].contiguous() for row, e in enumerate(experts) for name, p in layer.parameters().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"ffn": json.dumps(asdict(spec))})
        _check_contiguous(ExpertFile(temporary), layer)


def _check_contiguous(shard: ExpertFile, layer: ExpertLayer) -> None:
    ranges = [shard.range(e) for e in shard.experts]
    if any(last > first for (_, last), (first, _) in pairwise(ranges)):
        raise ModelError(
            f"The experts of layer {layer.layer} mix number types, so an expert is not one range of a file.", "Keep this model local."
        )


def write_shards(
    checkpoint: Checkpoint, remote: Mapping[int, Sequence[int]], expert_bytes: int, folder: Path
) -> Iterator[tuple[int, Path]]:
    """Write `layer-NNN.safetensors` for every layer of `remote`; yields each as it is done. Memory stays bounded."""
    batch: list[int] = []
    for layer in sorted(layer for layer, experts in remote.items() if experts):
        if batch and sum(len(remote[x]) for x in (*batch, layer)) * expert_bytes > _BATCH_BYTES:
            yield from _write_batch(checkpoint, {x: remote[x] for x in batch}, folder)
            batch = []
        batch.append(layer)
    if batch:
        yield from _write_batch(checkpoint, {x: remote[x] for x in batch}, folder)


def _write_batch(checkpoint: Checkpoint, remote: Mapping[int, Sequence[int]], folder: Path) -> Iterator[tuple[int, Path]]:
    layers = {x.layer: x for x in expert_layers(load(checkpoint, remote))}
    for number, experts in remote.items():
        path = folder / f"layer-{number:03d}.safetensors"
        write_shard(path, layers[number], experts)
        yield number, path
