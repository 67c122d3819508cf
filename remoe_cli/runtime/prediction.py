"""What the plan predicts for one request, so that every receipt can hold prediction against measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.errors import RemoeError
from remoe_cli.plan.build import Wanted, make_problem
from remoe_cli.plan.catalog import read_catalog
from remoe_cli.plan.cost import evaluate
from remoe_cli.plan.document import Outcome, Plan
from remoe_cli.plan.problem import Placement
from remoe_cli.profile.record import read_profile

# (prompt tokens, generated tokens after the first) -> the outcome, or None when it cannot be told
Predict = Callable[[int, int], Outcome | None]


def predictor(plan_path: Path) -> Predict:
    """The planner's cost model at the plan's placement, for requests of any length; a lost profile predicts nothing."""
    plan = read_json(plan_path, Plan)
    try:
        profile, catalog = read_profile(Path(plan.profile.path)), read_catalog(plan.catalog.path)
    except RemoeError:
        return lambda n_in, n_out: None
    placement = Placement(plan.main, plan.layers, plan.instances)
    problem = make_problem(profile, catalog, Wanted(invocations=plan.invocations))

    def predict(n_in: int, n_out: int) -> Outcome:
        return evaluate(replace(problem, workload=problem.workload.resized(n_in, max(1, n_out))), placement)

    return predict
