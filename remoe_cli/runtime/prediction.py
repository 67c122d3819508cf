"""What the plan predicts for one request, so that every receipt can hold prediction against measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remoe_cli.artifacts import read_json
from remoe_cli.errors import RemoeError
from remoe_cli.plan.catalog import read_catalog
from remoe_cli.plan.cost import Placement, Problem, evaluate
from remoe_cli.plan.document import Outcome, Plan
from remoe_cli.plan.workload import from_profile
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
    placement, workload = Placement(plan.main, plan.layers), from_profile(profile)

    def predict(n_in: int, n_out: int) -> Outcome:
        request = workload.resized(n_in, max(1, n_out))
        return evaluate(Problem(profile.record.spec, profile.record.latency, catalog, request), placement)

    return predict
