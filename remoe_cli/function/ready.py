"""The experts that a function has ready to run: as many as its memory holds, the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import inf
from pathlib import Path

from .errors import FunctionMemoryError
from .expert_ffn import Expert, FfnSpec
from .weights import Shard

# Left free for rows on their way through: a full payload, its base64, and what an expert makes of it.
_WORKING_BYTES = 24 << 20


def room_bytes(environment: Mapping[str, str]) -> float:
    """What the function's memory still holds beside what this process has now; infinite where nothing limits it."""
    if "AWS_LAMBDA_FUNCTION_MEMORY_SIZE" not in environment:
        return inf
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return (int(environment["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]) << 20) - (int(anonymous.split()[1]) << 10) - _WORKING_BYTES


class ReadyExperts:
    """Experts by id, made ready when they are first asked for, within `room_bytes` of weights. Raises FunctionMemoryError when the
    largest does not fit in there."""

    def __init__(self, shard: Shard, room_bytes: float) -> None:
        self.shard, self.spec = shard, FfnSpec(**shard.head.ffn)
        largest_bytes = max(map(shard.head.expert_bytes, shard.experts))
        if largest_bytes > room_bytes:
            has_mb = max(0.0, room_bytes) / 2**20
            raise FunctionMemoryError(f"an expert takes {largest_bytes / 2**20:.1f} MB, the function's memory has {has_mb:.1f} MB for them")
        self._room_bytes = room_bytes
        self._ready: OrderedDict[int, Expert] = OrderedDict()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(sorted(self._ready))

    def get(self, expert: int) -> Expert:
        """Raises what the shard raises."""
        if expert not in self._ready:
            tensors = self.shard.tensors(expert)
            free_bytes = self._room_bytes - self.shard.head.expert_bytes(expert)
            while sum(ready.weights_bytes for ready in self._ready.values()) > free_bytes:
                self._ready.popitem(last=False)
            self._ready[expert] = Expert.of(tensors, self.spec)
        self._ready.move_to_end(expert)
        return self._ready[expert]
