"""Print the tables of docs/explanation/when-it-pays.md: plans for several rates, simulated under a trace of requests.

python docs/measure/when_it_pays.py PROFILE TRACE [--catalog NAME] [--tpot SECONDS] [--cover SHARE] [--rates 1,5,20,..]

For each rate, `remoe plan` makes the plan for the trace's requests at that rate, and the plan and its alternatives are simulated: with
random times (burstiness 1), and with the trace's own, which come in bursts. The profile and the trace are not part of this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.request import PlanRequest
from remoe_cli.plan.problem.trace_requests import read_requests
from remoe_cli.plan.problem.trace_traffic import read_traffic
from remoe_cli.plan.wording import bought, dollars
from remoe_cli.profile.record import read_profile
from remoe_cli.simulate.requests import served_of, source_of
from remoe_cli.simulate.summary import Summary, simulated
from remoe_cli.simulate.ways import ways

_COUNT, _SEEDS, _BURSTS = 20_000, 3, {"random": 1.0, "as in the trace": None, "in bursts (3)": 3.0}


def _cell(one: Summary) -> str:
    ttft, tpot = one.ttft_s["p50"].mean, one.tpot_s["p50"].mean
    refused = f", {one.refused.mean:.0%} unanswered" if one.refused.mean >= 0.005 else ""
    return f"{dollars(one.usd_per_hour.mean)}, {ttft:.3g} / {one.ttft_s['p99'].mean:.3g} s, {tpot:.2g} s{refused}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("profile", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--catalog", default="aws-us-east-1")
    parser.add_argument("--tpot", type=float)
    parser.add_argument("--cover", type=float, default=0.99)
    parser.add_argument("--rates", default="1,5,20,60,200")
    arguments = parser.parse_args()
    profile, catalog = read_profile(arguments.profile), read_catalog(arguments.catalog)
    traffic, timed = read_traffic(arguments.trace, arguments.cover), read_requests(arguments.trace)
    print("| requests an hour | times | plan | remote experts | USD an hour, TTFT p50 / p99, TPOT | cheapest other way | the same of it |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rate in map(float, arguments.rates.split(",")):
        asked = PlanRequest(aim=Aim("cost", None, arguments.tpot, None), traffic=traffic, requests_per_hour=rate, examine=False)
        plan = make_plan(profile, catalog, asked)
        remote = sum(len(layer.remote) for layer in plan.layers)
        for name, burstiness in _BURSTS.items():
            source = served_of(source_of(timed, rate, burstiness), traffic.served)  # the same requests for all: those that the plan is for
            own, *rest = simulated(ways((plan, profile, catalog), source), source, _COUNT, _SEEDS)
            best = min(rest, key=lambda one: (one.refused.mean > 0.01, one.usd_per_hour.mean))
            print(
                f"| {rate:g} | {name} | {bought(plan.main.name, plan.instances)} | {remote:,} | {_cell(own)} | {best.name}, {best.spec} "
                f"| {_cell(best)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
