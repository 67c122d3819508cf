"""Layers whose experts are divided over more functions than memory needs: when that pays, and that all who read the plan agree on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.choose import solve_or_diagnose
from remoe_cli.plan.cost.placement import evaluate, layer_outcomes
from remoe_cli.plan.document import LayerPlan, Plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import MB, Placement, Problem
from remoe_cli.plan.problem.request import problem_of as problem_of_plan
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import Solution, solve
from remoe_cli.plan.solve.local_search import improve
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.solve.scan import scan
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.expected_cost import cost_model
from remoe_cli.simulate.service import of_placement
from tests.plan.test_exact import held_against
from tests.support.brute_force import Brute
from tests.support.synthetic import plan_of, problem_of, synthetic_profile, tiny_catalog

# A main function that holds few experts, and functions each of which holds all experts of a layer.
CATALOG = tiny_catalog({"menu": [{"name": "m720", "memory_mb": 720, "vcpus": 1.0}]}, memory_menu_mb=[512, 1024], max_functions=4)


def up_to(functions: int) -> Catalog:
    """The catalog with at most so many functions a layer."""
    return CATALOG.model_copy(update={"function": CATALOG.function.model_copy(update={"max_functions": functions})})


ONE_EACH = up_to(1)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Four experts for each token, that take longer than a call's overhead."""
    return synthetic_profile(tmp_path_factory.mktemp("profile"), experts=12, top_k=4, remote_expert=(4e-3, 2e-4))


def fastest(profile: Profile, catalog: Catalog = CATALOG, **options: Any) -> Plan:
    return plan_of(profile, catalog, objective="tpot", **options)


def divided(problem: Problem, layers: tuple[LayerPlan, ...]) -> int:
    """Count the layers that have several functions and could do with one."""
    undivided = tuple(layer.model_copy(update={"functions": ()}) for layer in layers)
    held = layer_outcomes(problem, Placement(problem.menu[0], undivided))
    return sum(len(layer.parts) > 1 and part.function_bytes <= layer.memory_mb * MB for layer, part in zip(layers, held, strict=True))


def best(problem: Problem, aim: Aim, *, fewest: bool = False) -> Solution | None:
    return solve(Task(problem, build_columns(problem, candidate_sets(problem), functions=() if fewest else None), aim), 1e-6)


def test_the_fastest_plan_divides_what_one_function_holds(profile: Profile) -> None:
    plan, alone = fastest(profile), fastest(profile, ONE_EACH)
    assert divided(problem_of_plan(plan, profile, CATALOG), plan.layers) == 2
    assert plan.tpot_s < 0.9 * alone.tpot_s and plan.gap is not None and plan.gap <= 1e-3
    assert verify(plan, profile, CATALOG) == ()
    functions = sum(len(layer.parts) for layer in plan.layers)
    note = f"2 of 2 layers have more expert functions than memory needs, {functions} in all instead of 2: "
    assert any(one.startswith(note) for one in plan.notes) and not any("memory needs" in one for one in alone.notes)
    wrong = plan.model_copy(update={"tpot_s": alone.tpot_s})
    assert "tpot_s" in {finding.field for finding in verify(wrong, profile, CATALOG)}


