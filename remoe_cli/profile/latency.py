"""Measures on this machine the times that the cost model needs.

Every figure is a median of repetitions. An expert is timed for several counts of tokens and vCPUs, and a curve is fitted to its times
(curves.py). The main process and the function compute an expert differently: this module times the former, function_latency.py the
latter. All other modules of the model are timed layer by layer. Where the model is on an accelerator, these are timed there and the
experts on the CPU, because remoe keeps experts in CPU memory.

Source: method.md, section 2.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli import interrupts
from remoe_cli.model.experts import ExpertLayer, attach, run_expert, run_experts
from remoe_cli.profile.curves import EXPONENTIAL, PHYSICAL, ROOFLINE, fit, fit_linear
from remoe_cli.profile.function_latency import function_expert
from remoe_cli.profile.latency_record import Latency, LayerTimes, Linear, MeasuredPoint

_TOKENS = (1, 4, 16, 64, 256)
_PROMPT_TOKENS = (16, 64, 192)
_CACHED_TOKENS = 64
_ROUNDS = 3  # each of them times everything, so that a busy spell of the machine is in a part of all figures
_ROUND_S = 0.05  # of calls of an expert for one setting in a round
_FORWARD_S, _PASSES_S = 0.17, 5.0  # of forward passes for one setting in a round, and in all rounds
_TOO_LONG_S = 2.0  # more tokens are not tried after a call this long


def measure(model: PreTrainedModel, load_s: float) -> Latency:
    """Measure all times of a loaded model, which takes about 10 s for a small one.

    What is attached to the model's experts hook is detached."""
    layers = attach(model, _without_experts).layers
    with torch.inference_mode():
        nonexpert = _nonexpert(model, _decoder_layers(model, layers[0]))
        on_cpu = _on_cpu(layers)
        local = fit(_local_points(on_cpu), [EXPONENTIAL, PHYSICAL, ROOFLINE])
        copied = _copy(model.device, layers[0])
    totals = [sum(column) for column in zip(*nonexpert.seconds, strict=True)]
    return Latency(
        source="measured",
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        measured_on=date.today().isoformat(),
        main_vcpus=torch.get_num_threads(),
        nonexpert_prefill=fit_linear(_PROMPT_TOKENS, totals[1:]),
        nonexpert_decode_s=totals[0],
        nonexpert_layers=nonexpert,
        local_expert=local,
        remote_expert=function_expert(on_cpu),
        copy_s=copied,
        load_s=load_s,
    )


