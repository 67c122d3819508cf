"""What remoe's products are worth (remoe_cli/model/products.py), beside torch's and transformers' eager passes, in turns.

    python docs/measure/products.py [--rounds 5] [--threads 1] [--models demo,olmoe] [--as-avx2]

First products in bfloat16 alone: ms of one, of weights that no cache holds, and whether both have the same bits. Then passes of whole
models with all experts local: the demo model, and a random one of about 1 GB with OLMoE's layers. Times are the processor's of one
thread, so that other programs count little; with more threads they are the clock's. With --as-avx2 torch computes as on a processor
that has AVX2 and nothing later.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from remoe_cli.function.products import Order, are_needed, orders
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.experts import attach, expert_layers, run_experts
from remoe_cli.model.loader import load
from remoe_cli.model.products import prepare_products

OLMOE = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 32, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
    "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SIZES = ((576, 576), (768, 576), (49152, 576), (2048, 2048), (1408, 2048))
ROWS = (1, 8, 64, 512)
BEYOND_CACHES = 200 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", default="demo,olmoe")
    parser.add_argument("--as-avx2", action="store_true")
    options = parser.parse_args()
    if options.as_avx2:
        if os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":  # torch reads it when it is loaded
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})
        torch._C._set_mkldnn_enabled(False)  # oneDNN has no products in bfloat16 there
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    load_now = os.getloadavg()[0]
    print(f"{date.today()}, {platform.machine()}, {_instructions(options.as_avx2)}, {os.cpu_count()} cores, load {load_now:.1f}")
    print(f"{options.threads} threads of torch")
    with torch.inference_mode():
        print(f"memory is read at {_memory_gb_s(clock, options.rounds):.1f} GB/s")
        print("weights        rows   torch, ms    remoe, ms   ratio    GB/s of remoe   same bits")
        for size in SIZES:
            _products(size, clock, options.rounds)
        print("model   pass             transformers, ms   remoe, ms   ratio   same logits")
        for name in options.models.split(","):
            _passes(name, clock, options.rounds)


def _instructions(as_avx2: bool) -> str:
    if not are_needed():
        return "instructions for bfloat16"
    return "as with AVX2 only" if as_avx2 else "AVX-512 without bfloat16" if Order.BLOCKS in orders() else "AVX2"


def _in_turns(works: dict[str, Callable[[], Any]], clock: Callable[[], float], rounds: int, times: int) -> dict[str, float]:
    """Return the median ms of each."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            for _ in range(times):
                work()
            taken[name].append((clock() - start) / times * 1e3)
    return {name: median(each[1:]) for name, each in taken.items()}


def _memory_gb_s(clock: Callable[[], float], rounds: int) -> float:
    held = torch.zeros(BEYOND_CACHES // 4)
    return BEYOND_CACHES / 1e6 / _in_turns({"sum": held.sum}, clock, rounds, 1)["sum"]


def _products(size: tuple[int, int], clock: Callable[[], float], rounds: int) -> None:
    each_bytes = size[0] * size[1] * 2
    count = max(1, BEYOND_CACHES // each_bytes)
    with torch.inference_mode(False):  # as models are loaded: torch multiplies by weights that are made in inference mode in another way
        plain = [torch.randn(size, dtype=torch.bfloat16) for _ in range(count)]
        ours = [_prepared(weight) for weight in plain]
    for rows in ROWS:
        x = torch.randn(rows, size[1], dtype=torch.bfloat16)
        weights, layers = cycle(plain), cycle(ours)
        works = {"torch": lambda: F.linear(x, next(weights)), "remoe": lambda: next(layers)(x)}  # noqa: B023 (used at once)
        ms = _in_turns(works, clock, rounds, max(1, count // rows))
        same = torch.equal(F.linear(x, plain[0]), ours[0](x))
        gb_s = each_bytes / 1e6 / ms["remoe"]
        print(
            f"{size[0]:>5} x {size[1]:<5}{rows:>6}{ms['torch']:>12.3f}{ms['remoe']:>13.3f}{ms['torch'] / ms['remoe']:>8.2f}"
            f"{gb_s:>17.1f}   {same}"
        )


def _prepared(weight: Tensor) -> torch.nn.Module:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    prepare_products(layer, [])
    return layer


def _passes(name: str, clock: Callable[[], float], rounds: int) -> None:
    theirs, ours = (_demo(), _demo()) if name == "demo" else (_olmoe(), _olmoe())
    theirs.set_experts_implementation("eager")
    layers = expert_layers(ours)
    local = {expert: expert for expert in range(layers[0].experts)}
    attach(ours, lambda layer, hidden, index, weights: run_experts(layer, hidden, index, weights, local, lambda *_: dict))
    prepare_products(ours, [layer.module for layer in layers])
    for tokens in (64, 512):
        prompt = torch.randint(3, 40000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        _compare(name, f"prompt of {tokens}", theirs, ours, clock, rounds, 1, input_ids=prompt)
    for sequences in (1, 8):
        prompt = torch.randint(3, 40000, (sequences, 65), generator=torch.Generator().manual_seed(sequences))
        _compare(name, f"{sequences} x one token", theirs, ours, clock, rounds, 5, input_ids=prompt)


def _compare(
    name: str,
    label: str,
    theirs: PreTrainedModel,
    ours: PreTrainedModel,
    clock: Callable[[], float],
    rounds: int,
    times: int,
    *,
    input_ids: Tensor,
) -> None:
    def work(model: PreTrainedModel) -> Callable[[], Tensor]:
        if times == 1:
            return lambda: model(input_ids, logits_to_keep=1).logits
        cache = model(input_ids[:, :-1]).past_key_values

        def decode() -> Tensor:
            logits: Tensor = model(input_ids[:, -1:], past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return decode

    works = {"theirs": work(theirs), "ours": work(ours)}
    same = torch.equal(works["theirs"](), works["ours"]())
    ms = _in_turns(works, clock, rounds, times)
    print(f"{name:<8}{label:<17}{ms['theirs']:>16.1f}{ms['ours']:>12.1f}{ms['theirs'] / ms['ours']:>8.2f}   {same}")


@torch.inference_mode(False)
def _demo() -> PreTrainedModel:
    return load(find(str(demo_model("bfloat16"))))


@torch.inference_mode(False)
def _olmoe() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = OlmoeForCausalLM._from_config(OlmoeConfig(**OLMOE), dtype=torch.bfloat16)
    return model.eval()


if __name__ == "__main__":
    main()
