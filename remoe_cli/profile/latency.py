"""Measuring, on this machine, the times that the cost model needs (method section 2).

Every figure is a median over repetitions. Experts are timed against tokens and vCPUs and fitted (curves.py), those of the main process
here and those of the function in function_latency.py, because their arithmetic differs. Non-expert time is taken layer by layer.
With the model on an accelerator, non-expert time is the accelerator's and experts are timed on the CPU, where remoe keeps them.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_cli.model.experts import ExpertLayer, attach, run_expert, run_experts
from remoe_cli.profile.curves import EXPONENTIAL, PHYSICAL, ROOFLINE, fit, fit_linear
from remoe_cli.profile.function_latency import function_expert
from remoe_cli.profile.latency_record import Latency, LayerTimes, Linear, MeasuredPoint

_TOKENS = (1, 4, 16, 64, 256)
_PROMPT_TOKENS = (16, 64, 192)
_CACHED_TOKENS = 64
_ROUNDS, _ROUND_S = 3, 0.05  # every setting has its turn in each round, so that a busy spell of the machine hits all alike
_FORWARD_S, _PASSES, _PASSES_S = 0.5, 3, 5.0  # as many passes as fill the first; at least so many, unless they fill the last
_TOO_LONG_S = 2.0  # more tokens are not tried after a call this long


def measure(model: PreTrainedModel, load_s: float) -> Latency:
    """Measure everything; replaces what is attached to the model's hook. Takes 10 to 20 seconds for a small model."""
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
    """The hook's own work with experts that cost nothing, so that grouping and adding count as non-expert time."""
    return run_experts(layer, hidden, index, weights, {}, lambda _, rows: lambda: rows)


# Non-expert modules


def _decoder_layers(model: PreTrainedModel, layer: ExpertLayer) -> dict[str, nn.Module]:
    """All decoder layers by name, dense ones too: the siblings of the one that holds `layer`."""
    parent = layer.name.rpartition(f".{layer.layer}.")[0]
    return {f"{parent}.{name}": module for name, module in model.get_submodule(parent).named_children()}


def _nonexpert(model: PreTrainedModel, layers: dict[str, nn.Module]) -> LayerTimes:
    settings = [(1, _CACHED_TOKENS), *((n, 0) for n in _PROMPT_TOKENS)]
    passes = [_passes(model, layers, tokens, cached) for tokens, cached in settings]
    columns = [[statistics.median(times) for times in zip(*some, strict=True)] for some in passes]
    wholes = [[sum(one) for one in some] for some in passes]
    return LayerTimes(
        names=(*layers, "rest"),
        tokens=(0, *_PROMPT_TOKENS),
        seconds=tuple(zip(*columns, strict=True)),
        spread=max(statistics.median(seconds) / min(seconds) for seconds in wholes),
    )


def _passes(model: PreTrainedModel, layers: dict[str, nn.Module], tokens: int, cached: int) -> list[list[float]]:
    """Passes of `tokens` tokens after `cached` ones: the seconds of each layer and of the rest."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, cached + tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = model(input_ids=ids[:, :cached], use_cache=True, logits_to_keep=1).past_key_values if cached else None

    def forward() -> None:
        model(input_ids=ids[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    forward()
    passes: list[list[float]] = []
    with _timed(list(layers.values()), model.device) as seconds:
        while (spent := sum(map(sum, passes))) < _FORWARD_S or (len(passes) < _PASSES and spent < _PASSES_S):
            seconds[:] = [0.0] * len(seconds)
            start = _now(model.device)
            forward()
            whole = _now(model.device) - start
            passes.append([*seconds, whole - sum(seconds)])
    return passes


@contextmanager
def _timed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Inside, each module's time in forward is added to its place in the list."""
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
    """The time, once everything is done that an accelerator was given to do."""
    if device.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
    return time.perf_counter()


# Experts of the main process


def _on_cpu(layers: Sequence[ExpertLayer]) -> Sequence[ExpertLayer]:
    """The layers, or a copy of the first one where they are on an accelerator."""
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
    """1, 2, 4, .. and as many as there are cores."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(1 << i for i in range(cores.bit_length()))})


def _copy(device: torch.device, layer: ExpertLayer) -> Linear:
    """Hidden states of n tokens from one device to the other: half of there and back."""
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
