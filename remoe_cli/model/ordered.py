"""Products with torch's bits by function/products.py, for the linear layers and experts of a model.

Where a processor has no instructions for bfloat16, torch widens each weight anew for each few rows. Here the same sums are added up in the
same order, sooner. Which order torch takes depends on the number of rows, on its threads and on oneDNN, so each size of matrix is tried
against F.linear when a model is made ready; rows with other bits stay with torch. oneDNN gives each thread as many numbers of y as the
others. Where that is one row, or no whole number of rows, rows have orders of their own, so all of them stay with torch.
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
_Size = tuple[torch.Size, bool, bool]  # of a weight, whether there is a bias, and whether the weight is [in, out]


@dataclass(frozen=True)
class _Known:
    """Orders that have torch's bits: for one row, and for multiples of `step` from `least_rows` rows on; None for none."""

    one: Order | None
    many: Order | None
    least_rows: int
    step: int = 1


_NONE = _Known(None, None, 0)
_sizes: set[_Size] = set()  # those of models that were made ready
_known: dict[tuple[_Size, int], _Known] = {}  # for a number of torch's threads


class OrderedLinear(nn.Linear):
    """An nn.Linear whose product is the one below."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what F.linear does, by torch where nothing else has its bits.

    Shapes: x [..., in], weight [out, in], bias [out]; returns [..., out].
    """
    order = _order(x, weight, bias is not None, False)
    return F.linear(x, weight, bias) if order is None else _product(order, x.contiguous(), weight, bias)


def across(x: Tensor, weight: Tensor) -> Tensor:
    """Do what x @ weight does, by torch where nothing else has its bits.

    Shapes: x [n, in], weight [in, out]; returns [n, out].
    """
    order = _order(x, weight, False, True)
    return x @ weight if order is None else _product(order, x.contiguous(), weight, None)


def _order(x: Tensor, weight: Tensor, has_bias: bool, transposed: bool) -> Order | None:
    """Return the order with torch's bits for these rows; None for none."""
    size = weight.shape, has_bias, transposed
    if size not in _sizes or not (_is_plain(weight) and _is_plain(x)):
        return None
    columns = _sides(size)[1]
    if x.shape[-1] != columns:
        return None  # torch says what is wrong with it
    known, rows = _orders(size), x.numel() // columns
    if rows == 1:
        return known.one
    return known.many if rows >= known.least_rows and rows and rows % known.step == 0 else None


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
            if stacked is not None and len(stacked):
                _take(stacked[0], False, bool(module.is_transposed))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def _take(weight: Tensor, has_bias: bool, transposed: bool = False) -> bool:
    """Try a size, and remember it if any rows have torch's bits."""
    size = weight.shape, has_bias, transposed
    if not (_is_plain(weight) and weight.is_contiguous() and fits(*_sides(size), transposed=transposed)):
        return False
    if _orders(size) == _NONE:
        return False
    _sizes.add(size)
    return True


def _sides(size: _Size) -> tuple[int, int]:
    """Return the numbers that a product has, and that it adds up for each."""
    shape, _, transposed = size
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _orders(size: _Size) -> _Known:
    """Find out in which orders products of a size have torch's bits, once for each number of threads."""
    key = size, torch.get_num_threads()
    if key not in _known:
        _known[key] = _NONE if key[1] > 1 and _team() is None else _tried(size)
    return _known[key]


def _hard(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _tried(size: _Size) -> _Known:
    """Compare with torch.

    Half of what is added up takes the other half nearly away, so that a sum tells its order.
    """
    (out, columns), (_, has_bias, transposed) = _sides(size), size
    out = min(out, max(8, _TRIED_WEIGHTS // columns // 8 * 8))
    half = columns // 2
    with torch.inference_mode(False):  # where torch multiplies as by the weights of a model
        w, bias = _hard(out, columns, 1), _hard(1, out, 2)[0] if has_bias else None
        w[:, half:] = -w[:, :half] * 1.01
        w = w.t().contiguous() if transposed else w

    def same(order: Order, rows: int) -> bool:
        x = _hard(rows, columns, rows)
        x[:, half:] = x[:, :half]
        theirs = x @ w if transposed else F.linear(x, w, bias)
        return torch.equal(theirs, _product(order, x, w, bias))

    def least(order: Order) -> int:
        """Find from how many rows on all multiples of the step have torch's bits."""
        step = _step(order)
        tried = sorted({max(2, rows // step) * step for rows in _TRIED_ROWS})
        return min(takewhile(partial(same, order), reversed(tried)), default=_NO_ROWS)

    some = sorted(order for order in orders() if (order is Order.FOURS) == transposed)
    one = next((order for order in some if same(order, 1)), None)
    least_rows, many = min(((least(order), order) for order in some), default=(_NO_ROWS, None))
    return _Known(one, None, 0) if many is None or least_rows == _NO_ROWS else _Known(one, many, least_rows, _step(many))


def _step(order: Order) -> int:
    """Return the number of which rows are a multiple where they are added up in this order: in oneDNN's, threads share them evenly."""
    return torch.get_num_threads() if order is Order.BLOCKS else 1


def _product(order: Order, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: x [..., in] and weight [out, in], in FOURS [in, out], contiguous."""
    columns = x.shape[-1]
    out, rows = weight.numel() // columns, x.numel() // columns
    y = x.new_empty(*x.shape[:-1], out)
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
