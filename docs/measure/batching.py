"""What answering requests together is worth: throughput, cost and calls of 8 clients beside those of one.

    python docs/measure/batching.py [--clients 8] [--tokens 32] [--rounds 3] [--models demo,olmoe] [--rtt-ms 0]

Two models in float32: the demo model, and a random one with OLMoE's layers in a quarter of its width, about 1 GB. Every second expert of
each layer is in a function of the local twin, one function a layer. The same prompts are asked one after another and at once, in turns, and
the tokens have to be the same. The scheduler is the main server's own; HTTP is left out. Costs are those of the receipts, at the prices of
the catalog 'local'.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import random
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

OLMOE = {
    "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MEMORY_MB = 1769


@dataclass(frozen=True)
class Run:
    """What some requests took together."""

    seconds: float
    tokens: list[tuple[int, ...]]
    usd: float
    hook_calls: int
    invocations: int
    billed_ms: int

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="demo,olmoe")
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REMOE_STATE_DIR"] = f"{folder}/state"
        print(
            f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.rtt_ms:g} ms round trip"
        )
        print(f"{options.clients} requests of {options.tokens} tokens, one after another and at once; medians of {options.rounds} rounds")
        print("model   clients  tokens/s  ratio  USD per million tokens  ratio  hook calls  invocations  billed ms")
        for name in options.models.split(","):
            _measure(name, Path(folder), options)


def _measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    checkpoint, prompts = _demo(options.clients) if name == "demo" else _olmoe(folder / name, options.clients)
    with serving(name, checkpoint, folder, options) as main:
        for clients in (1, options.clients):
            _ask(main, prompts, clients, 4)
        runs: dict[int, list[Run]] = {1: [], options.clients: []}
        for _ in range(options.rounds):
            for clients, made in runs.items():
                made.append(_ask(main, prompts, clients, options.tokens))
        one, many = runs.values()
        assert all(run.tokens == one[0].tokens for run in (*one, *many)), "an answer has other tokens in a batch than alone"
        base_rate, base_usd = _figures(one)
        for clients, made in runs.items():
            rate, usd = _figures(made)
            line = f"{name:<8}{clients:>7}{rate:>10.1f}{rate / base_rate:>7.2f}{usd * 1e6:>24.2f}{usd / base_usd:>7.2f}"
            print(f"{line}{made[0].hook_calls:>12}{made[0].invocations:>13}{median(run.billed_ms for run in made):>11.0f}", flush=True)


def _figures(runs: Sequence[Run]) -> tuple[float, float]:
    return median(run.count / run.seconds for run in runs), median(run.usd / run.count for run in runs)


def _ask(main, prompts: Sequence[Sequence[int]], clients: int, tokens: int) -> Run:  # type: ignore[no-untyped-def]
    """Ask all prompts, at most `clients` at once; each client asks its next when it has its answer."""
    from dataclasses import replace

    from remoe_cli.runtime.main_function import Answer, Request
    from remoe_cli.runtime.scheduler import Job, Scheduler

    served = replace(main, config=main.config.model_copy(update={"concurrency": clients}))
    calls = main.engine.attachment.calls
    before, answers, done = calls.total(), dict[int, Answer](), threading.Semaphore(0)
    scheduler = Scheduler(THREAD, lambda: served)

    def ended(number: int, result: Answer | Exception) -> None:
        if isinstance(result, Answer):
            answers[number] = result
        else:
            print(f"{type(result).__name__}: {result}", file=sys.stderr)
        done.release()

    begun_s = time.perf_counter()
    for number, ids in enumerate(prompts):
        request = Request(prompt_token_ids=tuple(ids), max_new_tokens=tokens)
        scheduler.submit(Job(partial(served.answering, request, lambda piece: None, lambda: None), partial(ended, number)))
    for _ in prompts:
        done.acquire()
    seconds = time.perf_counter() - begun_s
    made = [answers[number] for number in range(len(prompts))]
    return Run(
        seconds,
        [answer.token_ids for answer in made],
        sum(answer.receipt.cost.total_usd for answer in made if answer.receipt.cost),
        calls.total() - before,
        sum(answer.receipt.invocations for answer in made),
        sum(answer.receipt.billed_ms for answer in made),
    )


THREAD = ThreadPoolExecutor(1, "model")


def expert_functions(checkpoint, spec, remote: Mapping[int, tuple[int, ...]], at: Path, use: tuple[float, ...] = ()):  # type: ignore[no-untyped-def]
    """Write the shard and the code of one function for each layer; return them for the twin, and as a main function knows them."""
    from remoe_cli.artifacts import sha256_bytes
    from remoe_cli.deploy.local.config import FunctionConfig
    from remoe_cli.function.weights import read_head
    from remoe_cli.model.shards import write_shards
    from remoe_cli.package.bundle import HANDLER, function_zip
    from remoe_cli.runtime.server_config import ServedFunction

    functions: list[FunctionConfig] = []
    served: list[ServedFunction] = []
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(at / "code")
    shards = write_shards(checkpoint, {layer: [experts] for layer, experts in remote.items()}, spec.expert_bytes, at / "bundle")
    for (layer, experts), shard in zip(remote.items(), shards, strict=True):
        head = read_head(shard.path)
        environment = {"REMOE_SHARD": str(shard.path), "REMOE_SHARD_HEADER": f"{len(head)}:{sha256_bytes(head)}"}
        served.append(
            ServedFunction(
                layer=layer, function=shard.path.stem, experts=experts, replicas=1, expert_rows=1.0, timeout_s=60,
                shard=shard.path.name, head_bytes=len(head), head_sha256=sha256_bytes(head), use=use,
            )
        )  # fmt: skip
        functions.append(
            FunctionConfig(
                name=shard.path.stem, handler=HANDLER, code_dir=str(at / "code"), environment=environment, memory_mb=MEMORY_MB,
                timeout_s=60, reserved_concurrency=1,
            )
        )  # fmt: skip
    return functions, served


@contextmanager
def serving(name, checkpoint, folder: Path, options: argparse.Namespace) -> Iterator[object]:  # type: ignore[no-untyped-def]
    """Deploy every second expert on the twin, and load the rest."""
    from remoe_cli.deploy.local import lifecycle
    from remoe_cli.deploy.local.config import TwinConfig
    from remoe_cli.model.spec import read_spec
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.cost import prices
    from remoe_cli.profile.record import ModelRef
    from remoe_cli.runtime.invoke import make_caller
    from remoe_cli.runtime.load_main import load
    from remoe_cli.runtime.receipt import Prices
    from remoe_cli.runtime.server_config import ServedFunction, ServerConfig

    spec, catalog = read_spec(checkpoint), read_catalog("local")
    remote = {layer: tuple(range(1, spec.experts_per_layer, 2)) for layer in spec.local_experts({})}
    served: list[ServedFunction] = []

    def prepare(at: Path) -> TwinConfig:
        functions, more = expert_functions(checkpoint, spec, remote, at)
        served.extend(more)
        return TwinConfig(name=name, functions=tuple(functions), rtt_ms=options.rtt_ms, python=sys.executable)

    status = lifecycle.start(name, prepare)
    try:
        held_mb = (spec.nonexpert_bytes + spec.routed_bytes / 2) / 2**20 + catalog.main.runtime_memory_mb
        menu = min((each for each in catalog.main.menu if each.memory_mb >= held_mb), key=lambda each: each.memory_mb)
        config = ServerConfig(
            model=ModelRef(path=checkpoint.name, revision=checkpoint.revision),
            spec=spec,
            functions=tuple(served),
            prices=Prices(catalog="local", main=prices.main_prices(catalog, menu), function=prices.function_prices(catalog)),
        )
        connect = partial(make_caller, status["endpoint"])
        yield THREAD.submit(load, config, checkpoint, connect).result()  # in the thread that computes (runtime/app.py)
    finally:
        lifecycle.destroy(name)


def _demo(count: int):  # type: ignore[no-untyped-def]
    from remoe_cli.cli.demo import _prompts
    from remoe_cli.model.checkpoint import find_named
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.tokens import encode, load_tokenizer

    checkpoint = find_named(str(demo_model("float32")))
    tokenizer = load_tokenizer(checkpoint)
    return checkpoint, [encode(tokenizer, text) for text in random.Random(0).sample(_prompts().texts, count)]


def _olmoe(folder: Path, count: int):  # type: ignore[no-untyped-def]
    """Write a random model, drawn so that its logits differ, and prompts of 16 to 96 tokens."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

    from remoe_cli.model.checkpoint import find

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**OLMOE, initializer_range=0.05), dtype=torch.float32)
    model.save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(100)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))).save_pretrained(folder)
    draw = random.Random(0)
    return find(str(folder)), [[draw.randrange(2, 50304) for _ in range(draw.randrange(16, 96))] for _ in range(count)]


if __name__ == "__main__":
    main()
    THREAD.shutdown()
