"""A model with a part of its experts in real workers of the local twin, and the plain model beside it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.invoke import make_client
from remoe_cli.runtime.last_resort import ShardPlace
from remoe_cli.runtime.remote_function import RemoteFunction
from tests.support.shards import shard_environment
from tests.support.twin import Running, run_twin


@dataclass(frozen=True)
class SplitTwin:
    """A twin with a function for each part of each layer, and `calls`, the most of them at once in a layer.

    The functions' shards are below `shards`.
    """

    twin: Running
    functions: Mapping[int, Sequence[RemoteFunction]]
    calls: int
    shards: Path


@contextmanager
def split_twin(
    checkpoint: Checkpoint,
    parts: Mapping[int, Sequence[tuple[int, ...]]],
    folder: Path,
    probed: Mechanism,
    *,
    memory_mb: int = 1769,
    handler: str = HANDLER,
    code: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    **network: float,
) -> Iterator[SplitTwin]:
    """The twin workers of a model. `code` is by file name, of a `handler` other than the functions' own; `network` is for `run_twin`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(write_shards(checkpoint, dict(parts), 1, folder / "bundle"))
    replicas = 2 if all(len(each) == 1 for each in parts.values()) else 1
    functions: dict[int, list[RemoteFunction]] = {}
    configs = []
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(folder / "code")
    for name, text in (code or {}).items():
        (folder / "code" / name).write_text(text)
    for shard in shards:
        own = shard_environment(shard.path)
        head_bytes, _, head_sha256 = own["REMOE_SHARD_HEADER"].partition(":")
        place = ShardPlace(shard.path.name, int(head_bytes), head_sha256)
        functions.setdefault(shard.layer, []).append(RemoteFunction(shard.path.stem, shard.experts, replicas, 0.0, shard=place))
        configs.append(
            FunctionConfig(
                name=shard.path.stem,
                handler=handler,
                code_dir=str(folder / "code"),
                environment=own | dict(environment or {}),
                memory_mb=memory_mb,
                timeout_s=60,
                reserved_concurrency=replicas,
            )
        )
    calls = max((replicas * len(each) for each in parts.values()), default=1)
    with run_twin(configs, folder / "logs", probed, **network) as twin:
        yield SplitTwin(twin, functions, calls, folder / "bundle")


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
    **network: float,
) -> Iterator[tuple[PreTrainedModel, Dispatcher]]:
    """The model with the experts `local` and `gpu` of each layer, the others in twin workers: a function for each of a layer's `parts`.

    On the CPU those of `gpu` are local experts as the rest, as the engine has it.
    """
    there = {} if device == "cpu" else dict(gpu or {})
    if device == "cpu" and gpu:
        local = {layer: tuple(sorted({*experts, *gpu.get(layer, ())})) for layer, experts in local.items()}
    with split_twin(checkpoint, parts, folder, probed, memory_mb=memory_mb, **network) as made, ThreadPoolExecutor(made.calls) as pool:
        model = load(checkpoint, local, device=device)
        dispatcher = Dispatcher(
            client=make_client(made.twin.endpoint, made.calls, 60),
            local={layer: {e: row for row, e in enumerate(experts)} for layer, experts in local.items()},
            remote=made.functions,
            pool=pool,
            gpu=load_gpu_experts(checkpoint, model, there, device),
            starts=start_early(model) if device != "cpu" else {},
        )
        attach(model, dispatcher)
        yield model, dispatcher
        dispatcher.client.close()
