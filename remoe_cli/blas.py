"""numpy's matrix products in one thread, where they are many and small.

OpenBLAS divides a product of some hundred rows over all cores, and its threads spin while they wait for each other. In a plan that takes
more time than it saves: of DeepSeek-V3's, a third of the processor's time, and more than half of the clock's beside other work
(`docs/measure/stored_plans.py` prints times of plans).
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