def _without_experts(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run a layer with experts that take no time, so that grouping rows and adding outputs count as non-expert time."""
    return run_experts(layer, hidden, index, weights, {}, lambda _, rows: lambda: rows)


# Non-expert modules


def _decoder_layers(model: PreTrainedModel, layer: ExpertLayer) -> dict[str, nn.Module]:
    """Return all decoder layers by name, also those without experts: the siblings of the one that holds `layer`."""
    parent = layer.name.rpartition(f".{layer.layer}.")[0]
    return {f"{parent}.{name}": module for name, module in model.get_submodule(parent).named_children()}


def _nonexpert(model: PreTrainedModel, layers: dict[str, nn.Module]) -> LayerTimes:
    settings = [(1, _CACHED_TOKENS), *((n, 0) for n in _PROMPT_TOKENS)]
    passes = _passes(model, layers, settings)
    columns = [[statistics.median(times) for times in zip(*runs, strict=True)] for runs in passes]
    wholes = [[sum(one) for one in runs] for runs in passes]
    return LayerTimes(
        names=(*layers, "rest"),
        tokens=(0, *_PROMPT_TOKENS),
        seconds=tuple(zip(*columns, strict=True)),
        spread=max(statistics.median(seconds) / min(seconds) for seconds in wholes),
    )


def _passes(model: PreTrainedModel, layers: dict[str, nn.Module], settings: Sequence[tuple[int, int]]) -> list[list[list[float]]]:
    """Time forward passes for each setting: a number of tokens, after a number of cached ones.

    Returns: for each setting and pass, the seconds of each layer and of the rest.
    """
    forwards = [_forward(model, tokens, cached) for tokens, cached in settings]
    passes: list[list[list[float]]] = [[] for _ in settings]
    with _timed(list(layers.values()), model.device) as seconds:
        for forward, done in [*zip(forwards, passes, strict=True)] * _ROUNDS:
            before = spent = sum(map(sum, done))
            while spent - before < _FORWARD_S and spent < _PASSES_S:
                interrupts.check()
                seconds[:] = [0.0] * len(seconds)
                start = _now(model.device)
                forward()
                whole = _now(model.device) - start
                done.append([*seconds, whole - sum(seconds)])
                spent += whole
    return passes


def _forward(model: PreTrainedModel, tokens: int, cached: int) -> Callable[[], object]:
    """Prepare a forward pass of `tokens` tokens after `cached` ones, and run it once."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, cached + tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = model(input_ids=ids[:, :cached], use_cache=True, logits_to_keep=1).past_key_values if cached else None
    forward = partial(model, input_ids=ids[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    forward()
    return forward


@contextmanager
def _timed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Add to the list that it yields the seconds that each module spends in forward, until the context ends."""
    seconds = [0.0] * len(modules)

    def start(i: int, *_: object) -> None:
        seconds[i] -= _now(device)

    def stop(i: int, *_: object) -> None:
        seconds[i] += _now(device)

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(partial(start, i)).remove)
            stack.callback(module.register_forward_hook(partial(stop, i)).remove)
        yield seconds


def _now(device: torch.device) -> float:
    """Wait until an accelerator has done all its work, and return the time in seconds."""
    if device.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
    return time.perf_counter()


# Experts of the main process


def _on_cpu(layers: Sequence[ExpertLayer]) -> Sequence[ExpertLayer]:
    """Return the layers, or a copy of the first one on the CPU if they are on an accelerator."""
    if all(p.device.type == "cpu" for layer in layers for p in layer.parameters().values()):
        return layers
    return [replace(layers[0], module=copy.deepcopy(layers[0].module).to("cpu"))]


def _local_points(layers: Sequence[ExpertLayer]) -> list[MeasuredPoint]:
    dtype = next(iter(layers[0].parameters().values())).dtype
    # Another layer each time, so that weights come from memory as they do in real decoding.
    experts = cycle([(layer, row) for row in range(layers[0].experts) for layer in layers])
    rows = {n: torch.randn((n, layers[0].width), generator=torch.Generator().manual_seed(0)).to(dtype) for n in _TOKENS}
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    most, before = _TOKENS[-1], torch.get_num_threads()
    try:
        for threads in _thread_counts() * _ROUNDS:
            torch.set_num_threads(threads)
            run_expert(*next(experts), rows[_TOKENS[0]])  # starts the threads
            for n in _TOKENS:
                spent = 0.0
                while spent < _ROUND_S and n <= most:
                    interrupts.check()
                    start = time.perf_counter()
                    run_expert(*next(experts), rows[n])
                    last = time.perf_counter() - start
                    times[n, threads].append(last)
                    spent += last
                    most = n if last > _TOO_LONG_S else most
    finally:
        torch.set_num_threads(before)
    return [MeasuredPoint(tokens=n, vcpus=threads, seconds=statistics.median(t)) for (n, threads), t in times.items()]


def _thread_counts() -> list[int]:
    """Return the powers of two up to the number of cores, and that number."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(1 << i for i in range(cores.bit_length()))})


def _copy(device: torch.device, layer: ExpertLayer) -> Linear:
    """Time copying the hidden states of n tokens from one device to another: half of the way there and back."""
    if device.type == "cpu":
        return Linear(fixed_s=0.0, per_token_s=0.0)
    dtype = next(iter(layer.parameters().values())).dtype
    medians = []
    for n in _TOKENS:
        hidden, times = torch.zeros((n, layer.width), dtype=dtype, device=device), []
        for _ in range(20):
            start = _now(device)
            hidden.to("cpu").to(device)
            times.append((_now(device) - start) / 2)
        medians.append(statistics.median(times))
    return fit_linear(_TOKENS, medians)
