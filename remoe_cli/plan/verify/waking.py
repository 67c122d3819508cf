"""For the verifier: main functions that start, and instances that scale to zero.

How often such an instance wakes follows from the traffic alone where requests come at random; where a file tells their times, the plan's
two shares are taken as stated, within what shares can be.

Source: method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import MainKind, MainSpec, Plan, WorkloadRef

TOLERANCE = 1e-9
Found = tuple[str, object, object]  # the field, what it states, and what is found


@dataclass(frozen=True)
class Start:
    """How a main function starts.

    share             of the requests for which it does
    functions_share   of the requests that find it up, and their expert functions cold
    begin_s           until it reads its part of the model
    bytes_per_s       at which it reads
    ends_s            longest request, from when it is sent; None where nothing ends it
    """

    share: float
    functions_share: float
    begin_s: float
    bytes_per_s: float
    ends_s: float | None

    def wait_s(self, read_bytes: float) -> float:
        """Compute how long a request waits that finds none."""
        return self.begin_s + read_bytes / self.bytes_per_s


def start_of(catalog: Catalog, workload: WorkloadRef, main: MainSpec) -> Start | None:
    """Find how a main function starts; None where it is always on."""
    side, cold = catalog.main, workload.cold_share
    if main.usd_per_hour is None:
        return Start(cold, 0.0, side.cold_start_s, side.load_bytes_per_s, side.timeout_s)
    if (zero := catalog.zero) is None or not main.scales_to_zero:
        return None
    woken = 0.0 if workload.waking is None else workload.waking.wake_share
    return Start(woken, max(0.0, cold - woken), zero.wake_s, zero.load_bytes_per_s, zero.wake_s + zero.timeout_s)


def hours_usd(catalog: Catalog, workload: WorkloadRef, main: MainSpec, instances: int) -> float | None:
    """Price a request's part of the hours of instances that scale to zero, and its fees.

    None for any other main function.
    """
    zero, waking, side = catalog.zero, workload.waking, catalog.main
    if zero is None or waking is None or not main.scales_to_zero or not main.usd_per_hour or not workload.requests_per_hour:
        return None
    logged = catalog.storage.usd_per_log_gb * catalog.function.log_bytes_per_call / 2**30
    held_mb = min(main.memory_mb, zero.storage_mb)
    reads = math.ceil(held_mb * 2**20 / side.bytes_per_read) if side.bytes_per_read else 0
    fees = zero.usd_per_request + logged + waking.wake_share * reads * catalog.storage.usd_per_1000_reads / 1000
    return main.usd_per_hour * waking.up_share * instances / workload.requests_per_hour + fees


def holds(catalog: Catalog, main: MainSpec, fetched_bytes: float) -> bool:
    """Tell whether /tmp holds what a main function that scales to zero fetches."""
    return not main.scales_to_zero or catalog.zero is None or fetched_bytes <= catalog.zero.storage_mb * 2**20


def kinds(catalog: Catalog, plan: Plan) -> Iterator[Found]:
    """Find what is wrong with the kinds of main functions that a plan states.

    What their plans cost is what a search found; that of the plan's own kind is the plan's.
    """
    names = {
        MainKind.BY_USE: {main.name for main in catalog.main.menu if main.usd_per_hour is None},
        MainKind.TO_ZERO: {main.name for main in catalog.main.menu if main.usd_per_hour is not None and main.scales_to_zero},
        MainKind.ALWAYS_ON: {main.name for main in catalog.main.menu if main.usd_per_hour is not None and not main.scales_to_zero},
    }
    for index, one in enumerate(plan.kinds):
        if one.spec not in names[one.kind]:
            yield f"kinds[{index}].spec", one.spec, sorted(names[one.kind])
        if plan.main.name in names[one.kind] and one.cost_usd_per_request != plan.cost_usd_per_request:
            yield f"kinds[{index}].cost_usd_per_request", one.cost_usd_per_request, plan.cost_usd_per_request


def shares(catalog: Catalog, workload: WorkloadRef) -> Iterator[Found]:
    """Find what is wrong with the shares that a workload states."""
    zero, per_hour, stated = catalog.zero, workload.requests_per_hour, workload.waking
    if zero is None or per_hour is None or stated is None:
        if (stated is None) != (zero is None or per_hour is None):
            yield "workload.waking", stated, "one where requests come and an instance scales to zero, and none else"
        return
    if workload.served is not None:  # a file may tell the times of its requests
        if not (0 <= stated.wake_share <= 1 and 0 <= stated.up_share <= 1):
            yield "workload.waking", stated, "not shares"
        return
    # A cycle is the time off, until a request comes; the time of waking; and the time up, until none comes for `idle_s`.
    rate = per_hour / 3600
    off_s, up_s = 1 / rate, math.expm1(rate * zero.idle_s) / rate if rate * zero.idle_s < 700 else math.inf
    off_share = off_s / (off_s + zero.wake_s + up_s)
    for name, value in (("wake_share", off_share), ("up_share", 1 - off_share)):
        if not math.isclose(getattr(stated, name), value, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield f"workload.waking.{name}", getattr(stated, name), value
