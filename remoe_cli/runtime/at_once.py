"""Let a main function answer another number of requests at once than its plan counts on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from remoe_cli import bounded
from remoe_cli.errors import UsageError
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.units import size

_MEMORY, _MEMORY_LIMIT = Path("/proc/meminfo"), bounded.Limit(2**16)
_KEPT_SHARE = 0.9  # of the memory that is free, for KV caches: steps need some too


def with_concurrency(main: MainFunction, asked: int | None) -> MainFunction:
    """Return the main function with another number of requests at once; None keeps the plan's.

    Raises: UsageError where the model's family shares no steps, and where the KV caches of so many requests may not fit.
    """
    if asked is None:
        return main
    if asked > 1:
        _refuse(main, asked)
    return replace(main, config=main.config.model_copy(update={"concurrency": asked}))


def _refuse(main: MainFunction, asked: int) -> None:
    spec, served = main.config.spec, main.config.served
    if not main.engine.batches:
        raise UsageError(
            f"A model of family '{main.engine.model.config.model_type}' answers one request at a time: requests cannot share its cache.",
            "Leave --concurrency out.",
        )
    tokens = served.tokens + 1 if served else main.engine.positions
    if tokens is None:
        raise UsageError(
            "The plan and the model name no longest request, so nobody knows the memory of several at once.",
            "Plan with --requests, or leave --concurrency out.",
        )
    one, free = spec.kv_cache_bytes(tokens) + spec.hidden_state_bytes * tokens, _KEPT_SHARE * _free_bytes(main)
    if asked * one > free:
        where = "on the GPU" if main.engine.device.kind == "cuda" else "in this machine's memory"
        raise UsageError(
            f"{asked} requests of up to {tokens:,} tokens may take {size(asked * one)} of KV cache, "
            f"and {size(free)} are free for it {where}.",
            f"Give --concurrency {max(1, int(free // max(1, one)))} or less.",
        )


def _free_bytes(main: MainFunction) -> int:
    if main.engine.device.kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return available_bytes()


def available_bytes() -> int:
    """Return how much of this machine's memory programs may still take."""
    # Not what nothing uses: what the kernel keeps of files makes room.
    lines = dict(line.split(":", 1) for line in bounded.read_bytes(_MEMORY, _MEMORY_LIMIT).decode().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
