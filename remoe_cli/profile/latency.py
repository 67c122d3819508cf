"""Measures on this machine the times that the cost model needs.

Every figure is a median of repetitions. An expert is timed alone for several counts of tokens and vCPUs, and what it takes longer in a
forward pass (pass_times.py) is counted at all of them. A curve is fitted to the result (curves.py). The main process and the function
compute an expert differently: this module times the former, function_latency.py the latter. All other modules of the model are timed layer
by layer, in the same passes. Where these are on an accelerator, the copies to the CPU and back are timed in the passes too, and an expert
on the accelerator alone.

Source: method.md, section 2.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from itertools import chain, cycle

import numpy as np
import torch
from transformers import PreTrainedModel

from remoe_cli import interrupts
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.experts import ExpertLayer, expert_layers, run_expert
from remoe_cli.model.gpu_experts import gpu_experts
from remoe_cli.model.products import prepare_products
from remoe_cli.model.quantise import Integers
from remoe_cli.openmp import usable_cores
from remoe_cli.profile.curves import EXPONENTIAL, PHYSICAL, ROOFLINE, fit, fit_linear
from remoe_cli.profile.function_latency import function_expert
from remoe_cli.profile.latency_record import Latency, Linear, MeasuredPoint, Timing
from remoe_cli.profile.pass_times import PROMPT_TOKENS, ROUNDS, Pass, PassTimes, now, time_passes

_TOKENS = (1, 4, 16, 64, 256)
_ROUND_S = 0.05  # of calls of an expert for one setting in a round
_GPU_EXPERTS, _GPU_CALLS = 8, 20  # more weights than a GPU's cache holds, in turn; calls between two looks at the clock
_TOO_LONG_S = 2.0  # more tokens are not tried after a call this long


def measure(
    model: PreTrainedModel, load_s: float, packed: Checkpoint | None = None, to: Integers | None = None, *, either: bool = False
) -> Latency:
    """Measure all times of a loaded model, which takes about 10 s for a small one.

    `packed` is its checkpoint where expert functions compute from the stored bytes, or may do `either` that or dequantise them. `to` is the
    form to which their experts are quantised. What is attached to the model's experts hook is detached, and its weights are in blocks
    afterwards.
    """
    layers = expert_layers(model)
    on_cpu = _on_cpu(layers)
    remote = function_expert(on_cpu, None if either else packed, to)
    packed_expert = function_expert(on_cpu, packed) if either else None
    unquantised = None if to is None else function_expert(on_cpu)
    with torch.inference_mode():
        on_gpu = None if model.device.type == "cpu" else _on_gpu(on_cpu, model.device)
        prepare_products(model, [layer.module for layer in on_cpu])  # as the main function has them
        passes = time_passes(model)
        alone = _alone(on_cpu)
        slower = _slower_in_passes(alone, passes)
        local = fit([_in_passes(point, slower) for point in alone], [EXPONENTIAL, PHYSICAL, ROOFLINE])
    nonexpert = passes.nonexpert
    totals = [sum(column) for column in zip(*nonexpert.seconds, strict=True)]
    return Latency(
        source="measured",
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        measured_on=date.today().isoformat(),
        main_vcpus=torch.get_num_threads(),
        nonexpert_prefill=fit_linear(PROMPT_TOKENS, totals[1:]),
        nonexpert_decode_s=totals[0],
        nonexpert_layers=nonexpert,
        local_expert=local,
        slower_in_passes=slower,
        remote_expert=remote,
        packed_expert=packed_expert,
        unquantised_expert=unquantised,
        gpu_expert=on_gpu,
        copy_s=fit_linear(*zip(*passes.copies, strict=True)) if passes.copies else Linear(fixed_s=0.0, per_token_s=0.0),
        load_s=load_s,
    )


def _on_cpu(layers: Sequence[ExpertLayer]) -> Sequence[ExpertLayer]:
    """Return the layers, or a copy of the first one on the CPU if they are on an accelerator."""
    if all(p.device.type == "cpu" for layer in layers for p in layer.parameters().values()):
        return layers
    return [replace(layers[0], module=copy.deepcopy(layers[0].module).to("cpu"))]


def _slower_in_passes(alone: Sequence[MeasuredPoint], passes: PassTimes) -> tuple[float, float]:
    """Compare experts in passes with the same alone: those of single tokens, and those of prompts.

    Experts with more rows than any that was timed alone are left out.
    """
    threads = torch.get_num_threads()  # those of the passes
    tokens, seconds = zip(*((point.tokens, point.seconds) for point in alone if point.vcpus == threads), strict=True)

    def slower(some: Iterable[Pass]) -> float:
        calls = [[call for call in one.experts if call.rows <= tokens[-1]] for one in some]
        factors = [
            sum(call.seconds for call in each) / float(np.interp([call.rows for call in each], tokens, seconds).sum())
            for each in calls
            if each
        ]
        return statistics.median(factors) if factors else 1.0

    return slower(passes.decode), slower(chain(*passes.prefill))


def _in_passes(point: MeasuredPoint, slower: tuple[float, float]) -> MeasuredPoint:
    decode, prefill = slower
    return point.model_copy(update={"seconds": point.seconds * (decode if point.tokens == 1 else prefill)})


def _alone(layers: Sequence[ExpertLayer]) -> list[MeasuredPoint]:
    dtype = next(iter(layers[0].parameters().values())).dtype
    # Another layer each time, so that weights come from memory as they do in real decoding.
    experts = cycle([(layer, row) for row in range(layers[0].experts) for layer in layers])
    rows = {n: torch.randn((n, layers[0].width), generator=torch.Generator().manual_seed(0)).to(dtype) for n in _TOKENS}
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    most, before = _TOKENS[-1], torch.get_num_threads()
    try:
        for threads in _thread_counts() * ROUNDS:
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
    """Return the powers of two up to the number of cores that this process may use, and the threads that torch takes."""
    return sorted({torch.get_num_threads(), *(1 << i for i in range(usable_cores().bit_length()))})


def _on_gpu(layers: Sequence[ExpertLayer], device: torch.device) -> Timing:
    """Time one expert alone on an accelerator as it is served there (model/gpu_experts.py), for several counts of tokens."""
    layer, experts = layers[0], range(min(_GPU_EXPERTS, layers[0].experts))
    weights = {name: p.data[: len(experts)].to(device) for name, p in layer.parameters().items()}
    held, each = gpu_experts(layer.module, experts, weights, layer.experts), cycle(experts)
    dtype = weights["down_proj"].dtype
    rows = {n: torch.randn((n, layer.width), generator=torch.Generator().manual_seed(0)).to(dtype).to(device) for n in _TOKENS}
    places = {(n, e): torch.full((n, 1), e).to(device) for n in _TOKENS for e in experts}
    times: dict[int, list[float]] = defaultdict(list)
    for n in _TOKENS * (1 + ROUNDS):  # the first round starts the device
        interrupts.check()
        start = now(device)
        for _ in range(_GPU_CALLS):  # waiting for each would take longer than the work
            expert = next(each)
            if held.starts_early(places[n, expert]):
                held.run(rows[n], places[n, expert])
            else:
                run_expert(replace(layer, module=held.module), expert, rows[n])
        times[n].append((now(device) - start) / _GPU_CALLS)
    points = [MeasuredPoint(tokens=n, vcpus=1.0, seconds=statistics.median(t[1:])) for n, t in times.items()]
    return fit(points, [PHYSICAL, ROOFLINE])
