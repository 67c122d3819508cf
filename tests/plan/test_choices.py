"""What plans are asked for besides the least cost: traffic, robustness, baselines; and properties of the least cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.plan.assess.frontier import frontier
from remoe_cli.plan.assess.robustness import flatter, slower_calls
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.cost.expert_functions import cold_s
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.latency_record import ColdStart
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

SHAPE: dict[str, Any] = {"layers": 3, "experts": 6, "skew": 2.5, "expert_mb": 90, "main_vcpus": 1, "remote_expert": (1e-4, 1e-5)}
BOX = {"name": "box", "memory_mb": 4096, "vcpus": 1.0, "usd_per_hour": 0.05}


def menu(*more: dict[str, Any]) -> dict[str, Any]:
    return {"menu": [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(768, 4097, 512)] + list(more)}


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return synthetic_profile(tmp_path / "profile", **SHAPE)


# Traffic


def test_above_the_break_even_traffic_an_instance_is_cheaper(profile: Profile) -> None:
    catalog = tiny_catalog(menu(BOX), idle_ttl_s=1e9)
    plan = plan_of(profile, catalog, examine=True)
    assert plan.break_even_traffic is not None and plan.break_even_traffic.instance == "box"
    for factor, rented in ((0.8, False), (1.25, True)):
        traffic = one_length(40, 15, plan.break_even_traffic.requests_per_hour * factor)
        found = plan_of(profile, catalog, traffic=traffic)
        assert (found.main.name == "box") == rented
        assert verify(found, profile, catalog) == ()


def test_more_traffic_than_one_instance_has_time_for_buys_more(profile: Profile) -> None:
    catalog = tiny_catalog({"menu": [BOX]})
    one = plan_of(profile, catalog, traffic=one_length(40, 15, 10.0))
    request_s = one.ttft_s + 15 * one.tpot_s
    many = plan_of(profile, catalog, traffic=one_length(40, 15, 2.5 * 3600 / request_s))
    assert (one.instances, many.instances) == (1, 3)
    assert one.cost_usd_per_request == pytest.approx(0.05 / 10)
    assert verify(many, profile, catalog) == ()


def test_rare_requests_are_cold_and_pay_for_it(profile: Profile) -> None:
    catalog = tiny_catalog(menu())
    rare, busy = (plan_of(profile, catalog, traffic=one_length(40, 15, per_hour)) for per_hour in (0.01, 1e6))
    assert rare.workload.cold_share > 0.99 and busy.workload.cold_share < 1e-9
    assert rare.ttft_s > busy.ttft_s + catalog.main.cold_start_s and rare.cost_usd_per_request > busy.cost_usd_per_request
    assert Traffic(busy.workload.lengths, None, (1.0, 400.0, 1.0, 1.0)).cold_share(300) == 0.25


def test_a_measured_start_has_read_its_experts_already(profile: Profile) -> None:
    """So the time of reading is that of the plan's function, and is not counted twice."""
    problem = make_problem(profile, tiny_catalog(menu()), PlanRequest())
    start = ColdStart(starts=3, process_s=0.1, imports_s=0.2, weights_s=0.4, first_result_s=0.1, total_s=1.0)
    measured = replace(problem, latency=problem.latency.model_copy(update={"cold_start": start}))
    four, none = cold_s(measured, [4, 0])
    assert none == pytest.approx(0.6)
    assert four - none == pytest.approx(4 * problem.spec.fetched_expert_bytes / problem.catalog.function.load_bytes_per_s)


# Robustness


def test_at_break_even_both_cost_the_same(profile: Profile) -> None:
    catalog = tiny_catalog(menu())
    plan = plan_of(profile, catalog, examine=True)
    at = {found.parameter: found.at for found in plan.break_evens}
    problem = make_problem(profile, catalog, PlanRequest())
    placement, local_usd = Placement(plan.main, plan.layers), plan.baselines["all-local"].cost_usd_per_request
    assert at["call-overhead"] is not None and at["call-overhead"] > 1
    assert evaluate(slower_calls(problem, at["call-overhead"]), placement).cost_usd_per_request == pytest.approx(local_usd, rel=0.01)
    if (share := at["even-routing"]) is not None:
        assert evaluate(flatter(problem, share), placement).cost_usd_per_request == pytest.approx(local_usd, rel=0.01)
    under = {(scenario.kind, scenario.value): scenario for scenario in plan.scenarios}
    faster, slower = under["call-overhead", 0.5], under["call-overhead", 2.0]
    assert faster.cost_usd_per_request < plan.cost_usd_per_request < slower.cost_usd_per_request
    assert under["even-routing", 0.5].cost_usd_per_request > plan.cost_usd_per_request
    held_out = under["held-out-prompts", None]
    assert (held_out.planned_prompts, held_out.judged_prompts) == (10, 10)
    assert held_out.best_usd is not None and held_out.best_usd <= held_out.cost_usd_per_request * (1 + 1e-9)


