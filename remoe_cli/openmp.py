"""How OpenMP's threads wait for work, in every process that computes.

Threads that sleep at once are woken hundreds of times a token; threads that spin take the cores from whatever else runs. libgomp, which
torch brings, spins some milliseconds by default. A spin of some microseconds bridges the gap between two products and is over before it
costs anybody a core. `docs/measure/thread_waits.py` prints what each way costs, on a quiet and on a busy machine.

Source: GCC's libgomp manual, GOMP_SPINCOUNT and OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WAITS = {"GOMP_SPINCOUNT": "1000"}
_CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Set how OpenMP's threads wait, unless the environment says so already.

    It counts for processes that start, and libraries that are loaded, later.
    """
    if not any(name in environment for name in _CHOSEN_BY):
        environment.update(WAITS)
