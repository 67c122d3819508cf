"""Copies tensors between a device and the host, several at once, through pinned buffers that are kept.

A copy of its own for each tensor or each expert would cost a launch each, and a copy from pageable memory also blocks. One Exchange serves
one model on one stream. There the next copy down starts only when the last one up is done, so that no buffer is written while it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Exchange:
    """The kept buffers and the event of a model whose experts are not all where its other weights are."""

    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _events: dict[torch.device, Any] = field(default_factory=dict)

    def to_host(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Queue one copy of the tensors to the host, and return the function that waits for it.

        What the device is given to do after this call goes on while the host waits. The tensors that come are overwritten by the next copy.
        """
        device, parts = tensors[0].device, _parts(tensors)
        packed = torch.cat([tensors[i].reshape(-1).view(torch.uint8) for i, _, _ in parts])
        buffer = self._buffer("to host", packed.numel(), device)
        buffer.copy_(packed, non_blocking=True)
        if device not in self._events:
            self._events[device] = torch.Event(device)
        event = self._events[device]
        event.record()

        def wait() -> list[Tensor]:
            event.synchronize()
            return _unpacked(buffer, tensors, parts)

        return wait

    def to_device(self, device: torch.device, *tensors: Tensor) -> list[Tensor]:
        """Queue one copy of host tensors to the device; nothing waits for it."""
        parts = _parts(tensors)
        buffer = self._buffer("to device", parts[-1][2], device)
        for i, start, end in parts:
            buffer[start:end].copy_(tensors[i].reshape(-1).view(torch.uint8))
        return _unpacked(buffer.to(device, non_blocking=True), tensors, parts)

    def _buffer(self, name: str, size: int, device: torch.device) -> Tensor:
        kept = self._buffers.get(name)
        if kept is None or len(kept) < size:
            with torch.inference_mode(False):  # it is written again outside of inference mode
                kept = torch.empty(1 << max(size - 1, 0).bit_length(), dtype=torch.uint8, pin_memory=device.type != "meta")
            self._buffers[name] = kept
        return kept[:size]


def _parts(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Return (number, first byte, end) of each tensor in the packed bytes, the widest types first: so all are aligned."""
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    ends = list(itertools.accumulate(tensors[i].numel() * tensors[i].element_size() for i in order))
    return list(zip(order, [0, *ends[:-1]], ends, strict=True))


def _unpacked(packed: Tensor, like: Sequence[Tensor], parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Cut packed bytes into views with the types and shapes of `like`."""
    views = {i: packed[start:end].view(like[i].dtype).view(like[i].shape) for i, start, end in parts}
    return [views[i] for i in range(len(like))]