def test_one_prompt_has_no_other_half(tmp_path: Path) -> None:
    plan = plan_of(synthetic_profile(tmp_path, prompts=1, decode_tokens=250), tiny_catalog(), examine=True)
    assert not any(scenario.kind == "held-out-prompts" for scenario in plan.scenarios)


def test_a_cheaper_gpu_is_not_hidden(profile: Profile) -> None:
    catalog = tiny_catalog(menu())
    gpu = catalog.reference.gpus[0].model_copy(update={"usd_per_hour": 1e-6})
    dear = catalog.model_copy(update={"reference": catalog.reference.model_copy(update={"gpus": (gpu,)})})
    plan = plan_of(profile, dear, requests_per_hour=20.0)
    assert plan.verdict == "not-recommended"
    assert plan.basis == "dearer-than-whole-model" and plan.baselines["gpu"].spec == "g4dn.xlarge"
    assert plan.baselines["fetch"].ideal


def test_frontier_points_trade_cost_for_speed(profile: Profile) -> None:
    points = frontier(profile, tiny_catalog(menu()), PlanRequest(), lambda done, total: None)
    assert len(points) > 1
    assert [p.tpot_s for p in points] == sorted(p.tpot_s for p in points)
    assert [p.cost_usd for p in points] == sorted((p.cost_usd for p in points), reverse=True)
    assert all(p.bound_usd <= p.cost_usd * (1 + 1e-9) for p in points)


# Properties


def cheaper(catalog: Catalog, how: str) -> Catalog:
    """The catalog with more to choose from, or lower prices."""
    function, main = catalog.function, catalog.main
    changes: dict[str, dict[str, Any]] = {
        "function menu": {"function": function.model_copy(update={"memory_menu_mb": (128, 200, 256, 400, 512, 700)})},
        "main menu": {"main": main.model_copy(update={"menu": tuple(read_catalog("local").main.menu[i] for i in (0, 3, 6)) + main.menu})},
        "replicas": {"function": function.model_copy(update={"max_replicas": 3})},
        "fee": {"function": function.model_copy(update={"usd_per_request": function.usd_per_request / 2})},
        "storage": {"function": function.model_copy(update={"usd_per_storage_gb_second": 0.0})},
        "price": {"function": function.model_copy(update={"usd_per_gb_second": {"x86_64": 1e-5}})},
        "main price": {"main": main.model_copy(update={"usd_per_gb_second": {"x86_64": 1e-5}})},
    }
    return catalog.model_copy(update=changes[how])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    how=st.sampled_from(["function menu", "replicas", "fee", "storage", "price", "main price", "target"]),
    cold_share=st.sampled_from([0.0, 0.4]),
    invocations=st.sampled_from(["per-layer", "per-expert"]),
)
def test_the_least_cost_never_rises_with_more_to_choose_from(
    seed: int, how: str, cold_share: float, invocations: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    profile = synthetic_profile(tmp_path_factory.mktemp("p"), **(SHAPE | {"layers": 2, "seed": seed}))
    storage = {"usd_per_storage_gb_second": 1e-5, "storage_free_mb": 30.0, "storage_spare_mb": 4.0}
    catalog, options = tiny_catalog(menu(), **storage), {"cold_share": cold_share, "invocations": invocations}
    free = plan_of(profile, catalog, **options)
    tight = plan_of(profile, catalog, tpot_s=free.tpot_s, ttft_s=free.ttft_s, **options)
    looser = (
        plan_of(profile, catalog, tpot_s=free.tpot_s * 1.2, **options)
        if how == "target"
        else plan_of(profile, cheaper(catalog, how), **options)
    )
    before = tight if how == "target" else free
    assert looser.cost_usd_per_request <= before.cost_usd_per_request * (1 + 1.1e-3)
    for plan, used in ((free, catalog), (tight, catalog)):
        assert plan.lower_bound_usd is not None and plan.lower_bound_usd <= plan.cost_usd_per_request
        assert verify(plan, profile, used) == ()
    scanned = plan_of(profile, catalog, solver="scan", **options)
    assert verify(scanned, profile, catalog) == ()
    assert scanned.cost_usd_per_request >= (free.lower_bound_usd or 0.0) * (1 - 1e-9)


def test_described_hardware_kinds_of_requests_and_divided_layers_are_verified(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, layers=2, experts=12, expert_mb=150, nonexpert_mb=600, top_k=3)
    catalog = read_catalog("aws-us-east-1")
    small = replace(
        profile, record=profile.record.model_copy(update={"latency": profile.record.latency.model_copy(update={"source": "described"})})
    )
    kinds = Traffic(plan_of(profile, tiny_catalog()).workload.lengths[:1], 30.0)
    for options in ({"traffic": kinds}, {"remote_share": 1.0}, {"solver": "paper"}, {"objective": "tpot", "budget_usd": 1.0}):
        plan: Plan = plan_of(small, catalog, **options)
        assert verify(plan, small, catalog) == ()
    assert plan_of(small, catalog, remote_share=1.0).layers[0].remote == tuple(range(12))
