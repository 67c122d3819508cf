"""A model with a part of its experts in real workers of the local twin, and the plain model beside it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from remoe_cli.cages import Mechanism
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import attach
from remoe_cli.model.loader import load, load_gpu_experts
from remoe_cli.model.shards import write_shards
from remoe_cli.model.shared_experts import start_early
from remoe_cli.package.bundle import HANDLER, function_zip
from remoe_cli.runtime.dispatch import Dispatcher, RemoteFunction
from remoe_cli.runtime.invoke import make_client
from tests.support.shards import shard_environment
from tests.support.twin import run_twin


@contextmanager
def split_model(
    checkpoint: Checkpoint,
    local: Mapping[int, tuple[int, ...]],
    parts: Mapping[int, Sequence[tuple[int, ...]]],
    folder: Path,
    probed: Mechanism,
    *,
    memory_mb: int = 1769,
    gpu: Mapping[int, tuple[int, ...]] | None = None,
    device: str = "cpu",
) -> Iterator[tuple[PreTrainedModel, Dispatcher]]:
    """The model with the experts `local` and `gpu` of each layer, the others in twin workers: a function for each of a layer's `parts`.

    On the CPU those of `gpu` are local experts as the rest, as the engine has it.
    """
    there = {} if device == "cpu" else dict(gpu or {})
    if device == "cpu" and gpu:
        local = {layer: tuple(sorted({*experts, *gpu.get(layer, ())})) for layer, experts in local.items()}
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(write_shards(checkpoint, dict(parts), 1, folder / "bundle"))
    replicas = 2 if all(len(each) == 1 for each in parts.values()) else 1
    functions: dict[int, list[RemoteFunction]] = {}
    for shard in shards:
        functions.setdefault(shard.layer, []).append(RemoteFunction(shard.path.stem, shard.experts, replicas, 0.0))
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(folder / "code")
    configs = [
        FunctionConfig(
            name=shard.path.stem,
            handler=HANDLER,
            code_dir=str(folder / "code"),
            environment=shard_environment(shard.path),
            memory_mb=memory_mb,
            timeout_s=60,
            reserved_concurrency=replicas,
        )
        for shard in shards
    ]
    calls = max((replicas * len(each) for each in parts.values()), default=1)
    with run_twin(configs, folder / "logs", probed) as twin, ThreadPoolExecutor(calls) as pool:
        model = load(checkpoint, local, device=device)
        dispatcher = Dispatcher(
            client=make_client(twin.endpoint, calls, 60),
            local={layer: {e: row for row, e in enumerate(experts)} for layer, experts in local.items()},
            remote=functions,
            pool=pool,
            gpu=load_gpu_experts(checkpoint, model, there, device),
            starts=start_early(model) if device != "cpu" else {},
        )
        attach(model, dispatcher)
        yield model, dispatcher
        dispatcher.client.close()
