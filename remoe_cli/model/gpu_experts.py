"""Computes experts whose weights are on the GPU.

They run beside the experts on the host and in functions. A prompt takes the grouped product, which reads each expert once, where it does
not wait for the device: torch has such a one only for bfloat16 on GPUs of some generations. On others, and for a step of one token, these
experts are started one by one when the host knows their rows (model/experts.py): the batched product would copy the weights of all slots,
also of those whose expert is elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

# Compute capabilities of GPUs with torch's own grouped product; for others it copies the groups' sizes to the host and waits for them.
_GROUPED = (9, 10)


@dataclass(frozen=True)
class GpuExperts:
    """The experts of one MoE layer that are on the GPU.

    ids      of the experts, in the order of their rows in the weights
    module   the layer's experts module with these weights only
    rows     expert id -> row of the weights; where an expert is elsewhere, the number of rows. The last is for ids without an expert.
    """

    ids: tuple[int, ...]
    module: nn.Module = field(repr=False, compare=False)
    rows: Tensor = field(repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """What the weights take of the GPU's memory."""
        return sum(weights.numel() * weights.element_size() for weights in self.module.parameters())

    def starts_early(self, index: Tensor) -> bool:
        """Tell whether `run` does without a wait for the device."""
        return len(index) > 1 and _grouped_without_wait(next(self.module.parameters()))

    def run(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Compute all slots whose expert is here, without the router's weights; the others give zeros.

        Shapes: hidden [T, H], index [T, k]; returns [T k, H], the slots of one token after those of another.
        """
        slots = self.rows[index.clamp(max=len(self.rows) - 1)].reshape(-1, 1)
        ones = torch.ones_like(slots, dtype=hidden.dtype)
        out: Tensor = grouped_mm_experts_forward(self.module, hidden.repeat_interleave(index.shape[1], dim=0), slots, ones)
        return out


def _grouped_without_wait(weights: Tensor) -> bool:
    return weights.dtype == torch.bfloat16 and weights.is_cuda and torch.cuda.get_device_capability(weights.device)[0] in _GROUPED


def gpu_experts(module: nn.Module, ids: Sequence[int], weights: dict[str, Tensor], experts: int) -> GpuExperts:
    """Make some experts of a module of `experts` from their weights on the GPU, [len(ids), ...]."""
    twin: Any = apart(module, weights)
    device = next(iter(weights.values())).device
    twin._is_expert_parallel = True  # rows from `num_experts` on mean "elsewhere"
    rows = torch.full((experts + 1,), len(ids), dtype=torch.long)
    rows[torch.tensor(ids, dtype=torch.long)] = torch.arange(len(ids))
    return GpuExperts(tuple(ids), twin, rows.to(device))


def apart(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Copy a module of experts with other weights.

    The class's arithmetic, activation and limits stay.

    Shapes: weights [experts, ...].
    """
    twin: Any = copy.copy(module)
    held = next(iter(weights.values()))
    twin._modules = {name: copy.deepcopy(child).to(held.device) for name, child in module.named_children()}
    twin._parameters = {name: nn.Parameter(w, requires_grad=False) for name, w in weights.items()}
    twin.num_experts = len(held)
    return cast(nn.Module, twin)
