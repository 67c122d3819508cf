"""The experts that a function keeps: as many as its memory holds, the least used goes first.

A *ready* expert is dequantised once, and in the order that its products want. A *packed* one is computed from its stored bytes: it is a
view of the shard, so it takes what its pages in the file take.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import inf
from pathlib import Path

from .errors import FunctionMemoryError, FunctionProcessorError
from .expert_ffn import Expert, FfnSpec
from .packed import library
from .weights import Shard

FORMS = ("ready", "packed")

# Kept free for the rows of one invocation: a full payload, its base64, and its outputs.
_WORKING_BYTES = 24 << 20


def room_bytes(environment: Mapping[str, str]) -> float:
    """Compute the bytes that the function's memory has left; infinite where nothing limits it."""
    if "AWS_LAMBDA_FUNCTION_MEMORY_SIZE" not in environment:
        return inf
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return (int(environment["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]) << 20) - (int(anonymous.split()[1]) << 10) - _WORKING_BYTES


def form_of(environment: Mapping[str, str]) -> str:
    """Read from REMOE_EXPERTS in which form the function computes its experts.

    Raises: FunctionProcessorError for a form that there is not.
    """
    form = environment.get("REMOE_EXPERTS", FORMS[0])
    if form not in FORMS:
        raise FunctionProcessorError(f"REMOE_EXPERTS is {form[:20]!a}, and experts are {' or '.join(FORMS)}")
    return form


class ReadyExperts:
    """Experts by id, made ready when they are first asked for, within `room_bytes` of weights.

    The least recently used expert is dropped when another one needs its room. Packed ones all stay: they take no memory but the file's.

    Raises: FunctionMemoryError when the largest expert does not fit, FunctionProcessorError where packed ones cannot be computed.
    """

    def __init__(self, shard: Shard, room_bytes: float, form: str = FORMS[0]) -> None:
        head = shard.head
        self.shard, self.spec, self._is_packed = shard, FfnSpec(**head.ffn), form == "packed"
        if self._is_packed:
            if (reason := head.packed_refusal()) is not None:
                raise FunctionProcessorError(f"the experts of {shard.where} cannot be packed: {reason}")
            library()
        largest_bytes = max(map(head.stored_bytes if self._is_packed else head.expert_bytes, shard.experts))
        if not self._is_packed:
            room_bytes -= head.dequantised_bytes()  # in memory as well, while an expert is made ready
        if largest_bytes > room_bytes:
            has_mb = max(0.0, room_bytes) / 2**20
            raise FunctionMemoryError(f"an expert takes {largest_bytes / 2**20:.1f} MB, and the memory has {has_mb:.1f} MB for experts")
        self._room_bytes = room_bytes
        self._ready: OrderedDict[int, Expert] = OrderedDict()

    @property
    def ids(self) -> tuple[int, ...]:
        """The experts that are ready now."""
        return tuple(sorted(self._ready))

    def get(self, expert: int) -> Expert:
        """Get an expert, and make it ready if needed.

        Raises: what the shard raises.
        """
        if expert not in self._ready:
            tensors = self.shard.packed(expert) if self._is_packed else self.shard.tensors(expert)
            free_bytes = self._room_bytes - (0 if self._is_packed else self.shard.head.expert_bytes(expert))
            while sum(ready.weights_bytes for ready in self._ready.values()) > free_bytes:
                self._ready.popitem(last=False)
            self._ready[expert] = Expert.of(tensors, self.spec)
        self._ready.move_to_end(expert)
        return self._ready[expert]
