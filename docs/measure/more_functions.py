"""What dividing a layer's experts over more functions than memory needs is worth: exact plans over columns without such, and with.

    python docs/measure/more_functions.py PROFILE [PROFILE ..]

Profiles are those of plans/examples.sh. The catalog is aws-us-east-1, with requests of 125 prompt + 201 output tokens, 20 an hour, and
functions that are kept warm. Plans are as the exact solver leaves them, without exchanges of single experts. All times are of descriptions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Outcome
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import Columns, build_columns
from remoe_cli.plan.solve.exact import GAP, Solution, solve
from remoe_cli.plan.solve.node import Task
from remoe_cli.profile.record import read_profile

ASKED = PlanRequest(n_in=125, n_out=200, requests_per_hour=20.0, cold_share=0.0)
LIMIT_S = 300.0
DEARER, SOONER = (1.05, 1.2, 2.0), (0.95, 0.8)  # budgets in the least cost; TPOT in that of the cheapest plan


@dataclass(frozen=True)
class Found:
    """A plan, its figures, and the processor's seconds that it took."""

    solution: Solution
    outcome: Outcome
    seconds: float


def found(problem: Problem, columns: Columns, aim: Aim) -> Found | None:
    start = time.process_time()
    solution = solve(Task(problem, columns, aim), GAP, LIMIT_S)
    seconds = time.process_time() - start
    return None if solution is None else Found(solution, evaluate(problem, solution.placement), seconds)


def figures(one: Found | None) -> str:
    if one is None:
        return "none |  |"
    main, layers = one.solution.main, one.solution.layers
    on = f"{main.instances} x {main.spec.name}" if main.instances > 1 else main.spec.name
    outcome, functions = one.outcome, sum(len(layer.parts) for layer in layers)
    return f"${outcome.cost_usd_per_request:.4f}, {outcome.tpot_s * 1e3:.1f} ms | {on}, {functions} | {one.seconds:.1f} s"


def change(before: Found | None, after: Found | None) -> str:
    if before is None or after is None:
        return ""
    usd, tpot = (getattr(after.outcome, name) / getattr(before.outcome, name) - 1 for name in ("cost_usd_per_request", "tpot_s"))
    return f"{usd:+.1%} cost, {tpot:+.1%} TPOT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path)
    print("| model | wanted | fewest functions | on, functions | solved in | any number | on, functions | solved in | change |")
    print(f"|{' --- |' * 9}")
    for path in parser.parse_args().profiles:
        profile = read_profile(path)
        problem = make_problem(profile, read_catalog("aws-us-east-1"), ASKED)
        sets = candidate_sets(problem)
        fewest, every = (build_columns(problem, sets, functions=numbers) for numbers in ((), None))
        cheapest = found(problem, fewest, Aim())
        assert cheapest is not None
        usd, tpot_s = cheapest.outcome.cost_usd_per_request, cheapest.outcome.tpot_s
        wanted = {"least cost": Aim()}
        wanted |= {f"least cost at {times:g} times that TPOT": Aim(tpot_s=times * tpot_s) for times in SOONER}
        wanted |= {f"least TPOT for {times:g} times that cost": Aim("tpot", budget_usd=times * usd) for times in DEARER}
        for name, aim in wanted.items():
            before, after = found(problem, fewest, aim), found(problem, every, aim)
            print(
                f"| {Path(profile.record.model.path).name} | {name} | {figures(before)} | {figures(after)} | {change(before, after)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
