"""Drift of routing: found where the workload has shifted, and not found where it has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.cli.kept import command_again, verdict
from remoe_cli.errors import ArtifactError, DeployError
from remoe_cli.plan.document import Plan, PredictedRouting
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.observed import Observed
from remoe_cli.usage.again import Again, again
from remoe_cli.usage.drift import LEAST_REQUESTS, Routing, drift, served_routing
from remoe_cli.usage.served import tilted, with_routing
from tests.support.synthetic import plan_of, problem_of, synthetic_profile, tiny_catalog

SHAPE: dict[str, Any] = {"layers": 3, "experts": 8, "prompts": 90}


def split(whole: Profile, first: int) -> tuple[Profile, Routing]:
    """A profile of the first prompts, and the rest as served requests."""
    arrays = dict(whole.arrays)
    served = Routing(*(arrays[f"{phase}_counts"][first:].astype(np.int64) for phase in ("prefill", "decode")))
    kept = arrays["trace_prompt"] < first
    for name in ("trace_ids", "trace_prompt"):
        arrays[name] = arrays[name][kept]
    for name in ("prefill_counts", "decode_counts", "prompt_tokens", "decode_tokens", "prompt_vectors"):
        arrays[name] = arrays[name][:first]
    return replace(whole, arrays=arrays), served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.mark.parametrize("seed", range(2))
def test_the_same_workload_has_not_drifted(folder: Path, seed: int) -> None:
    profile, served = split(synthetic_profile(folder / f"same-{seed}", seed=seed, **SHAPE), 60)
    found = drift(profile, served)
    assert not found.whole.is_drift and 0.2 * found.whole.floor < found.whole.bits < found.whole.floor_p99
    assert found.requests == 30 and (found.prefill_tokens, found.decode_tokens) == (40, 15)


@pytest.mark.parametrize("seed", range(2))
def test_a_shifted_workload_has(folder: Path, seed: int) -> None:
    """A third of the requests use experts as another workload does."""
    profile, served = split(synthetic_profile(folder / f"a-{seed}", seed=seed, **SHAPE), 60)
    _, other = split(synthetic_profile(folder / f"b-{seed}", seed=100 + seed, **SHAPE), 60)
    mixed = Routing(*(np.concatenate([one[:20], two[:10]]) for one, two in zip(served.phases, other.phases, strict=True)))
    found = drift(profile, mixed)
    assert found.whole.is_drift and found.whole.low > found.whole.floor and len(found.drifted) >= 2
    assert found.whole.low < found.whole.bits < found.whole.high


def test_one_layer_alone_is_named(folder: Path) -> None:
    profile, served = split(synthetic_profile(folder / "one", **SHAPE), 60)
    for phase in served.phases:
        phase[:, 1] = phase[:, 1, ::-1]
    found = drift(profile, served)
    assert found.drifted == (2,) and found.layers[1].bits > 5 * found.layers[0].bits


def test_another_mix_of_long_prompts_and_long_answers_is_no_drift(folder: Path) -> None:
    """Prompts and answers use experts in other ways here, and what is served has longer answers."""
    profile, served = split(synthetic_profile(folder / "mix", **SHAPE), 60)
    for counts in (profile.arrays["decode_counts"], served.decode):
        counts[:] = counts[:, :, ::-1].copy()
    longer = Routing(served.prefill, served.decode * 8)
    assert not drift(profile, longer).whole.is_drift


def test_the_divergence_is_that_of_the_sums(folder: Path) -> None:
    """Two layers by hand: equal, and with no expert in common; answers of one token have no decode."""
    profile, _ = split(synthetic_profile(folder / "hand", layers=2, experts=4, prompts=20), 10)
    prefill, decode = (np.zeros((10, 2, 4), dtype=np.int64) for _ in range(2))
    recorded = profile.arrays["prefill_counts"]
    recorded[:, 1] = [40, 40, 0, 0]
    prefill[:, 0], prefill[:, 1] = recorded[:, 0], [0, 0, 40, 40]
    found = drift(profile, Routing(prefill, decode))
    assert [each.bits for each in found.layers] == [pytest.approx(0.0, abs=1e-12), pytest.approx(1.0)]
    assert found.whole.bits == pytest.approx(0.5) and found.decode_tokens == 0


def observed(profile: Profile, hits: Routing, **update: Any) -> list[Observed]:
    revision = profile.record.model.revision
    each = zip(*(phase.tolist() for phase in hits.phases), strict=True)
    return [Observed(revision=revision, prefill=prefill, decode=decode).model_copy(update=update) for prefill, decode in each]


def test_observations_are_stacked_and_others_refused(folder: Path) -> None:
    profile, served = split(synthetic_profile(folder / "stacked", **SHAPE), 60)
    lines = observed(profile, served)
    stacked = served_routing("m", profile, [*lines, Observed(revision="of a request without routing")])
    assert np.array_equal(stacked.prefill, served.prefill) and np.array_equal(stacked.decode, served.decode)
    with pytest.raises(DeployError, match=f"routing of {LEAST_REQUESTS - 1} served requests of 'm' is kept"):
        served_routing("m", profile, lines[: LEAST_REQUESTS - 1])
    with pytest.raises(ArtifactError, match="another model"):
        served_routing("m", profile, observed(profile, served, revision="local:1"))
    for prefill in (((1, 2),), ((1, 2), (3,))):
        with pytest.raises(ArtifactError, match="other layers or experts"):
            served_routing("m", profile, observed(profile, served, prefill=prefill))


def test_traced_tokens_are_weighed_as_served_ones_use_experts(folder: Path) -> None:
    profile, _ = split(synthetic_profile(folder / "tilt", **SHAPE), 60)
    _, other = split(synthetic_profile(folder / "tilt-other", seed=7, **SHAPE), 60)
    problem = problem_of(profile, tiny_catalog())
    made = with_routing(problem, *(phase.sum(axis=0) for phase in other.phases)).workload
    decode = other.decode.sum(axis=0)
    assert made.decode_hits == pytest.approx(decode / decode.sum(axis=1, keepdims=True) * 2, abs=0.03)
    prefill = other.prefill.sum(axis=0)
    assert made.use == pytest.approx(prefill / prefill.sum(axis=1, keepdims=True) * 2)
    # Of its own routing nothing changes, and sets of experts stay what they were.
    own = with_routing(problem, *(profile.arrays[f"{phase}_counts"].sum(axis=0) for phase in ("prefill", "decode"))).workload
    for (sets, counts), (same, weights) in zip(problem.workload.patterns, own.patterns, strict=True):
        assert np.array_equal(sets, same) and weights == pytest.approx(counts, rel=0.05)


def test_an_expert_that_no_traced_token_used_gets_its_share() -> None:
    sets, weights = tilted((np.array([[0, 1], [0, 2], [1, -1]]), np.array([5, 5, 5])), np.array([0.4, 0.2, 0.2, 0.2]))
    used = np.zeros(4)
    for row, weight in zip(sets, weights, strict=True):
        used[row[row >= 0]] += weight
    assert used / used.sum() == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.02)


def planned(folder: Path) -> tuple[Plan, Profile, Any]:
    profile, _ = split(synthetic_profile(folder, skew=1.6, expert_mb=60, **SHAPE), 60)
    catalog = tiny_catalog()
    return plan_of(profile, catalog, remote_share=0.5), profile, catalog


def compared(plan: Plan, problem: Problem) -> Again:
    return again(plan, problem, problem)


def test_planning_again_pays_where_the_popular_experts_are_remote_now(folder: Path) -> None:
    plan, profile, catalog = planned(folder / "again")
    problem = problem_of(profile, catalog)
    hot = np.ones((3, 8), dtype=np.int64)
    for row, layer in zip(hot, plan.layers, strict=True):
        row[list(layer.remote)] = 1000
    now = compared(plan, with_routing(problem, hot, hot))
    assert now.planned == plan.outcome and now.deployed.cost_usd_per_request > 1.2 * now.planned.cost_usd_per_request
    assert (
        now.worth
        and now.saved > 0.01
        and now.best.cost_usd_per_request == pytest.approx(now.deployed.cost_usd_per_request * (1 - now.saved))
    )
    assert now.moved > 0 and now.saved_usd_per_month is None


def test_the_best_plan_is_not_made_again(folder: Path) -> None:
    _, profile, catalog = planned(folder / "best")
    plan = plan_of(profile, catalog, requests_per_hour=30.0)
    now = compared(plan, problem_of(profile, catalog, requests_per_hour=30.0))
    assert (
        not now.worth
        and now.meets
        and now.saved == pytest.approx(0.0, abs=1e-6)
        and now.saved_usd_per_month == pytest.approx(0.0, abs=1e-6)
    )


def test_the_command_plans_again_as_it_was_asked(folder: Path) -> None:
    profile, catalog = synthetic_profile(folder / "asked", **SHAPE), tiny_catalog()
    one = {"path": "my prompts.jsonl", "sha256": "0" * 64}
    more = {"count": 2, "predictor": "p", "validation_bits": None, "mixture_bits": 0.0, "recorded": (0, 1), "weights": (1, 1)}
    routing = PredictedRouting.model_validate({"prompts": one, **more})
    options: dict[str, tuple[dict[str, Any], str]] = {
        "cold": ({"cold_share": 0.2}, " --cold-share 0.2"),
        "traffic": ({"requests_per_hour": 30.0}, " --requests-per-hour 30"),
        "cold traffic": ({"requests_per_hour": 30.0, "cold_share": 0.0}, " --requests-per-hour 30 --cold-share 0"),
        "prompts": ({"routing": routing}, " --data 'my prompts.jsonl'"),
        "solver": ({"solver": "scan", "invocations": "per-expert"}, " --solver scan --invocation per-expert"),
    }
    for asked, said in options.values():
        command = command_again(plan_of(profile, catalog, **asked), catalog, "p")
        assert command.removeprefix("remoe plan p -o plans/NAME.json") == said


def test_a_target_that_is_missed_now_is_a_reason_to_plan_again(folder: Path) -> None:
    plan, profile, catalog = planned(folder / "target")
    between_s = (plan.tpot_s + plan_of(profile, catalog, objective="tpot").tpot_s) / 2
    tight = plan.model_copy(update={"method": "exact", "targets": plan.targets.model_copy(update={"tpot_s": between_s})})
    now = compared(tight, problem_of(profile, catalog))
    assert not now.meets and now.worth and now.moved > 0 and now.best.tpot_s <= between_s * (1 + 1e-9) < now.deployed.tpot_s


def test_a_forced_plan_is_compared_with_plans_that_force_the_same(folder: Path) -> None:
    """Calibrating says nothing of what the user's own option costs: that would be no reason to plan again."""
    plan, profile, catalog = planned(folder / "forced")
    free = compared(plan.model_copy(update={"method": "exact"}), problem_of(profile, catalog))
    assert free.worth and verdict(free, "").startswith("Plan again: the best plan saves ")
    forced = compared(plan, problem_of(profile, catalog))
    assert not forced.worth and forced.forced == "--remote-share 0.5"
    assert verdict(forced, "") == "The plan need not be made again: the best plan with --remote-share 0.5 saves 0.0% of the cost."
    assert command_again(plan, catalog, "p q") == "remoe plan 'p q' -o plans/NAME.json --remote-share 0.5"
    given = compared(plan.model_copy(update={"method": "given"}), problem_of(profile, catalog))
    assert given.best == given.deployed and "no other one was looked for" in verdict(given, "")
