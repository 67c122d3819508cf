"""What is predicted for single requests is what the plan says of them together: in money too, however the main function is paid."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import json_text, write_json
from remoe_cli.plan.catalog.catalog import catalog_text, read_catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import busy_s, layer_outcomes, total
from remoe_cli.plan.cost.prices import main_cost
from remoe_cli.plan.document import LayerPlan, Lengths
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import PlanRequest, inputs_of, make_problem, problem_of
from remoe_cli.plan.problem.sizes import sizes_of
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.expected_cost import PlannedCosts, cost_model, costs_of, predictor
from tests.support.synthetic import plan_of, synthetic_profile

KINDS = (Lengths(share=0.75, n_in=20, n_out=10), Lengths(share=0.25, n_in=200, n_out=50))
LONGEST = sizes_of(((0.75, 20, 10), (0.2, 200, 50), (0.05, 260, 5)))


@pytest.mark.parametrize(
    ("menu", "per_hour", "accelerator"),
    [("lambda", None, 0.0), ("lambda", None, 5e-5), ("lambda", 40.0, 5e-5), ("ml", 40.0, 0.0)],
    ids=["Lambda", "accelerator", "accelerator with traffic", "rented"],
)
def test_the_mean_of_what_is_predicted_is_what_the_plan_costs(
    menu: str, per_hour: float | None, accelerator: float, tmp_path: Path
) -> None:
    """The requests of the plan by themselves, warm: accelerator memory is that of the longest one, rented hours are shared."""
    text = catalog_text("aws-us-east-1").replace("usd_per_accelerator_gb_second = 0.0", f"usd_per_accelerator_gb_second = {accelerator}")
    other = "ml." if menu == "lambda" else "lambda-"
    kept, before_main = [], True
    for line in text.splitlines():
        before_main &= line != "[reference]"
        kept += [] if before_main and f'name = "{other}' in line else [line]
    path = tmp_path / "catalog.toml"
    path.write_text("\n".join(kept))
    profile, catalog = synthetic_profile(tmp_path / "profile"), read_catalog(str(path))
    options: dict[str, Any] = {"remote_share": 0.5, "traffic": Traffic(KINDS, per_hour, requests=LONGEST), "cold_share": 0.0}
    plan = plan_of(profile, catalog, **options)
    assert plan.main.name.startswith(menu) and any(layer.remote for layer in plan.layers)
    write_json(tmp_path / "plan.json", plan)
    predict = cost_model(*inputs_of(tmp_path / "plan.json"))
    found = [(kind.share, predict(kind.n_in, kind.n_out)) for kind in KINDS]
    assert sum(share * one.cost_usd_per_request for share, one in found) == pytest.approx(plan.cost_usd_per_request, rel=1e-9)
    assert sum(share * one.ttft_s for share, one in found) == pytest.approx(plan.ttft_s, rel=1e-9)
    shortest = predict(20, 0)  # an answer of one token
    assert 0 < shortest.cost_usd_per_request <= found[0][1].cost_usd_per_request
    assert (shortest.cost_usd_per_request < found[0][1].cost_usd_per_request) or menu == "ml"


PART = LayerPlan(layer=0, remote=(0, 1, 4), memory_mb=1769, replicas=1, functions=((0, 4), (1,)))
REPLICAS = LayerPlan(layer=0, remote=(0, 1, 4), memory_mb=1769, replicas=2)
ON_GPU = LayerPlan(layer=0, remote=(0, 1), memory_mb=1769, replicas=1, gpu=(2, 3))
KNOWN: dict[str, tuple[LayerPlan, str, dict[str, Any]]] = {
    "functions": (PART, "ml.g5.xlarge", {}),
    "replicas, by use": (REPLICAS, "lambda-3584", {}),
    "a call for each expert": (PART, "lambda-3584", {"invocations": "per-expert"}),
    "a GPU": (ON_GPU, "ml.g5.xlarge", {}),
    "several at once": (REPLICAS, "ml.g5.xlarge", {"concurrency": 4}),
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), experts=8)


@pytest.mark.parametrize("case", KNOWN)
def test_what_a_main_function_is_told_says_what_the_cost_model_says(case: str, profile: Profile) -> None:
    """Of requests of any length, by the text of a document; of several answers, what they cost one after another."""
    first, main, options = KNOWN[case]
    catalog = read_catalog("aws-us-east-1")
    spec = next(spec for spec in catalog.main.menu if spec.name == main)
    layers = tuple(first.model_copy(update={"layer": layer}) for layer in profile.record.spec.moe_layers)
    asked = PlanRequest(n_in=20, n_out=15, requests_per_hour=600.0, cold_share=0.1, **options)
    problem = make_problem(profile, catalog, asked).at_main(spec)
    placement = Placement(spec, layers)
    prices = main_function.prices_of(problem, placement.bought)
    told = PlannedCosts.model_validate_json(json_text(costs_of(problem, placement)))
    predict = predictor(told, profile.record.spec, prices)
    each = []
    for n_in, n_out in ((1, 0), (20, 15), (20, 40), (300, 7)):
        one = replace(problem, workload=problem.workload.resized(n_in, n_out))
        parts = layer_outcomes(one, placement)
        times = total(one, placement, parts)
        busy = busy_s(one, placement, times, parts)
        usd = sum(part.usd for part in parts)
        wanted = times.model_copy(update={"cost_usd_per_request": main_cost(prices, busy).usd + usd})
        assert predict(n_in, n_out).model_dump() == pytest.approx(wanted.model_dump(), rel=1e-12)
        each.append((busy, usd, wanted))
    (_, (busy, usd, short), (busier, more_usd, long), _) = each
    both = predict(20, 15, 40)
    assert both.cost_usd_per_request == pytest.approx(main_cost(prices, busy + busier).usd + usd + more_usd, rel=1e-12)
    assert (both.ttft_s, both.tpot_s) == pytest.approx((short.ttft_s, (15 * short.tpot_s + 40 * long.tpot_s) / 55), rel=1e-12)
    assert predict(20, 0, 0).tpot_s == predict(20, 0).tpot_s > 0, "no token comes after a first one"


def test_nothing_measured_and_no_prompt_is_told(profile: Profile) -> None:
    catalog = read_catalog("aws-us-east-1")
    plan = plan_of(profile, catalog, remote_share=0.5)
    problem, placement = problem_of(plan, profile, catalog).at_main(plan.main), Placement(plan.main, plan.layers, plan.instances)
    text = json_text(costs_of(problem, placement))
    assert len(text) < 40_000 and not re.search(r'"(points|residuals|samples)": \[[^]]', text)
    assert str(profile.path) not in text
