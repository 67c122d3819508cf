"""Load a main function: from the checkpoint that was profiled, or from packaged files."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from remoe_cli import artifacts
from remoe_cli.model.checkpoint import Checkpoint, find_profiled
from remoe_cli.runtime.device_choice import DeviceChoice
from remoe_cli.runtime.invoke import Connect, Invocation, make_caller
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.read_ahead import reading_ahead, spans
from remoe_cli.runtime.receipt import Loading, attach, failed_receipt
from remoe_cli.runtime.server_config import ServerConfig

if TYPE_CHECKING:
    from remoe_cli.runtime.last_resort import LastResort
    from remoe_cli.runtime.remote_function import RemoteFunction
    from remoe_cli.runtime.start_ahead import Starting

_CONFIG = "server.json"
_log = logging.getLogger(__name__)  # without a handler, its warnings go to stderr: the log of a main function


def load(
    config: ServerConfig,
    checkpoint: Checkpoint,
    connect: Connect,
    *,
    device: DeviceChoice | None = None,
    copied: bool = False,
    reads: int = 0,
    last_resort: LastResort | None = None,
    assistant: Checkpoint | None = None,
    starting: Starting | None = None,
) -> MainFunction:
    """Load the main function's weights and its assistant, and start its expert functions.

    With `starting` they start already, else `connect` reaches them. With `copied`, all weights are copied into memory, so that it does not
    matter what becomes of their files. `reads` of S3 brought them. Once it is loaded, `last_resort` computes what an expert function does
    not; a function that does not start is an error.

    Raises: ModelError for a checkpoint that cannot be loaded, InvokeError when an expert function does not start, DeployError when a plan
    for a GPU finds none that it can use. The error carries the receipt of what was billed until then.
    """
    begun_s = time.perf_counter()  # importing torch is a part of loading
    functions, sent = _functions(config), starting.sent if starting else list[Invocation]()
    try:
        starting = starting or _start(functions, config, connect, device, sent)
        _import_engine()
        from remoe_cli.runtime.engine import start_engine
        from remoe_cli.runtime.expert_cache import cache_of

        engine = start_engine(
            checkpoint,
            config.spec,
            functions,
            connect,
            gpu=config.gpu,
            gpu_experts=config.gpu_experts,
            device=device,
            copied=copied,
            sent=sent,
            policy=config.start_ahead,
            starting=starting,
            assistant=assistant,
        )
        engine.warm_up()
        engine.dispatcher.caller.last_resort = last_resort
        if config.cache_experts and last_resort:
            engine.dispatcher.cache = cache_of(config, functions, last_resort)
        elif config.cache_experts:
            _log.warning("No experts are kept in spare memory: nothing says where the shards are ($REMOE_SHARDS).")
    except Exception as error:
        attach(error, failed_receipt(config.prices, 0.0, (), Loading(seconds=time.perf_counter() - begun_s, reads=reads), sent))
        raise
    calls = tuple(engine.dispatcher.take())
    loading = Loading(seconds=time.perf_counter() - begun_s, reads=reads)
    main = MainFunction(config, engine, loading, calls, expected=config.predictor)
    main.spent.loading.add(main.loading_receipt)
    if main.concurrency < config.concurrency:
        _log.warning(
            "The plan counts on %d requests at once, and a model of family '%s' answers one at a time: its cache cannot be shared.",
            config.concurrency,
            config.spec.family,
        )
    if main.speculate != config.speculate:
        _log.warning(
            "No drafts are tried (--speculate %s): the cache of a model of family '%s' cannot take wrong tokens back.",
            config.speculate,
            config.spec.family,
        )
    return main


def _functions(config: ServerConfig) -> dict[int, list[RemoteFunction]]:
    """Return the expert functions by hidden layer."""
    from remoe_cli.runtime.last_resort import ShardPlace
    from remoe_cli.runtime.remote_function import RemoteFunction

    functions: dict[int, list[RemoteFunction]] = {}
    for f in config.functions:
        at = ShardPlace.of(f)
        called = RemoteFunction(f.function, f.experts, f.replicas, f.expert_rows, f.timeout_s, at, f.use, f.start_usd, f.expert_usd)
        functions.setdefault(f.layer, []).append(called)
    return functions


def _start(
    functions: dict[int, list[RemoteFunction]],
    config: ServerConfig,
    connect: Connect,
    device: DeviceChoice | None,
    sent: list[Invocation],
) -> Starting | None:
    """Start the expert functions before torch is imported, unless that may show that there is no GPU: then nothing was spent."""
    from remoe_cli.runtime.start_ahead import start_all

    on_cpu = not config.gpu and device in (None, "cpu")
    return start_all(functions, connect, sent, config.start_ahead) if on_cpu else None


def load_here(
    server_json: Path,
    connect: Connect,
    device: DeviceChoice | None = None,
    last_resort: LastResort | None = None,
    cache_experts: bool | None = None,
) -> MainFunction:
    """Load from the checkpoint that was profiled, on this machine. The checkpoint may change afterwards.

    Everything but the experts is on `device`; None: where the plan has it. `last_resort` is by default that of a deployment of the twin,
    whose bundle is beside server.json. `cache_experts`: whether remote experts are kept in spare memory; None: as deployed.

    Raises: ArtifactError when the checkpoint has changed, and what `load` raises.
    """
    config = artifacts.read_json(server_json, ServerConfig)
    if cache_experts is not None:
        config = config.model_copy(update={"cache_experts": cache_experts})
    model = config.model
    checkpoint = find_profiled(model.path, model.revision)
    other = config.assistant
    assistant = find_profiled(other.path, other.revision) if other else None
    from remoe_cli.runtime.last_resort import LastResort

    last_resort = last_resort or LastResort(str(server_json.parent / "bundle"))
    elsewhere: dict[int, list[int]] = {}
    for f in config.functions:
        elsewhere.setdefault(f.layer, []).extend(f.experts)
    with reading_ahead(lambda: spans(checkpoint, elsewhere, config.spec.experts_per_layer)):
        main = load(config, checkpoint, connect, device=device, copied=True, last_resort=last_resort, assistant=assistant)
    checkpoint.check(model.revision)
    if assistant and other:
        assistant.check(other.revision)
    return main


def load_packaged(uri: str) -> MainFunction:
    """Load from the packaged files whose manifest is at `uri` (runtime/fetch.py).

    Expert functions are called on AWS, or on the local twin if $REMOE_ENDPOINT names it. Their shards are in the same bucket, or in the
    folder $REMOE_SHARDS.

    Raises: what runtime/fetch.py and `load` raise.
    """
    begun_s, reads, known, starting = time.perf_counter(), list[None](), list[ServerConfig](), list["Starting"]()
    connect = partial(make_caller, os.environ.get("REMOE_ENDPOINT"))
    from remoe_cli.package.assistant_files import packaged_assistant
    from remoe_cli.runtime.fetch import fetch, scratch_folder
    from remoe_cli.runtime.last_resort import LastResort

    def on_file(file: Path) -> None:
        """Start the expert functions as soon as it is known which they are."""
        if file.name == _CONFIG:
            known.append(artifacts.read_json(file, ServerConfig))
            started = _start(_functions(known[0]), known[0], connect, None, [])
            starting.extend([started] if started else [])

    with _importing_engine():
        try:
            folder = fetch(uri, scratch_folder(), lambda: reads.append(None), on_file)
        except Exception as error:
            for started in starting:
                wait_for(started.starts)
                loading = Loading(seconds=time.perf_counter() - begun_s, reads=len(reads))
                attach(error, failed_receipt(known[0].prices, 0.0, (), loading, started.sent))
            raise
    fetched_s = time.perf_counter() - begun_s
    config = known[0] if known else artifacts.read_json(folder / _CONFIG, ServerConfig)
    checkpoint = Checkpoint(config.model.path, folder, config.model.revision)
    shards = "/".join(uri.split("/")[:3]) if uri.startswith("s3://") else os.environ.get("REMOE_SHARDS")
    last_resort = LastResort(shards) if shards else None
    first = next(iter(starting), None)
    with packaged_assistant(folder, config.assistant) as assistant:
        main = load(config, checkpoint, connect, reads=len(reads), last_resort=last_resort, assistant=assistant, starting=first)
    return replace(main, loading=main.loading.model_copy(update={"seconds": main.loading.seconds + fetched_s}))


@contextmanager
def _importing_engine() -> Iterator[None]:
    """Import the engine in a thread of its own while the body waits for files. What that raises, `load` raises again."""

    def run() -> None:
        with suppress(Exception):
            _import_engine()

    thread = Thread(target=run, name="import")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _import_engine() -> None:
    """Import the engine, and torch and transformers with it, without the garbage collector.

    It would go through what is imported again and again, and nothing of that is ever garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import remoe_cli.runtime.engine  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
