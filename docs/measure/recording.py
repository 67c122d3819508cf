"""Prints what recording costs: prefill and decode with the recorder against the same run without it, and whole profiling against
a plain loop over the same prompts.

    python docs/measure/recording.py [--dtype float32|bfloat16] [--prompts N] [--new-tokens N]

Everything in one process, in turn, round after round; ratios are of a round's two times, and their median counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from remoe_cli.cli.demo import _prompts
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.experts import attach
from remoe_cli.model.loader import load
from remoe_cli.model.spec import read_spec
from remoe_cli.model.tokens import encode, has_chat_template, load_tokenizer
from remoe_cli.profile.record import DatasetRef, ModelRef, Settings
from remoe_cli.profile.routing import RoutingRecorder, record_batch
from remoe_cli.profile.run import Inputs, record

BATCH, ROUNDS, LIMIT = 16, 5, 512


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> Any:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, disable_compile=True, pad_token_id=2
        )


def overhead(model: Any, prompts: list[list[int]], new_tokens: int) -> None:
    """The same eager experts without and with the recorder behind the hook; decode is a whole generation less its prefill."""
    recorder = RoutingRecorder()

    def without(tokens: int) -> float:
        model.set_experts_implementation("eager")
        return timed(lambda: generate(model, prompts, tokens))

    def recording(tokens: int) -> float:
        experts = attach(model, recorder).layers[0].experts
        return timed(lambda: record_batch(model, recorder, prompts, experts, tokens, tokens))  # counting included

    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(ROUNDS + 1):
        ways = [without, recording] if turn % 2 else [recording, without]
        times = {way.__name__: (way(1), way(new_tokens)) for way in ways}
        if turn:  # the first round warms up
            ratios["prefill"].append(times["recording"][0] / times["without"][0])
            decode = {name: whole - prefill for name, (prefill, whole) in times.items()}
            ratios["decode"].append(decode["recording"] / decode["without"])
    for phase, values in ratios.items():
        print(f"{phase:<10}recording / without: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


def throughput(path: str, model: Any, texts: tuple[str, ...], new_tokens: int) -> None:
    """`record` as `remoe profile` runs it, files included, against tokenizing and generating batch after batch."""
    checkpoint = find(path)
    tokenizer, spec = load_tokenizer(checkpoint), read_spec(checkpoint)
    inputs = Inputs(
        model=ModelRef(path=path, revision=checkpoint.revision),
        dataset=DatasetRef(source="demo", field="prompt", prompts=len(texts), sha256=""),
        settings=Settings(
            max_new_tokens=new_tokens,
            max_prompt_tokens=LIMIT,
            batch_size=BATCH,
            chat_template=has_chat_template(tokenizer),
            dtype=spec.dtype,
        ),
        spec=spec,
    )

    def plain() -> None:
        for start in range(0, len(texts), BATCH):
            generate(model, [encode(tokenizer, text, LIMIT) for text in texts[start : start + BATCH]], new_tokens)

    def profiling() -> None:
        with tempfile.TemporaryDirectory() as folder:
            list(record(model, tokenizer, inputs, texts, range(-(-len(texts) // BATCH)), Path(folder)))

    ratios: dict[str, list[float]] = {"grouped_mm (default)": [], "eager": []}
    for _ in range(3):
        ours = timed(profiling)
        for name, values in ratios.items():
            model.set_experts_implementation(name.split()[0])
            values.append(timed(plain) / ours)
    for name, values in ratios.items():
        print(
            f"throughput of profiling / plain loop, {name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        )
    print(f"prompts per second, profiling: {len(texts) / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    path = str(demo_model(options.dtype))
    model = load(find(path))
    texts = _prompts().texts[: options.prompts]
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"demo model in {options.dtype}, {len(texts)} prompts, batches of {BATCH}, {options.new_tokens} new tokens"
    )
    tokenizer = load_tokenizer(find(path))
    overhead(model, [encode(tokenizer, text, LIMIT) for text in texts[:BATCH]], options.new_tokens)
    throughput(path, model, texts, options.new_tokens)


if __name__ == "__main__":
    main()
