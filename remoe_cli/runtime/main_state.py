"""What a main function holds and has spent, as GET /main says it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from remoe_cli.artifacts import is_none
from remoe_cli.model.draft import Speculate
from remoe_cli.runtime.device import Device
from remoe_cli.runtime.ledger import Ledger
from remoe_cli.runtime.server_config import ServerConfig

if TYPE_CHECKING:
    from remoe_cli.runtime.engine import Engine


class MainState(BaseModel):
    """What a main function holds, and what it has spent.

    expert_bytes_held, expert_bytes_of_model    counted by tensors, in CPU memory and on the GPU
    local_experts, gpu_experts                  all that are not in functions, and those of them that are on the GPU
    resident_bytes, anonymous_bytes             of the process, as the kernel says
    device                                      where everything but the experts is
    concurrency                                 requests that are answered at once; 1 where the model's family cannot share a step
    cached_experts                              remote experts that are kept in spare memory now (expert_cache.py)
    speculate                                   how many draft tokens a pass may have; off where the model's family takes no drafts
    assistant                                   the model that drafts where nothing is found; None: nobody does
    spent                                       on expert functions, for loading and for requests
    """

    model_config = ConfigDict(frozen=True)

    expert_bytes_held: int
    expert_bytes_of_model: int
    local_experts: int
    gpu_experts: int = 0
    cached_experts: int = 0
    experts_of_model: int
    resident_bytes: int
    anonymous_bytes: int
    device: Device
    concurrency: int = 1
    speculate: Speculate = "off"
    assistant: str | None = Field(default=None, exclude_if=is_none)
    spent: Ledger


def state_of(config: ServerConfig, engine: Engine, concurrency: int, speculate: Speculate, spent: Ledger) -> MainState:
    """Look at what the process holds now."""
    from remoe_cli.model.loader import expert_bytes_held

    spec, dispatcher = config.spec, engine.dispatcher
    on_gpu, there = dispatcher.gpu, sum(len(held.ids) for held in dispatcher.gpu.values())
    cached = len(dispatcher.cache.held) if dispatcher.cache else 0
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return MainState(
        expert_bytes_held=expert_bytes_held(engine.model) + sum(held.bytes for held in on_gpu.values()) + cached * spec.expert_bytes,
        expert_bytes_of_model=spec.routed_bytes,
        local_experts=sum(map(len, dispatcher.local.values())) + there,
        gpu_experts=there,
        cached_experts=cached,
        experts_of_model=spec.experts,
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
        anonymous_bytes=int(status["RssAnon"].split()[0]) * 1024,
        device=engine.device,
        concurrency=concurrency,
        speculate=speculate,
        assistant=config.assistant.path if config.assistant and engine.assistant and speculate != "off" else None,
        spent=spent,
    )
