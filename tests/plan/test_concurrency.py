"""Plans for several requests at once: against brute force, against simulated traffic, and against the verifier."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.artifacts import json_text
from remoe_cli.errors import InfeasibleError, OverBudgetError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Plan, ScenarioKind
from remoe_cli.plan.explain.why import money_rows
from remoe_cli.plan.problem import batches
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.verify import steps
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.expected_cost import cost_model
from tests.plan.test_exact import held_against, instance
from tests.plan.test_predicted import mixed
from tests.support.brute_force import Brute
from tests.support.synthetic import plan_of, problem_of, synthetic_profile, tiny_catalog

RENTED = {"name": "box", "memory_mb": 2600, "vcpus": 2.0, "usd_per_hour": 0.2}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), experts=6, expert_mb=150, skew=1.5)


def catalog(**main: Any) -> Catalog:
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": 1.0} for mb in (900, 1200, 1800, 3000)]
    return tiny_catalog({"menu": [*menu, RENTED]} | main, warm_unbilled_s=1e-3, warm_billed_s=1e-3)


# Of skipped slots, a live target, CPU quotas, instances, experts on GPUs, kinds of requests and divided layers.
@pytest.mark.parametrize(("seed", "requests"), [(0, 2), (16, 3), (20, 2), (28, 2), (2, 3), (44, 5)])
def test_exact_is_brute_force(seed: int, requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "DRAWN", 40)
    monkeypatch.setattr(batches, "LEAST_STEPS", 8)
    alone, problem = instance(seed, tmp_path)
    assert problem.workload.cold_share == 0 and problem.invocations == "per-layer"
    problem = replace(problem, concurrency=requests)
    brute = Brute(alone.profile, alone.catalog, alone.kinds, alone.per_hour, concurrency=requests, drawn=(40, 8))
    held_against(brute, problem)


@pytest.mark.parametrize("requests", [2, 8, 40])
def test_drawn_steps_are_those_of_recorded_traffic(profile: Profile, requests: int) -> None:
    """Tokens of strangers, drawn at random from different prompts of the profile, use as many experts and call as often."""
    workload, random = from_profile(profile), np.random.default_rng(7)
    trace, prompts = profile.arrays["trace_ids"], len(profile.arrays["prompt_tokens"])
    at = np.arange(len(trace)).reshape(prompts, -1)  # the tokens of each prompt
    experts = workload.use.shape[1]
    for layer in range(trace.shape[1]):
        rows = workload.step_rows(layer, requests)
        assert rows.sum() == rows.shape[1] * requests * trace.shape[2]
        assert np.abs(rows.mean(axis=1) / requests - workload.decode_hits[layer]).max() < 1 / rows.shape[1]
        rare = workload.ranks[layer] < 2
        hit = np.zeros((4000, experts), dtype=bool)
        for _ in range(requests):
            tokens = at[random.integers(prompts, size=len(hit)), random.integers(at.shape[1], size=len(hit))]
            for slot in trace[tokens, layer].T:
                hit[np.arange(len(hit)), slot] = True
        assert (rows > 0).sum(axis=0).mean() == pytest.approx(hit.sum(axis=1).mean(), rel=0.02)
        assert (rows[rare] > 0).any(axis=0).mean() == pytest.approx(hit[:, rare].any(axis=1).mean(), abs=0.05)


@pytest.mark.parametrize("options", [{}, {"requests_per_hour": 4000.0}, {"remote_share": 0.5}, {"objective": "tpot", "cold_share": 0.3}])
def test_the_verifier_agrees(profile: Profile, options: dict[str, Any]) -> None:
    plan = plan_of(profile, catalog(), examine=True, concurrency=6, **options)
    assert plan.concurrency == plan.workload.concurrency == 6
    assert verify(plan, profile, catalog()) == ()
    for update, field in (
        ({"concurrency": 5}, "concurrency"),
        ({"tpot_s": plan.tpot_s * (1 - 1e-7)}, "tpot_s"),
        ({"ttft_s": plan.ttft_s * (1 + 1e-7)}, "ttft_s"),
        ({"workload": plan.workload.model_copy(update={"concurrency": 7})}, "cost_usd_per_request"),
    ):
        assert field in {finding.field for finding in verify(plan.model_copy(update=update), profile, catalog())}, field


def forced(profile: Profile, requests: int, **options: Any) -> Plan:
    return plan_of(profile, catalog(), concurrency=requests, remote_share=0.5, **options)


def test_requests_share_time_and_calls(profile: Profile) -> None:
    plans = [forced(profile, requests) for requests in (1, 2, 4, 8, 16)]
    calls = [sum(plan.costs.layers_usd) for plan in plans]
    for fewer, more in itertools.pairwise(plans):
        assert more.cost_usd_per_request < fewer.cost_usd_per_request and more.tpot_s > fewer.tpot_s and more.ttft_s > fewer.ttft_s
    assert calls == sorted(calls, reverse=True) and calls[-1] < 0.5 * calls[0]


def test_one_request_at_a_time_leaves_no_trace(profile: Profile) -> None:
    assert "concurrency" not in json_text(forced(profile, 1, examine=True)) and "alone_per_hour" not in json_text(forced(profile, 1))
    assert '"concurrency": 4' in json_text(forced(profile, 4))


def test_each_request_has_its_own_kv_cache(profile: Profile) -> None:
    from remoe_cli.plan.cost import main_function

    one, four = (problem_of(profile, catalog(), concurrency=requests) for requests in (1, 4))
    rest = main_function.base_bytes(one) - one.spec.nonexpert_bytes
    assert main_function.base_bytes(four) == four.spec.nonexpert_bytes + 4 * rest


def test_a_platform_of_one_request_at_a_time_is_planned_so(profile: Profile) -> None:
    """What starts another instance for each request shares nothing: its plan is that of one; a rented instance still serves several."""
    limited = catalog(serverless_concurrency=1)
    alone, several = (plan_of(profile, limited, concurrency=requests) for requests in (1, 8))
    assert (several.concurrency, several.workload.concurrency) == (1, 8)
    assert (several.cost_usd_per_request, several.tpot_s, several.layers) == (alone.cost_usd_per_request, alone.tpot_s, alone.layers)
    assert any("serves 1 request at a time" in note for note in several.notes)
    busy = plan_of(profile, limited, concurrency=8, requests_per_hour=40_000.0)
    assert busy.main.name == "box" and busy.concurrency == 8
    assert busy.instances < plan_of(profile, limited, requests_per_hour=40_000.0).instances
    for plan in (several, busy):
        assert verify(plan, profile, limited) == ()


def test_the_verdict_says_how_the_break_even_moves(profile: Profile) -> None:
    one, eight = (plan_of(profile, catalog(), concurrency=requests) for requests in (1, 8))
    assert one.break_even_traffic and eight.break_even_traffic
    assert eight.break_even_traffic.requests_per_hour > one.break_even_traffic.requests_per_hour
    assert eight.break_even_traffic.alone_per_hour == pytest.approx(one.break_even_traffic.requests_per_hour, rel=0.5)
    assert "Where requests are served one at a time, that is at" in eight.reason and "one at a time" not in one.reason


def test_a_receipt_is_predicted_at_the_plans_concurrency(profile: Profile) -> None:
    plan = forced(profile, 4)
    predicted = cost_model(plan, profile, catalog())(round(plan.workload.n_in), round(plan.workload.n_out))
    assert predicted.cost_usd_per_request == pytest.approx(plan.cost_usd_per_request)
    assert (predicted.ttft_s, predicted.tpot_s) == pytest.approx((plan.ttft_s, plan.tpot_s))


def test_few_requests_are_not_many_at_once(profile: Profile) -> None:
    plan = plan_of(profile, catalog(), concurrency=8, requests_per_hour=30.0, cold_share=0.0)
    assert any("at once in the mean, not 8" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("option", "named"), [({"solver": "paper"}, "--solver paper"), ({"invocations": "per-expert"}, "--invocation per-expert")]
)
def test_the_papers_options_serve_one_request_at_a_time(profile: Profile, option: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"{named} is the paper's, which serves one request at a time"):
        plan_of(profile, catalog(), concurrency=2, **option)


def test_both_programs_draw_the_same_steps() -> None:
    assert (steps.DRAWN, steps.FEWEST) == (batches.DRAWN, batches.LEAST_STEPS)


@pytest.mark.parametrize("asked", [{"tpot_s": 1e-7}, {"budget_usd": 1e-12}, {"tpot_s": 1e-7, "remote_share": 0.5}], ids=str)
def test_what_is_impossible_is_said_also_where_main_functions_differ(profile: Profile, asked: dict[str, Any]) -> None:
    """Those that are paid by use serve one request at a time, and the rented one four: each part of the menu is searched."""
    with pytest.raises((InfeasibleError, OverBudgetError)):
        plan_of(profile, catalog(serverless_concurrency=1), concurrency=4, requests_per_hour=1000.0, **asked)


@pytest.mark.parametrize("per_hour", [1.0, 40_000.0])
def test_the_least_that_does_is_that_of_all_main_functions(profile: Profile, per_hour: float) -> None:
    """Where few requests come the rented one is dear, and where many come the others are: either part may be the cheaper one."""
    options: dict[str, Any] = {"concurrency": 4, "requests_per_hour": per_hour}
    menu = catalog(serverless_concurrency=1)
    cheapest = plan_of(profile, menu, **options)
    assert (cheapest.main.name == "box") == (per_hour > 1)
    with pytest.raises(OverBudgetError) as raised:
        plan_of(profile, menu, budget_usd=cheapest.cost_usd_per_request / 2, **options)
    assert f"costs {cheapest.cost_usd_per_request:.4g}"[:-1] in raised.value.message


def test_the_verifier_agrees_where_routing_is_predicted(profile: Profile) -> None:
    """Also with the routing of the whole profile, whose steps are others."""
    plan = plan_of(profile, catalog(), concurrency=4, remote_share=0.5, routing=mixed((0, 1), (3, 1)), examine=True)
    assert any(scenario.kind == ScenarioKind.PROFILE_ROUTING for scenario in plan.scenarios)
    assert verify(plan, profile, catalog()) == ()


@pytest.mark.parametrize("requests", [1, 4])
def test_the_rows_of_money_add_up(profile: Profile, requests: int) -> None:
    """Cold starts too, which requests do not share."""
    options = {"concurrency": requests, "remote_share": 0.5, "requests_per_hour": 2.0}
    problem, plan = problem_of(profile, catalog(), concurrency=requests, requests_per_hour=2.0), plan_of(profile, catalog(), **options)
    assert plan.workload.cold_share > 0.5
    rows = [
        float(text.removeprefix("$").split()[0].replace(",", "")) for name, text in money_rows(problem, plan) if not name.startswith(" ")
    ]
    assert sum(rows) == pytest.approx(plan.cost_usd_per_request * 1e6, rel=0.01)


def test_a_family_whose_cache_cannot_be_shared_is_planned_for_one_request_at_a_time(profile: Profile) -> None:
    record = profile.record.model_copy(update={"spec": profile.record.spec.model_copy(update={"family": "minimax"})})
    with pytest.raises(UsageError, match="A model of family 'minimax' answers one request at a time"):
        plan_of(replace(profile, record=record), catalog(), concurrency=2)
