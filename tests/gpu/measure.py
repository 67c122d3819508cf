"""What of a forward pass and of a process is measured: times, copies, synchronisations, memory."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

COPIES = ("Memcpy DtoH", "Memcpy HtoD")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


class _Clock(BaseStreamer):  # type: ignore[misc]
    """The time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer_s(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """TTFT, and TPOT, of one greedy answer, the second of two."""
    for _ in range(2):
        clock, start = _Clock(), time.perf_counter()
        ids = torch.arange(1, prompt_tokens + 1, device=model.device)[None]
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                disable_compile=True,
                pad_token_id=0,
                streamer=clock,
            )
    first, *rest = clock.times[1:]  # the streamer gets the prompt, too
    return first - start, (rest[-1] - first) / len(rest)


def copies_and_waits(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> tuple[int, int]:
    """Copies between GPU and host, and synchronisations, of one forward pass, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as profiled:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    seen: Counter[str] = Counter()
    for event in profiled.events():
        seen["copies"] += event.name.startswith(COPIES)
        seen["waits"] += event.name in SYNCHRONISATIONS
    # The profiler itself waits once for the device at its end.
    return seen["copies"], seen["waits"] - 1


def resident_bytes(what: str = "VmHWM") -> int:
    """The most memory that this process had (VmHWM), or what it has of its own now (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def link_bytes_per_s(size: int = 2**28) -> tuple[float, float]:
    """Rates of pinned copies: to the device, and back."""
    host, there = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device="cuda")

    def rate(to: Tensor, source: Tensor) -> float:
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return 4 * size / (time.perf_counter() - start)

    return rate(there, host), rate(host, there)


def memory_bytes_per_s(size: int = 2**28) -> float:
    """The rate at which this machine's memory is read: a sum over more than the caches hold."""
    numbers = torch.ones(size // 4)
    numbers.sum()
    start = time.perf_counter()
    numbers.sum()
    return size / (time.perf_counter() - start)
