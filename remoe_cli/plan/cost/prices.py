"""The price model: what a second, a call, a read of S3 and a rented hour cost. Pure.

Everything that says what something costs asks this module: the planner for a prediction (main_function.py, expert_functions.py), a receipt
for what was measured (runtime/receipt.py), a dry run for AWS (deploy/aws/money.py). So the same times always cost the same.

- A main function paid by use costs its time and a fee. Its time costs its memory (c_g M_g + c_c w), and /tmp of the same size, to which it
  fetches its part of the model: that always holds it, as its memory does.
- An instance that scales to zero is rented for the hours in which it is up, and each request pays a fee.
- A rented instance costs its hours. Where the traffic is known, each request pays the same share of them, and its own time is the busy part
  of that share. Else a request pays its own time, and nobody knows what the idle hours cost.
- An expert function costs its billed time, by its memory and its /tmp, and each call costs its fee and what Lambda logs of it.
- What a cold start reads from S3 is paid by the read.

Source: method.md, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from remoe_cli.artifacts import Part, is_none
from remoe_cli.plan.document import MainSpec

if TYPE_CHECKING:
    from remoe_cli.plan.arrays import Floats
    from remoe_cli.plan.catalog.catalog import Catalog

_GB_MB = 1024
_GB = 2**30
_MB = 2**20


class FunctionPrices(Part):
    """What expert functions are paid for.

    usd_per_call       of one invocation: its fee, and what Lambda logs of it
    storage_free_mb    /tmp without charge
    usd_per_read       of one read of S3
    """

    usd_per_gb_second: float
    usd_per_storage_gb_second: float
    storage_free_mb: float
    usd_per_call: float
    usd_per_read: float


class MainPrices(Part):
    """What a main function is paid for.

    rented            whether it is rented by the hour, or paid by use
    usd_per_s         of its time
    memory_mb, usd_per_gb_second    memory that is in it, and its price, where it is paid by use: a deployment may give it more
    usd_per_request   what a request costs besides time: its fee, and what Lambda logs of it
    usd_per_read      of one read of S3; 0 where no request pays for reading the model
    share_usd         what a request pays of all hours of all rented instances, at the plan's traffic; None where that is unknown
    idle_s            seconds after its last request for which a rented instance that scales to zero is still paid; None: for ever
    """

    rented: bool
    usd_per_s: float
    usd_per_request: float
    usd_per_read: float
    memory_mb: int = 0
    usd_per_gb_second: float = 0.0
    share_usd: float | None = None
    idle_s: float | None = Field(default=None, exclude_if=is_none)


class MainCost(Part):
    """What a request costs in the main function.

    busy_usd   its time
    idle_usd   the rest of its share of the hours of rented instances
    fees_usd   fee, log, and reads of S3
    """

    busy_usd: float
    idle_usd: float
    fees_usd: float

    @property
    def usd(self) -> float:
        return self.busy_usd + self.idle_usd + self.fees_usd


def log_usd(catalog: Catalog) -> float:
    """Price what Lambda logs of one invocation."""
    return catalog.function.log_bytes_per_call / _GB * catalog.storage.usd_per_log_gb


def function_prices(catalog: Catalog) -> FunctionPrices:
    """Read the prices of expert functions."""
    side = catalog.function
    return FunctionPrices(
        usd_per_gb_second=catalog.function_usd_per_gb_second,
        usd_per_storage_gb_second=side.usd_per_storage_gb_second,
        storage_free_mb=side.storage_free_mb,
        usd_per_call=side.usd_per_request + log_usd(catalog),
        usd_per_read=catalog.storage.usd_per_1000_reads / 1000 if side.bytes_per_read else 0.0,
    )


def function_usd_per_s(prices: FunctionPrices, memory_mb: npt.ArrayLike, storage_mb: npt.ArrayLike) -> Floats:
    """Price a second of a function with so much memory and so much /tmp. Arrays are broadcast."""
    beyond_mb = np.maximum(0.0, np.asarray(storage_mb, dtype=np.float64) - prices.storage_free_mb)
    memory_usd = prices.usd_per_gb_second * np.asarray(memory_mb, dtype=np.float64) / _GB_MB
    usd: Floats = prices.usd_per_storage_gb_second * beyond_mb / _GB_MB + memory_usd
    return usd


def function_storage_mb(catalog: Catalog, expert_bytes: int, experts: npt.ArrayLike) -> Floats:
    """Compute the /tmp of a function that fetches so many experts to it."""
    fetched_mb: Floats = np.ceil(np.asarray(experts, dtype=np.float64) * (expert_bytes / _MB))
    return fetched_mb + catalog.function.storage_spare_mb


def function_reads(catalog: Catalog, expert_bytes: int, experts: npt.ArrayLike) -> Floats:
    """Count the reads of S3 of a function that starts and needs so many experts.

    It reads its shard's head, and each expert in pieces.
    """
    pieces = ceil(expert_bytes / catalog.function.bytes_per_read) if catalog.function.bytes_per_read else 0
    reads: Floats = np.asarray(experts, dtype=np.float64) * pieces + (1.0 if pieces else 0.0)
    return reads


def main_prices(
    catalog: Catalog,
    spec: MainSpec,
    *,
    accelerator_bytes: float = 0.0,
    instances: int = 1,
    requests_per_hour: float | None = None,
    up_share: float = 1.0,
) -> MainPrices:
    """Read the prices of a main function.

    `accelerator_bytes` count where accelerator memory is bought by the GB-second.
    `requests_per_hour` is the traffic that all `instances` share, where they are rented, and `up_share` the part of the time that they are
    up, where they scale to zero.
    """
    side, function = catalog.main, catalog.function
    if spec.usd_per_hour is not None:
        share_usd = None if requests_per_hour is None else up_share * instances * spec.usd_per_hour / requests_per_hour
        fee_usd, read_usd, idle_s = 0.0, 0.0, None
        if spec.scales_to_zero and catalog.zero is not None:
            fee_usd = catalog.zero.usd_per_request + log_usd(catalog)
            read_usd, idle_s = catalog.storage.usd_per_1000_reads / 1000, catalog.zero.idle_s
        return MainPrices(
            rented=True,
            usd_per_s=spec.usd_per_hour / 3600,
            usd_per_request=fee_usd,
            usd_per_read=read_usd,
            share_usd=share_usd,
            idle_s=idle_s,
        )
    storage_usd = side.usd_per_storage_gb_second * max(0.0, spec.memory_mb - function.storage_free_mb) / _GB_MB
    memory_usd = catalog.main_usd_per_gb_second * spec.memory_mb / _GB_MB
    accelerator_usd = side.usd_per_accelerator_gb_second * accelerator_bytes / _GB
    return MainPrices(
        rented=False,
        usd_per_s=memory_usd + accelerator_usd + storage_usd,
        memory_mb=spec.memory_mb,
        usd_per_gb_second=catalog.main_usd_per_gb_second,
        usd_per_request=side.usd_per_request + log_usd(catalog),
        usd_per_read=catalog.storage.usd_per_1000_reads / 1000 if side.bytes_per_read else 0.0,
    )


def with_memory(prices: MainPrices, memory_mb: int) -> MainPrices:
    """Price a main function paid by use that was given so much memory."""
    more_usd = (memory_mb - prices.memory_mb) / _GB_MB * prices.usd_per_gb_second
    return prices.model_copy(update={"memory_mb": memory_mb, "usd_per_s": prices.usd_per_s + more_usd})


def main_reads(catalog: Catalog, spec: MainSpec) -> float:
    """Count the reads of S3 of a main function that starts; one that is always on has read before.

    It counts as if it read as much as its memory holds, or its /tmp where that is smaller.
    """
    if not spec.starts or not catalog.main.bytes_per_read:
        return 0.0
    most_mb = catalog.zero.storage_mb if spec.scales_to_zero and catalog.zero is not None else spec.memory_mb
    return ceil(min(spec.memory_mb, most_mb) * _MB / catalog.main.bytes_per_read)


def main_cost(prices: MainPrices, seconds: float, reads: float = 0.0) -> MainCost:
    """Price a request of so many seconds.

    Where a rented instance's hours are shared, a request that takes longer than its share is all busy, and pays no more.

    >>> rented = MainPrices(rented=True, usd_per_s=0.001, usd_per_request=0.0, usd_per_read=0.0, share_usd=0.05)
    >>> cost = main_cost(rented, 20.0)
    >>> round(cost.busy_usd, 9), round(cost.idle_usd, 9), cost.fees_usd
    (0.02, 0.03, 0.0)
    """
    busy_usd = prices.usd_per_s * seconds
    if prices.share_usd is not None:
        busy_usd = min(busy_usd, prices.share_usd)
    idle_usd = 0.0 if prices.share_usd is None else prices.share_usd - busy_usd
    return MainCost(busy_usd=busy_usd, idle_usd=idle_usd, fees_usd=prices.usd_per_request + prices.usd_per_read * reads)


def calls_usd(prices: FunctionPrices, memory_mb: float, storage_mb: float, billed_ms: Iterable[float], calls: int, reads: int = 0) -> float:
    """Price the invocations of one function by what was billed for them."""
    seconds = sum(billed_ms) / 1000
    return float(function_usd_per_s(prices, memory_mb, storage_mb)) * seconds + calls * prices.usd_per_call + reads * prices.usd_per_read
