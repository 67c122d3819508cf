"""Products with bfloat16 weights on a CPU, by the way that is fastest on this machine.

torch gives them to oneDNN, which is fast for many rows where the processor has instructions for bfloat16. It is not elsewhere:

- One row, as in a decode step, reads memory at about half of its speed there; torch's own product reads at nearly all of it.
- Without such instructions (AVX2, older Arm) torch has only its own product, where each row takes as long as the first. So prompts and
  batches are slow. There the weights are widened to float32, block by block within the caches, and multiplied as such.

Sums are float32 and rounded once in all of them. Only the order of the sums may differ, as it does between processors. What this machine
is good at is found out in some milliseconds. docs/adr/0015-products.md has the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FROM_ROWS = 8  # with fewer, widening the weights takes longer than it saves
_BLOCK_NUMBERS = 1 << 19  # 2 MB of float32: a block stays in a core's cache while it is used
_PAYS = 1.3  # times faster than what torch does: less could be chance
_ROUNDS = 5
Way = Callable[..., Tensor]
_set_onednn = torch._C._set_mkldnn_enabled  # torch.backends.mkldnn.flags does the same and more, 60 times as slowly


@dataclass(frozen=True)
class Ways:
    """What is faster on this machine than what torch does with bfloat16.

    own       torch's own product for one row
    widened   widened weights for many
    """

    own: bool
    widened: bool


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `torch.nn.functional.linear` does.

    Shapes: x [..., in], weight [out, in], bias [out]; returns [..., out].
    """
    if weight.dtype is torch.bfloat16 and x.dtype is torch.bfloat16 and weight.device.type == "cpu":
        numbers, inputs = x.numel(), x.shape[-1]
        if numbers == inputs and weight.stride(-1) == 1 and ways().own:  # of a transposed matrix it takes many times as long
            return own(x, weight, bias)
        if numbers >= _FROM_ROWS * inputs and ways().widened:
            return widened(x, weight, bias)
    return F.linear(x, weight, bias)


def own(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply without oneDNN."""
    _set_onednn(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        _set_onednn(True)


def widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply in float32, of which the weights take one block at a time, and round once."""
    rows, outputs = x.reshape(-1, x.shape[-1]).float(), len(weight)
    if weight.stride(-1) == 1:
        product = torch.empty((len(rows), outputs), dtype=torch.float32)
        for start, block in _blocks(weight):
            torch.mm(rows, block.t(), out=product[:, start : start + len(block)])
    else:  # stored the other way round: blocks of what it is stored as, whose products are added up
        product = torch.zeros((len(rows), outputs), dtype=torch.float32)
        for start, block in _blocks(weight.t()):
            product.addmm_(rows[:, start : start + len(block)], block)
    if bias is not None:
        product += bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], outputs)


def _blocks(stored: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows in float32, each with the number of its first; the next one takes its memory."""
    count = max(1, _BLOCK_NUMBERS // stored.shape[1])
    block = torch.empty((min(count, len(stored)), stored.shape[1]), dtype=torch.float32)
    for start in range(0, len(stored), count):
        rows = stored[start : start + count]
        yield start, block[: len(rows)].copy_(rows)


@cache
def ways() -> Ways:
    """Find out what is faster on this machine; kept while the process lasts.

    One thread is timed, by the processor's time that it takes: so other work on the machine does not decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            large = [torch.ones((2048, 2048), dtype=torch.bfloat16) for _ in range(8)]  # more than a core's caches hold
            small = [torch.ones((1024, 1024), dtype=torch.bfloat16)]
            return Ways(own=_pays(own, 1, large), widened=_pays(widened, 32, small))
    finally:
        torch.set_num_threads(threads)


def _pays(way: Way, rows: int, weights: Sequence[Tensor]) -> bool:
    """Compare a way with torch's, in turns."""
    x = torch.ones((rows, weights[0].shape[1]), dtype=torch.bfloat16)
    torchs, ours = float("inf"), float("inf")
    for _ in range(_ROUNDS):
        torchs, ours = min(torchs, _took_s(F.linear, x, weights)), min(ours, _took_s(way, x, weights))
    return ours * _PAYS < torchs


def _took_s(way: Way, x: Tensor, weights: Sequence[Tensor]) -> float:
    start = time.thread_time()
    for weight in weights:
        way(x, weight)
    return time.thread_time() - start


class ProductLinear(nn.Linear):
    """A linear layer that multiplies by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def choose_products(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by `linear`, where they are in bfloat16 on a CPU."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu":
            module.__class__ = ProductLinear
