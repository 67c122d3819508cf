"""Predict the time and the cost of one request, so that a receipt shows prediction and measurement.

The cost model needs the profile, which holds the user's prompts and stays on the user's machine. So the client predicts (`remoe infer`,
`remoe chat`), or the main server of `remoe serve`, which runs beside the profile. The main function of a deployment does not, and needs no
planner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import busy_s, layer_outcomes, total
from remoe_cli.plan.cost.prices import main_cost
from remoe_cli.plan.document import Outcome, Plan
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import inputs_of, problem_of
from remoe_cli.profile.record import Profile

# (prompt tokens, generated tokens after the first) -> the outcome
ExpectedCost = Callable[[int, int], Outcome]


def expected_cost(plan_path: Path) -> ExpectedCost:
    """Return the planner's cost model for the plan's placement; it takes requests of any length.

    Where the plan is for several requests at once, it is that of a request among so many of its length.

    Raises: what `inputs_of` raises.
    """
    return cost_model(*inputs_of(plan_path))


def cost_model(plan: Plan, profile: Profile, catalog: Catalog) -> ExpectedCost:
    """Return the same for a plan, its profile and its catalog."""
    placement = Placement(plan.main, plan.layers, plan.instances)
    problem = problem_of(plan, profile, catalog).at_main(plan.main)
    prices = main_function.prices_of(problem, placement.bought)

    def predict(n_in: int, n_out: int) -> Outcome:
        one = replace(problem, workload=problem.workload.resized(n_in, n_out))
        layers = layer_outcomes(one, placement)
        times = total(one, placement, layers)
        # As in its receipt: accelerator memory is that of the plan's longest request, and rented hours are shared as planned.
        main = main_cost(prices, busy_s(one, placement, times, layers))
        return times.model_copy(update={"cost_usd_per_request": main.usd + sum(layer.usd for layer in layers)})

    return predict
