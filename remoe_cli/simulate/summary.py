"""Add up simulated runs: money, times and shares, with their range over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from remoe_cli.plan.arrays import Floats
from remoe_cli.simulate.requests import Source, drawn
from remoe_cli.simulate.run import Run, run
from remoe_cli.simulate.service import Service

PERCENTILES = (50, 95, 99)


class Figure(NamedTuple):
    """A figure of several runs: its mean, and the least and the largest of them."""

    mean: float
    least: float
    most: float


class Summary(NamedTuple):
    """What one way of serving did, in all seeds.

    usd_per_hour, usd_per_million_tokens    of output tokens
    ttft_s, tpot_s                          by percentile
    cold, refused                           shares of the requests
    up                                      share of the time that rented instances are paid
    """

    name: str
    spec: str
    usd_per_hour: Figure
    usd_per_million_tokens: Figure
    ttft_s: dict[str, Figure]
    tpot_s: dict[str, Figure]
    cold: Figure
    refused: Figure
    up: Figure


def simulated(services: Sequence[Service], source: Source, count: int, seeds: int) -> list[Summary]:
    """Run `count` requests through each way of serving, once for each seed; all meet the same ones."""
    runs: list[list[Run]] = [[] for _ in services]
    for seed in range(seeds):
        arrivals = drawn(source, count, seed)
        for kept, service in zip(runs, services, strict=True):
            kept.append(run(service, arrivals, seed))
    return [_summary(service, kept) for service, kept in zip(services, runs, strict=True)]


def _summary(service: Service, runs: Sequence[Run]) -> Summary:
    return Summary(
        name=service.name,
        spec=service.spec,
        usd_per_hour=_figure([one.usd / one.over_s * 3600 for one in runs]),
        usd_per_million_tokens=_figure([one.usd / max(1, one.tokens) * 1e6 for one in runs]),
        ttft_s=_percentiles([one.ttft_s for one in runs]),
        tpot_s=_percentiles([one.tpot_s for one in runs]),
        cold=_figure([float(one.cold.mean()) for one in runs]),
        refused=_figure([float(one.refused.mean()) for one in runs]),
        up=_figure([one.up_share for one in runs]),
    )


def _percentiles(runs: Sequence[Floats]) -> dict[str, Figure]:
    answered = [each[~np.isnan(each)] for each in runs]
    return {f"p{p}": _figure([float(np.percentile(each, p)) if len(each) else float("nan") for each in answered]) for p in PERCENTILES}


def _figure(values: Sequence[float]) -> Figure:
    return Figure(float(np.mean(values)), min(values), max(values))
