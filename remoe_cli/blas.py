"""numpy's matrix products in one thread, where they are many and small.

OpenBLAS divides a product of some hundred rows over all cores, and its threads spin while they wait for each other. A plan has many such
products: threads take the processor's time, and save none on a quiet machine. Beside other work they wait longer than they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute products in one thread meanwhile; afterwards there are as many as before."""
    with threadpool_limits(1, user_api="blas"):
        yield
