"""What a month costs with each kind of main function: paid by use, scaled to zero between requests, always on.

    python docs/measure/endpoint_kinds.py PROFILE .. [--per-hour 1 20 200] [--tpot 0.45 0.7]

It plans for requests of 125 prompt + 201 output tokens on the catalog aws-us-east-1, at each traffic,
with the planner's scan for every kind.
"""

from __future__ import annotations

import argparse
import platform
from datetime import date
from pathlib import Path

from remoe_cli.plan.assess.kinds import best_of
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.cost.placement import Priced
from remoe_cli.plan.cost.prompts import waits
from remoe_cli.plan.document import MainKind
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.wording import HOURS_PER_MONTH, KIND_NAMES, bought, dollars
from remoe_cli.profile.record import read_profile

N_IN, N_OUT, CATALOG = 125, 200, "aws-us-east-1"
_HEAD = "| requests an hour | main function | on | a month | wake it | up | TTFT | TPOT |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", nargs="+", type=Path)
    parser.add_argument("--per-hour", nargs="+", type=float, default=[1.0, 20.0, 200.0])
    parser.add_argument("--tpot", nargs="+", type=float, default=[0.45, 0.7], help="targets in s")
    options = parser.parse_args()
    catalog = read_catalog(CATALOG)
    print(f"{date.today()}, {platform.machine()}, {CATALOG} of {catalog.oldest_price}, {N_IN} prompt + {N_OUT + 1} output tokens")
    for path in options.profile:
        for tpot_s in options.tpot:
            aim = Aim(tpot_s=tpot_s)
            print(f"\n{path.name}, TPOT at most {tpot_s:g} s\n\n{_HEAD}\n|{' --- |' * 8}")
            for per_hour in options.per_hour:
                request = PlanRequest(n_in=N_IN, n_out=N_OUT, requests_per_hour=per_hour, aim=aim)
                problem = make_problem(read_profile(path), catalog, request)
                for kind in MainKind:
                    print(f"| {per_hour:g} | {KIND_NAMES[kind]} | {_cells(problem, best_of(problem, aim, kind))} |", flush=True)


def _cells(problem: Problem, found: Priced | None) -> str:
    if found is None:
        return "none meets the target | | | | | "
    placement, outcome, waking = found.placement, found.outcome, problem.workload.waking
    zero = placement.main.scales_to_zero and waking is not None
    parts = [part for part in waits(problem, placement) if part[0] > 0]
    warm_s = outcome.ttft_s - sum(share * wait_s for share, wait_s in parts)
    cells = (
        bought(placement.main.name, placement.instances),
        dollars(outcome.cost_usd_per_request * (problem.workload.requests_per_hour or 0.0) * HOURS_PER_MONTH),
        f"{waking.wake_share:.1%}" if zero and waking else "",
        f"{waking.up_share:.1%}" if zero and waking else "",
        ", ".join(f"{warm_s + wait_s:.0f} s ({share:.1%})" for share, wait_s in parts),
        f"{outcome.tpot_s:.2f} s",
    )
    return " | ".join(cells)


if __name__ == "__main__":
    main()
