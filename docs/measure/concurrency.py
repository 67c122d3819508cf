"""What several requests at once make of plans, and how well drawn decode steps stand for all.

    python docs/measure/concurrency.py plans PROFILE [--catalog local aws-us-east-1] [--at-once 1 2 4 8 16]
    python docs/measure/concurrency.py drawn PROFILE .. [--at-once 2 4 8 16 32]

`plans` plans by the scan for requests of 125 prompt + 201 output tokens, at an unknown traffic. `drawn` compares the experts that drawn
steps use with the exact expectation for independent tokens, and how often the less used half, or the least used eighth, is called.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import numpy as np

from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.problem.request import PlanRequest
from remoe_cli.plan.problem.workload import Workload, from_profile
from remoe_cli.plan.wording import dollars, figure, token_usd
from remoe_cli.profile.record import Profile, read_profile

N_IN, N_OUT = 125, 200
_PLANS = (
    "| catalog | at once | main function | remote experts | per million tokens | TTFT | TPOT | cheaper below, requests an hour | against |"
)
_DRAWN = "| profile | at once | distinct experts, drawn / exact | largest error of a layer | calls of the less used half | of an eighth |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("plans", "drawn"))
    parser.add_argument("profile", nargs="+", type=Path)
    parser.add_argument("--catalog", nargs="+", default=["local", "aws-us-east-1"])
    parser.add_argument("--at-once", nargs="+", type=int)
    options = parser.parse_args()
    print(f"{date.today()}, {N_IN} prompt + {N_OUT + 1} output tokens\n")
    head = _PLANS if options.what == "plans" else _DRAWN
    print(f"{head}\n|{' --- |' * (head.count('|') - 1)}")
    for profile in map(read_profile, options.profile):
        if options.what == "drawn":
            _drawn(profile, options.at_once or [2, 4, 8, 16, 32])
            continue
        for catalog in options.catalog:
            _plans(profile, catalog, options.at_once or [1, 2, 4, 8, 16])


def _plans(profile: Profile, catalog: str, at_once: list[int]) -> None:
    for number in at_once:
        request = PlanRequest(n_in=N_IN, n_out=N_OUT, solver="scan", concurrency=number, examine=False)
        plan = make_plan(profile, read_catalog(catalog), request)
        traffic = plan.break_even_traffic
        cells = (
            catalog,
            f"{number}" if plan.concurrency == number else f"{number}, and {plan.concurrency} in this main function",
            plan.main.name,
            f"{sum(len(layer.remote) for layer in plan.layers):,}",
            dollars(token_usd(plan.cost_usd_per_request, plan.workload)),
            f"{plan.ttft_s:.1f} s",
            f"{plan.tpot_s * 1e3:.0f} ms",
            figure(traffic.requests_per_hour) if traffic else "",
            f"{traffic.instance}, {traffic.tpot_s * 1e3:.0f} ms" if traffic else "",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _drawn(profile: Profile, at_once: list[int]) -> None:
    workload = from_profile(profile, N_IN, N_OUT)
    for number in at_once:
        layers = range(len(workload.patterns))
        exact = [float((1 - (1 - workload.decode_hits[layer]) ** number).sum()) for layer in layers]
        drawn = [float((workload.step_rows(layer, number) > 0).sum(axis=0).mean()) for layer in layers]
        errors = [abs(one / other - 1) for one, other in zip(drawn, exact, strict=True)]
        experts = workload.use.shape[1]
        shares = [_called(workload, number, count) for count in (experts // 2, experts // 8)]
        print(
            f"| {profile.path.name} | {number} | {np.mean(drawn):.2f} / {np.mean(exact):.2f} | {max(errors):.1%} | {' | '.join(shares)} |",
            flush=True,
        )


def _called(workload: Workload, number: int, count: int) -> str:
    """Compare how often a step calls for the `count` least used experts: drawn, and exact for independent tokens, means over layers."""
    drawn, exact = [], []
    for layer, (sets, weights) in enumerate(workload.patterns):
        rare = workload.ranks[layer] < count
        hit = float(np.isin(sets, np.flatnonzero(rare)).any(axis=1) @ weights) / float(weights.sum())
        exact.append(1 - (1 - hit) ** number)
        drawn.append(float((workload.step_rows(layer, number)[rare] > 0).any(axis=0).mean()))
    return f"{np.mean(drawn):.3f} / {np.mean(exact):.3f}"


if __name__ == "__main__":
    main()
