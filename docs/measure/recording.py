"""Prints what recording costs: prefill and decode with the recorder against the same run without it, and whole profiling against
a plain loop over the same prompts.

    python docs/measure/recording.py [--dtype float32|bfloat16] [--prompts N] [--new-tokens N]

Everything in one process, in turn, each time in another order; ratios are of times that lie close together, and their median counts.
The plain loop takes the prompts as they come: that `record` runs prompts of similar length together is part of its figure.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from remoe_cli.cli.demo import _prompts
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.experts import IMPLEMENTATION, attach
from remoe_cli.model.loader import load
from remoe_cli.model.spec import read_spec
from remoe_cli.model.tokens import encode, has_chat_template, load_tokenizer
from remoe_cli.profile.partial import Inputs
from remoe_cli.profile.record import DatasetRef, ModelRef, RecordingSettings
from remoe_cli.profile.routing import RoutingRecorder, record_batch
from remoe_cli.profile.run import record

BATCH, LIMIT = 16, 512
OVERHEAD_BATCH, OVERHEAD_ROUNDS, ROUNDS = 8, 9, 3


def in_turn(ways: dict[str, Callable[[], object]], turn: int) -> dict[str, float]:
    """The seconds that each way takes; every turn begins with another one."""
    first = turn % len(ways)
    names = [*ways][first:] + [*ways][:first]
    return {name: timed(ways[name]) for name in names}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(what: str, ratios: list[float]) -> None:
    print(f"{what:<52}median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> Any:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, disable_compile=True, pad_token_id=0
        )


def overhead(model: Any, prompts: list[list[int]], experts: int, new_tokens: int) -> None:
    """One batch with the recorder, counting included, and the same eager experts without it; prefill is a generation of one token."""
    recorder = RoutingRecorder()

    def without(tokens: int) -> None:
        model.set_experts_implementation("eager")
        generate(model, prompts, tokens)

    def recording(tokens: int) -> None:
        attach(model, recorder)
        record_batch(model, recorder, prompts, experts, tokens, tokens)

    ways: dict[str, Callable[[], object]] = {
        "without": lambda: without(1),
        "recording": lambda: recording(1),
        "without, whole": lambda: without(new_tokens),
        "recording, whole": lambda: recording(new_tokens),
    }
    taken = [in_turn(ways, turn) for turn in range(OVERHEAD_ROUNDS + 1)][1:]  # the first warms up
    show("prefill, recording / without", [t["recording"] / t["without"] for t in taken])
    show(
        "decode, recording / without",
        [(t["recording, whole"] - t["recording"]) / (t["without, whole"] - t["without"]) for t in taken],
    )


def throughput(path: str, model: Any, texts: tuple[str, ...], new_tokens: int) -> None:
    """`record` as `remoe profile` runs it, files included, against tokenizing and generating batch after batch."""
    checkpoint = find(path)
    tokenizer, spec = load_tokenizer(checkpoint), read_spec(checkpoint)
    inputs = Inputs(
        model=ModelRef(path=path, revision=checkpoint.revision),
        dataset=DatasetRef(source="demo", field="prompt", prompts=len(texts), sha256=""),
        settings=RecordingSettings(
            max_new_tokens=new_tokens,
            max_prompt_tokens=LIMIT,
            batch_size=BATCH,
            chat_template=has_chat_template(tokenizer),
            dtype=spec.dtype,
        ),
        spec=spec,
    )

    def plain(start: int, implementation: str) -> None:
        model.set_experts_implementation(implementation)
        generate(model, [encode(tokenizer, text, LIMIT) for text in texts[start : start + BATCH]], new_tokens)

    def profiling(loop: Iterator[int]) -> None:
        model.set_experts_implementation(IMPLEMENTATION)
        next(loop)

    taken = []
    for turn in range(ROUNDS):
        total: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            loop = record(model, tokenizer, inputs, texts, range(-(-len(texts) // BATCH)), Path(folder))
            for start in range(0, len(texts), BATCH):
                ways: dict[str, Callable[[], object]] = {
                    "profiling": partial(profiling, loop),
                    "grouped_mm": partial(plain, start, "grouped_mm"),
                    "eager": partial(plain, start, "eager"),
                }
                total.update(in_turn(ways, turn + start // BATCH))
        taken.append(total)
    show("throughput, profiling / plain loop (grouped_mm)", [t["grouped_mm"] / t["profiling"] for t in taken])
    show("throughput, profiling / plain loop (eager)", [t["eager"] / t["profiling"] for t in taken])
    rates = {name: len(texts) / statistics.median(t[name] for t in taken) for name in taken[0]}
    print("prompts per second: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    path = str(demo_model(options.dtype))
    model = load(find(path))
    texts = _prompts().texts[: options.prompts]
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"demo model in {options.dtype}, {len(texts)} prompts, batches of {BATCH} ({OVERHEAD_BATCH} for the first two), "
        f"{options.new_tokens} new tokens"
    )
    tokenizer, experts = load_tokenizer(find(path)), read_spec(find(path)).experts_per_layer
    overhead(model, [encode(tokenizer, text, LIMIT) for text in texts[:OVERHEAD_BATCH]], experts, options.new_tokens)
    throughput(path, model, texts, options.new_tokens)


if __name__ == "__main__":
    main()