def test_a_tpot_between_both_is_met_at_least_cost(profile: Profile) -> None:
    """No more functions than it takes: cost rises as the target falls, and the plan without a target costs what it did."""
    free, alone, least = plan_of(profile, CATALOG), fastest(profile, ONE_EACH), fastest(profile)
    functions, usd = [sum(len(layer.parts) for layer in free.layers)], [free.cost_usd_per_request]
    for share in (0.3, 0.6, 0.9):
        plan = plan_of(profile, CATALOG, tpot_s=alone.tpot_s + share * (least.tpot_s - alone.tpot_s))
        assert verify(plan, profile, CATALOG) == ()
        functions.append(sum(len(layer.parts) for layer in plan.layers))
        usd.append(plan.cost_usd_per_request)
    assert functions == sorted(functions) and functions[0] < functions[-1] < sum(len(layer.parts) for layer in least.layers) + 1
    loose = plan_of(profile, CATALOG, tpot_s=10.0)
    assert loose.cost_usd_per_request <= usd[0] * (1 + 1e-3) and verify(loose, profile, CATALOG) == ()
    assert usd == sorted(usd) and usd[0] <= plan_of(profile, ONE_EACH).cost_usd_per_request * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_more_columns_never_make_a_plan_worse(seed: int, tmp_path: Path) -> None:
    problem = problem_of(synthetic_profile(tmp_path, experts=10, top_k=3, skew=1.5, seed=seed, expert_mb=60), CATALOG)
    cheapest = best(problem, Aim(), fewest=True)
    assert cheapest is not None
    budget_usd = 1.2 * cheapest.value
    for aim in (Aim(), Aim("tpot"), Aim("ttft"), Aim("tpot", budget_usd=budget_usd)):
        few, any_number = best(problem, aim, fewest=True), best(problem, aim)
        assert few is not None and any_number is not None
        assert any_number.value <= few.value * (1 + 2e-6)
        assert any_number.lower_bound <= any_number.value


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_by_brute_force_is_better(seed: int, tmp_path: Path) -> None:
    """Where the fastest plan has more functions than memory needs, against every plan with every number of functions."""
    shape: dict[str, Any] = {"experts": 4, "top_k": 3, "prompts": 6, "decode_tokens": 4, "remote_expert": (4e-3, 2e-4)}
    profile = synthetic_profile(tmp_path, seed=seed, **shape)
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": 1.0} for mb in (720, 760)]
    catalog = tiny_catalog({"menu": menu}, memory_menu_mb=[512, 1024], max_functions=3)
    problem = problem_of(profile, catalog)
    brute = Brute(profile, catalog, [(1.0, round(problem.workload.n_in), round(problem.workload.n_out))])
    held_against(brute, problem)
    found = solve_or_diagnose(problem, candidate_sets(problem), Aim("tpot"), 60.0, None)  # as plans are made, with nothing to start from
    assert divided(problem, found.layers) and found.value <= brute.all()[:, 2].min() * (1 + 1e-3)


def test_the_scan_and_exchanges_of_experts_divide_too(profile: Profile) -> None:
    problem = problem_of(profile, CATALOG)
    found, least = scan(problem, Aim("tpot")), best(problem, Aim("tpot"))
    assert found is not None and least is not None
    assert divided(problem, found.layers) == 2 and found.value <= 1.02 * least.value
    better = improve(problem, Aim("tpot"), found)
    assert [len(layer.parts) for layer in better.layers] == [len(layer.parts) for layer in found.layers]
    assert better.value == pytest.approx(evaluate(problem, better.placement).tpot_s, rel=1e-12) and better.value <= found.value


@pytest.mark.parametrize("options", [{"concurrency": 3}, {"invocations": "per-expert"}, {"requests_per_hour": 50.0, "cold_share": 0.5}])
def test_the_verifier_agrees_in_other_modes(profile: Profile, options: dict[str, Any]) -> None:
    plan = fastest(profile, **options)
    assert divided(problem_of_plan(plan, profile, CATALOG), plan.layers)
    assert verify(plan, profile, CATALOG) == ()


def test_simulations_and_receipts_take_what_the_plan_says(profile: Profile) -> None:
    plan = fastest(profile)
    problem = problem_of_plan(plan, profile, CATALOG)
    n_in, n_out = plan.workload.n_in, plan.workload.n_out
    service = of_placement(problem, Placement(plan.main, plan.layers), "it", np.array([n_in]), n_out)
    assert service.step_s[1] == pytest.approx(plan.tpot_s, rel=1e-9)
    assert service.functions is not None
    assert service.prefill_usd[0] + n_out * service.token_usd[1] == pytest.approx(sum(plan.costs.layers_usd), rel=1e-9)
    receipt = cost_model(plan, profile, CATALOG)(round(n_in), round(n_out))
    assert (receipt.tpot_s, receipt.ttft_s) == pytest.approx((plan.tpot_s, plan.ttft_s))
    assert receipt.cost_usd_per_request == pytest.approx(plan.cost_usd_per_request)


def test_no_function_is_empty(tmp_path: Path) -> None:
    """A set has at most as many functions as experts."""
    problem = problem_of(synthetic_profile(tmp_path, experts=4, top_k=2), up_to(8))
    columns = build_columns(problem, candidate_sets(problem))
    assert (columns.functions <= columns.count).all() and columns.functions.max() == 4
