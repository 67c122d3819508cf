"""Prints what planning loses when it weighs only prefixes of the order of use, where all subsets can be weighed too.

    python docs/measure/prefixes.py

Above 8 experts a layer the exact planner weighs prefixes alone. Here it plans models of 8 experts twice, once with each kind of remote
sets, both to a gap of 0.01%, on made-up routing in the setting of solvers.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

from solver_cases import LAWS, MODELS, Asked, asked, drawn, hardware

from remoe_cli.plan.solve.candidates import Sets, candidate_sets, prefix_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import solve
from remoe_cli.plan.solve.node import Task

GAP = 1e-4
OVERHEADS_MS = (1.0, 5.0)


def least_usd(case: Asked, sets: tuple[Sets, ...]) -> float:
    problem = case.problem()
    solution = solve(Task(problem, build_columns(problem, sets), case.aim), gap=GAP)
    assert solution is not None
    return solution.value


def main() -> None:
    print("| model | routing | overhead of a call, ms | all subsets, USD a request | prefixes dearer by |\n| --- | --- | --- | --- | --- |")
    for name, law, overhead_ms in product(("GPT2-moe", "Mixtral-8x7B"), LAWS, OVERHEADS_MS):
        size = MODELS[name]
        setting = replace(size.setting, t_rem_ms=overhead_ms)
        with tempfile.TemporaryDirectory() as folder:
            profile = drawn(Path(folder), law, size.spec, hardware(Path(folder), setting.cap))
            case = asked(profile, setting, Path(folder))
            problem = case.problem()
            every = least_usd(case, candidate_sets(problem))
            prefixes = least_usd(case, prefix_sets(problem.workload, tuple(range(size.spec.experts_per_layer + 1))))
        print(f"| {name} | {law} | {overhead_ms:g} | {every:.6f} | {max(0.0, prefixes / every - 1):.2%} |")


if __name__ == "__main__":
    main()
