"""Products with torch's bits by function/products.py, for the linear layers and experts of a model.

Where a processor has no instructions for bfloat16, torch widens each weight anew for each few rows. Here the same sums are added up in the
same order, sooner. Which order torch takes depends on the number of rows, on its threads and on oneDNN, so each size of matrix is tried
against F.linear when a model is made ready; rows with other bits stay with torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remoe_cli.function.products import Order, fits, multiply, orders

_TRIED_ROWS = (2, 3, 4, 6, 8, 16, 48, 130)
_TRIED_WEIGHTS = 1 << 18  # of a larger matrix the first rows are tried
_NO_ROWS = 1 << 30
_ALONE = 1 << 17  # a product of less is over before another thread has begun
_Key = tuple[torch.Size, bool, int]  # the size of a weight, whether there is a bias, and torch's threads


@dataclass(frozen=True)
class _Known:
    """Orders that have torch's bits: for one row, and for `least_rows` and more; None for none."""

    one: Order | None
    many: Order | None
    least_rows: int


_NONE = _Known(None, None, 0)
_sizes: set[tuple[torch.Size, bool]] = set()  # those of models that were made ready
_known: dict[_Key, _Known] = {}


class OrderedLinear(nn.Linear):
    """An nn.Linear whose product is the one below."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what F.linear does, by torch where nothing else has its bits.

    Shapes: x [..., in], weight [out, in], bias [out]; returns [..., out].
    """
    size = weight.shape, bias is not None
    if size not in _sizes or not (_is_plain(weight) and _is_plain(x)):
        return F.linear(x, weight, bias)
    known = _orders(*size)
    rows = x.numel() // weight.shape[1]
    order = known.one if rows == 1 else known.many if rows >= known.least_rows else None
    if order is None or not rows:
        return F.linear(x, weight, bias)
    return _product(order, x.contiguous(), weight, bias)


def order_weights(model: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Have the linear layers and experts of a model multiplied by these products, where no bit changes.

    Nothing is copied: weights stay where they are. A second call changes nothing.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _take(module.weight, module.bias is not None):
            module.__class__ = OrderedLinear
    for module in experts:
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            stacked = module._parameters.get(name)
            if stacked is not None and len(stacked) and not module.is_transposed:
                _take(stacked[0], False)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def _take(weight: Tensor, has_bias: bool) -> bool:
    """Try a size, and remember it if any rows have torch's bits."""
    if not (_is_plain(weight) and weight.is_contiguous() and fits(weight.shape[1])):
        return False
    if _orders(weight.shape, has_bias) == _NONE:
        return False
    _sizes.add((weight.shape, has_bias))
    return True


def _orders(shape: torch.Size, has_bias: bool) -> _Known:
    """Find out in which orders products of a size have torch's bits, once for each number of threads."""
    key = shape, has_bias, torch.get_num_threads()
    if key not in _known:
        out = min(shape[0], max(1, _TRIED_WEIGHTS // shape[1]))
        with torch.inference_mode(False):  # where torch multiplies as by the weights of a model
            weight, bias = _hard(out, shape[1], 1), _hard(1, out, 2)[0] if has_bias else None
        _known[key] = _NONE if key[2] > 1 and _team() is None else _tried(weight, bias)
    return _known[key]


def _hard(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _tried(w: Tensor, bias: Tensor | None) -> _Known:
    """Compare with F.linear.

    Half of what is added up takes the other half nearly away, so that a sum tells its order.
    """
    in_pairs = w.shape[1] // 2
    w[:, in_pairs:] = -w[:, :in_pairs] * 1.01

    def same(order: Order, rows: int) -> bool:
        x = _hard(rows, w.shape[1], rows)
        x[:, in_pairs:] = x[:, :in_pairs]
        return torch.equal(F.linear(x, w, bias), _product(order, x, w, bias))

    def least(order: Order) -> int:
        """Find from how many rows on all have torch's bits."""
        equal = takewhile(partial(same, order), reversed(_TRIED_ROWS))
        return min(equal, default=_NO_ROWS)

    one = next((order for order in sorted(orders()) if same(order, 1)), None)
    least_rows, many = min(((least(order), order) for order in orders()), default=(_NO_ROWS, None))
    return _Known(one, many, least_rows) if least_rows < _NO_ROWS else _Known(one, None, 0)


def _product(order: Order, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: x [..., in] and weight [out, in], contiguous."""
    out, columns = weight.shape
    y = x.new_empty(*x.shape[:-1], out)
    rows = x.numel() // columns
    threads = torch.get_num_threads() if out * columns * rows >= _ALONE else 1
    at = None if bias is None else bias.data_ptr()
    multiply(order, weight.data_ptr(), at, x.data_ptr(), y.data_ptr(), (out, columns, rows), _team() if threads > 1 else None, threads)
    return y


@cache
def _team() -> int | None:
    """Return the address of GOMP_parallel in the library that torch has its threads from.

    A second team of threads would take the cores from the first. None where torch has another library.
    """
    try:
        with open("/proc/self/maps") as maps:
            mapped = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:
        return None
    brought = sorted(mapped, key=lambda path: not path.startswith(str(Path(torch.__file__).parent.parent)))
    loaded: Any = ctypes.CDLL(brought[0]) if brought else None
    return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value if loaded else None
