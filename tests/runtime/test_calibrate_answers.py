"""Calibration by answers: the overhead of a call, and what it costs the main process beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import DeployError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import LayerPlan, Plan
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.profile.record import Profile, read_profile
from remoe_cli.runtime import calibrate
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.calibrate import with_answers
from remoe_cli.runtime.invoke import Invocation
from tests.support.synthetic import invocation, plan_of, problem_of, synthetic_profile, tiny_catalog


def planned(folder: Path) -> tuple[Profile, Catalog, Plan]:
    profile, catalog = synthetic_profile(folder, expert_mb=40), tiny_catalog()
    latency = profile.record.latency.model_copy(update={"invocation": invocation(1)})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    plan = plan_of(profile, catalog, remote_share=0.5)
    return profile, catalog, plan.model_copy(update={"main": plan.main.model_copy(update={"vcpus": None})})


def answer(profile: Profile, calls: Sequence[int], elapsed_s: float, beside_s: float, slower_s: float = 0.0) -> dict[str, Any]:
    """Tokens that each take `slower_s` more than the profile's, with so many calls, each of which saves its layer's experts and takes
    `beside_s` more."""
    latency, spec = profile.record.latency, profile.record.spec
    step_s = spec.top_k * float(latency.local_expert.seconds(1, latency.main_vcpus))
    own_s, call = latency.nonexpert_decode_s + len(spec.moe_layers) * step_s, [900, elapsed_s, elapsed_s - 0.006, elapsed_s - 0.009]
    return {"calls": [[slower_s + own_s + count * (elapsed_s - step_s + beside_s), [call] * count] for count in calls]}


@pytest.mark.parametrize(("beside_s", "counted_s"), [(0.004, 0.004), (0.0, 0.0), (-0.003, 0.0)])
def test_answers_give_the_overhead_of_a_call_and_what_it_costs_beside(tmp_path: Path, beside_s: float, counted_s: float) -> None:
    profile, catalog, plan = planned(tmp_path / "p")
    answers = [answer(profile, calls, 0.030, beside_s) for calls in ((2, 0, 1), (1, 1, 1), (3, 2))]
    made = with_answers(profile, tmp_path / "made", plan, catalog, answers)
    measured = read_profile(tmp_path / "made").record.latency.invocation
    assert measured is not None and measured == made.record.latency.invocation
    assert (measured.unbilled_s.mean, measured.billed_s.mean) == (pytest.approx(0.006 + counted_s), pytest.approx(0.003))
    assert measured.bytes_per_s == invocation(1).bytes_per_s
    problem = problem_of(profile, catalog), problem_of(made, catalog)
    local = Placement(plan.main, tuple(LayerPlan(layer=layer.layer, remote=(), memory_mb=0, replicas=0) for layer in plan.layers))
    assert evaluate(problem[0], local) == evaluate(problem[1], local)


def test_a_machine_that_is_slower_than_when_it_was_profiled_is_not_the_calls_fault(tmp_path: Path) -> None:
    """Nor is one answer in a busy moment, or a token; all tokens with as many calls would leave only the profile to compare with."""
    profile, catalog, plan = planned(tmp_path / "p")
    answers = [answer(profile, (1, 2, 0, 3, 1), 0.030, 0.004, slower_s=slower_s) for slower_s in (0.02, 0.03, 0.0, 0.2)]
    answers[0]["calls"][1][0] += 0.5
    made = with_answers(profile, tmp_path / "made", plan, catalog, answers)
    assert made.record.latency.invocation is not None
    assert made.record.latency.invocation.unbilled_s.mean == pytest.approx(0.010)
    alike = with_answers(profile, tmp_path / "alike", plan, catalog, [answer(profile, (2, 2), 0.030, 0.004, slower_s=0.02)] * 4)
    assert alike.record.latency.invocation is not None
    assert alike.record.latency.invocation.unbilled_s.mean == pytest.approx(0.010 + 0.02 / 2)


@pytest.mark.parametrize("tokens", [(), (0, 0)], ids=["one token", "no calls"])
def test_answers_without_a_call_for_a_further_token_tell_nothing(tmp_path: Path, tokens: tuple[int, ...]) -> None:
    profile, catalog, plan = planned(tmp_path / "p")
    with pytest.raises(DeployError, match="more than its first token"):
        with_answers(profile, tmp_path / "made", plan, catalog, [answer(profile, tokens, 0.03, 0.0)])


def test_answers_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    profile, catalog, plan = planned(tmp_path / "p")
    with pytest.raises(DeployError, match="another version of remoe"):
        with_answers(profile, tmp_path / "made", plan, catalog, [{"calls": [[900, 0.03, 0.02, 0.01]]}])


def test_a_single_call_of_a_long_answer_tells_no_cost_beside_it(tmp_path: Path) -> None:
    """It is not among the tokens that are compared."""
    profile, catalog, plan = planned(tmp_path / "p")
    counts = [int(token == 1) for token in range(3 * calibrate._TOKENS)]
    made = with_answers(profile, tmp_path / "made", plan, catalog, [answer(profile, counts, 0.030, 0.004)])
    assert made.record.latency.invocation is not None
    assert made.record.latency.invocation.unbilled_s.mean == pytest.approx(0.006)


def test_long_answers_are_compared_at_tokens_of_all_their_parts() -> None:
    assert [len(calibrate._some(range(n))) for n in (0, 1, 200, 201, 1000)] == [0, 1, 200, 101, 200]
    assert calibrate._some(range(1000))[-1] == 995


def test_the_tokens_that_tell_what_a_call_takes_are_further_ones_without_a_cold_start_or_a_retry() -> None:
    warm = Invocation("f", 100, 200, 0.03, 20.0, 20, 1, 128, None, 0, compute_s=0.01)
    cold, retried = replace(warm, init_ms=90.0), replace(warm, retries=1)
    times, invoked = (1.0, 1.1, 1.3, 1.4, 1.6), (2, 4, 5, 6, 6)
    made = Generated((1,), (2, 3, 4, 5, 6), "", "length", times, (warm, warm, warm, warm, cold, retried), invoked)
    assert made.further == ((pytest.approx(0.1), (warm.sample, warm.sample)), (pytest.approx(0.2), ()))
