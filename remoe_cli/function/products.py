"""Products in bfloat16 with torch's bits, where the processor has no instructions for bfloat16.

Such a processor widens the numbers to float32, which is exact, so a product is torch's if it adds up in torch's order. Two orders are those
of torch's own loops, one is that of oneDNN's: kernel/products.c says which, and computes them in less time. Only x86_64.

docs/adr/0015-weights-in-blocks.md has the measurements. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

_ROW, _COLUMN = 16, 8  # the numbers in a row of a matrix are a multiple, and in FOURS those in a column


class Order(IntEnum):
    """The order in which products are added up: see kernel/products.c."""

    DOTS = 0
    BLOCKS = 1
    FOURS = 2


@cache
def _library() -> Any:
    """Load the library for this processor; None where there is none."""
    path = Path(__file__).with_name(f"products-{os.uname().machine}.so")
    if not path.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # another C library than glibc: numkong and torch multiply, as everywhere else
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.remoe_product.argtypes = (ctypes.c_int, *[pointer] * 4, *[number] * 3, pointer, ctypes.c_uint)
    return loaded


@cache
def orders() -> frozenset[Order]:
    """Return the orders that this processor can do."""
    found = _library().remoe_product_orders() if _library() else 0
    return frozenset(order for order in Order if found >> order & 1)


@cache
def are_needed() -> bool:
    """Tell whether this processor lacks instructions for bfloat16, and can do these products."""
    return bool(orders()) and not _library().remoe_has_bfloat16()


def fits(out: int, columns: int, *, transposed: bool = False) -> bool:
    """Tell whether a matrix [out, columns] has such a product.

    One that is stored transposed has only FOURS.
    """
    return columns > 0 and columns % _ROW == 0 and not (transposed and out % _COLUMN)


def order_for(rows: int) -> Order:
    """Return torch's order for this many rows on this processor, with one thread."""
    return Order.BLOCKS if rows > 1 and Order.BLOCKS in orders() else Order.DOTS


def multiply(
    order: Order,
    weights: int,
    bias: int | None,
    x: int,
    y: int,
    sizes: tuple[int, int, int],
    team: int | None = None,
    threads: int = 1,
) -> None:
    """Compute y = x W^T + bias, all in bfloat16, rounded once.

    weights, bias, x, y   addresses of numbers that follow each other, row after row
    sizes                 out, in, rows: W [out, in] (in FOURS it is stored [in, out]), bias [out], x [rows, in], y [rows, out]
    team                  the address of GOMP_parallel, which starts `threads` threads

    Raises: ValueError for sizes and orders that there are not; MemoryError.
    """
    status = _library().remoe_product(order, weights, bias, x, y, *sizes, team, threads)
    if status == 2:
        raise MemoryError("no memory to widen a product's numbers")
    if status:
        raise ValueError(f"no product of {sizes[2]} rows with a matrix of {sizes[0]} x {sizes[1]} in the order {order.name}")
