"""Prints the table of "FP8: the planner chooses" in docs/adr/0011-packed-experts.md: a form for all functions, or for each layer.

    python docs/measure/form_by_layer.py PROFILE

The profile is one of a checkpoint in FP8 with described times, such as DeepSeek-V3's of plans/examples.sh. The exact solver gets the
columns of ready experts, of packed ones, and of both together, for several times of packed experts, once with a target. It takes minutes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, forms_of, make_problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import Columns, build_columns
from remoe_cli.plan.solve.exact import solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.variants import DecodeTable
from remoe_cli.profile.latency_record import Roofline
from remoe_cli.profile.record import read_profile

# Times of few rows, and of many, beside those of ready experts; and the TPOT that is asked for, in seconds.
CASES = ((0.66, 1.15, None), (1.32, 1.15, None), (1.55, 1.22, None), (1.39, 1.15, 1.9))
GAP, LIMIT_S = 1e-3, 1200.0
NAMES = ("layer", "at_set", "memory_mb", "functions", "replicas", "count", "gpu", "bill_usd", "start_s")


def both(ready: Columns, packed: Columns) -> Columns:
    """Put the columns of both forms in one programme; what has no remote experts is there once."""
    places = sum(table.shares.shape[0] * table.call_s.shape[0] for table in ready.decode_tables if isinstance(table, DecodeTable))
    kept = np.flatnonzero(packed.functions > 0)
    whole = {name: np.concatenate([getattr(ready, name), getattr(packed, name)[kept]]) for name in NAMES}
    whole["decode_at"] = np.concatenate([ready.decode_at, packed.decode_at[:, kept] + places], axis=1).astype(np.int32)
    whole["zt_s"] = np.concatenate([ready.zt_s, packed.zt_s[:, kept]], axis=1)
    form = np.repeat((0, 1), (len(ready.layer), len(kept)))
    order = np.lexsort((whole["replicas"], form, whole["functions"], whole["memory_mb"], whole["at_set"]))
    whole = {name: figures[..., order] for name, figures in whole.items()}
    starts = np.searchsorted(whole["layer"], np.arange(len(ready.starts)))
    return replace(ready, starts=starts, decode_tables=ready.decode_tables + packed.decode_tables, **whole)


def slower(packed: Problem, ready: Problem, few: float, many: float) -> Problem:
    curve = ready.latency.remote_expert.curve
    assert isinstance(curve, Roofline)
    curve = curve.model_copy(update={"weights_s": curve.weights_s * few, "per_token_s": curve.per_token_s * many})
    timing = packed.latency.remote_expert.model_copy(update={"curve": curve})
    return replace(packed, latency=packed.latency.model_copy(update={"remote_expert": timing}))


def value(problem: Problem, columns: Columns, aim: Aim) -> tuple[float, str]:
    start = time.process_time()
    found = solve(Task(problem, columns, aim), GAP, LIMIT_S)
    assert found is not None
    return found.value, f"{found.value:.4f} ({time.process_time() - start:.0f})"


def main() -> None:
    request = PlanRequest(n_in=125, n_out=200, requests_per_hour=20.0, cold_share=0.0)
    ready, packed = forms_of(make_problem(read_profile(Path(sys.argv[1])), read_catalog("aws-us-east-1"), request))
    sets = candidate_sets(ready)
    of_ready = build_columns(ready, sets)
    print("| times of packed | ready, USD a request (processor's s) | packed | the better for each layer | saved |")
    print("| --- | --- | --- | --- | --- |")
    for few, many, tpot_s in CASES:
        aim = Aim(tpot_s=tpot_s)
        one = slower(packed, ready, few, many)
        of_packed = build_columns(one, sets)
        found = [value(ready, of_ready, aim), value(one, of_packed, aim), value(ready, both(of_ready, of_packed), aim)]
        saved = 1 - found[2][0] / min(found[0][0], found[1][0])
        target = "" if tpot_s is None else f", TPOT at most {tpot_s:g} s"
        print(f"| x {few:g}, x {many:g}{target} | {' | '.join(text for _, text in found)} | {saved:.1%} |", flush=True)


if __name__ == "__main__":
    main()
