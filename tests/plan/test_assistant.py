"""Plans with an assistant that drafts: its time, its memory, the choice of it, and the verifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.artifacts import json_text
from remoe_cli.errors import ArtifactError
from remoe_cli.model.spec import AssistantSpec, KvLayer
from remoe_cli.plan.assess.baselines import baselines
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import BaselineName, Plan
from remoe_cli.plan.explain.rows import summary_rows
from remoe_cli.plan.explain.why import explanation
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.drafting import Assisted, depth_of, drafting_of
from remoe_cli.plan.problem.problem import MB, Main, Placement
from remoe_cli.plan.problem.request import problem_of, request_of
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.acceptance import MEASURED
from remoe_cli.profile.hardware import read_hardware
from remoe_cli.profile.latency_record import AssistantTimes, Linear
from remoe_cli.profile.merge import join
from remoe_cli.profile.mix import mix
from remoe_cli.profile.record import AssistantRef, Profile, read_profile, write_profile
from remoe_cli.report.terms import table_of
from remoe_cli.runtime.expected_cost import cost_model
from remoe_cli.simulate.service import of_placement
from tests.plan.test_drafts import catalog, with_answers
from tests.plan.test_predicted import mixed
from tests.support.synthetic import plan_of, synthetic_profile

SIZES = AssistantSpec(dtype="bfloat16", bytes=60 * MB, hidden_layers=4, kv_layers=(KvLayer(bytes_per_token=4096),) * 4)
TIMES = AssistantTimes(prefill=Linear(fixed_s=1e-3, per_token_s=2e-5), decode_s=1e-3)


def with_assistant(profile: Profile, accepted: float, path: Path, times: AssistantTimes = TIMES) -> Profile:
    """The profile, of which an assistant drafts whatever is not found; it reads one token for a draft besides."""
    guessed = with_answers(profile, accepted, path / "guessed").arrays["draft_passes"]
    drafted = guessed @ np.arange(guessed.shape[2])
    work = np.stack([drafted // 2, guessed.sum(axis=2) // 3], axis=2).astype(np.int32)
    record = profile.record.model_copy(
        update={
            "assistant": AssistantRef(path="small", revision="local:1", spec=SIZES),
            "latency": profile.record.latency.model_copy(update={"assistant": times}),
        }
    )
    return write_profile(path / "helped", record, profile.arrays | {"assisted_passes": guessed, "assistant_tokens": work})


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Little is found in the text, and the assistant guesses much."""
    path = tmp_path_factory.mktemp("profile")
    plain = synthetic_profile(path / "plain", experts=6, expert_mb=150, skew=1.5)
    return with_assistant(with_answers(plain, 0.1, path / "answers"), 0.9, path)


def forced(profile: Profile, speculate: Any, **options: Any) -> Plan:
    return plan_of(profile, catalog(), remote_share=0.5, speculate=speculate, **options)


@pytest.mark.parametrize("requests", [1, 3])
def test_it_takes_its_time_and_its_memory_and_no_more(profile: Profile, requests: int) -> None:
    plan = forced(profile, 4, concurrency=requests)
    assert plan.assistant is not None and plan.assistant.bytes == SIZES.bytes and depth_of(plan) == Assisted(4)
    problem, n_in = problem_of(plan, profile, catalog()).at_main(plan.main), plan.workload.n_in
    drafting = problem.drafting
    free = replace(problem, latency=problem.latency.model_copy(update={"assistant": None}))
    placement = Placement(plan.main, plan.layers, plan.instances)
    found, without = evaluate(problem, placement), evaluate(free, placement)
    slower = main_function.nonexpert_factor(problem, plan.main)
    prompt_s = slower * (TIMES.prefill.fixed_s + n_in * TIMES.prefill.per_token_s)
    step_s = requests * slower * (drafting.drafted * TIMES.decode_s + drafting.caught_up * TIMES.prefill.per_token_s)
    others_s = (requests - 1) * prompt_s / plan.workload.n_out
    assert drafting.drafted > 0.5 and drafting.caught_up > 0.2
    assert found.tpot_s - without.tpot_s == pytest.approx(drafting.passes * step_s + others_s)
    assert found.ttft_s - without.ttft_s == pytest.approx(prompt_s + (step_s if requests > 1 else 0.0))
    alone = problem.with_drafts("off")
    tokens = problem.workload.most_tokens.tokens
    more = main_function.main_memory_bytes(problem, plan.main, 3) - main_function.main_memory_bytes(alone, plan.main, 3)
    assert more == SIZES.bytes + requests * 4 * 4096 * tokens
    read_s = main_function.start_s(problem, plan.main, 3) - main_function.start_s(alone, plan.main, 3)
    assert read_s == pytest.approx(SIZES.bytes / main_function.load_bytes_per_s(problem, plan.main))


def test_a_profile_tells_what_it_does_for_a_pass(profile: Profile) -> None:
    found, row = drafting_of(profile)[Assisted(4)], MEASURED.index(4)
    passes, work = profile.arrays["assisted_passes"][:, row], profile.arrays["assistant_tokens"][:, row]
    assert found.passes == pytest.approx(passes.sum() / profile.arrays["decode_tokens"].sum())
    assert (found.drafted, found.caught_up) == pytest.approx(tuple(work.sum(axis=0) / passes.sum()))
    assert drafting_of(profile)[4].drafted == 0 and found.passes < drafting_of(profile)[4].passes


@pytest.mark.parametrize(
    "options",
    [
        {"speculate": "auto", "solver": "scan"},
        {"speculate": 7, "objective": "tpot", "cold_share": 0.3, "ttft_s": 20.0, "ttft_percentile": 90.0},
        {"speculate": 4, "requests_per_hour": 4000.0, "concurrency": 3, "solver": "scan"},
        {"speculate": 4, "routing": mixed((1, 4, 7), (5, 2, 3)), "solver": "scan"},
    ],
)
def test_the_verifier_agrees(profile: Profile, options: dict[str, Any]) -> None:
    plan = plan_of(profile, catalog(), **({"examine": True} | options))
    assert plan.assistant is not None and verify(plan, profile, catalog()) == ()
    other = plan.assistant.model_copy(update={"bytes": 1})
    for update, field in (({"assistant": None}, "tpot_s"), ({"assistant": other}, "assistant"), ({"speculate": "off"}, "assistant")):
        assert field in {finding.field for finding in verify(plan.model_copy(update=update), profile, catalog())}, field


@pytest.mark.parametrize("options", [{"requests_per_hour": 40.0}, {"requests_per_hour": 3000.0, "concurrency": 4}])
def test_the_verifier_agrees_on_described_machines_with_gpus(profile: Profile, options: dict[str, Any]) -> None:
    prices = read_catalog("aws-us-east-1")
    plan = plan_of(profile, prices, speculate=6, objective="tpot", solver="scan", **options)
    assert plan.assistant is not None and verify(plan, profile, prices) == ()
    problem = problem_of(plan, profile, prices)
    requests = problem.concurrency  # of an instance that is rented
    deeper = replace(problem, assistant=SIZES.model_copy(update={"hidden_layers": SIZES.hidden_layers + 4}))
    one, other = (baselines(each, Aim()).priced[BaselineName.GPU] for each in (problem, deeper))
    gpu = next(spec for spec in prices.reference.gpus if spec.name == one.spec)
    more_s = 4 * read_hardware(gpu.hardware or prices.reference.hardware).main.layer_overhead_s
    step_s = requests * problem.drafting.drafted * more_s
    expected_s = problem.drafting.passes * step_s + (requests - 1) * more_s / plan.workload.n_out
    assert other.tpot_s - one.tpot_s == pytest.approx(expected_s)
    assert other.ttft_s - one.ttft_s == pytest.approx(more_s + (step_s if requests > 1 else 0.0))


def test_the_planner_takes_it_where_it_pays(profile: Profile, tmp_path: Path) -> None:
    plans = {speculate: plan_of(profile, catalog(), speculate=speculate, solver="scan") for speculate in ("off", 4, "auto")}
    assert plans["off"].assistant is None and "assistant" not in json_text(plans["off"])
    assert plans["auto"].cost_usd_per_request <= plans[4].cost_usd_per_request * (1 + 1e-3) < plans["off"].cost_usd_per_request
    assert "small drafts them (62.9 MB in the main function)" in dict(summary_rows(plans["auto"]))["drafts"]
    assert "The assistant takes 62.9 MB" in " ".join(plans["auto"].notes)
    slow = AssistantTimes(prefill=Linear(fixed_s=1.0, per_token_s=0.1), decode_s=1.0)
    for made in (with_assistant(profile, 0.9, tmp_path / "slow", slow), with_assistant(profile, 0.0, tmp_path / "wrong")):
        chosen = plan_of(made, catalog(), speculate=4)
        assert chosen.assistant is None and verify(chosen, made, catalog()) == ()


def test_what_is_predicted_and_shown_has_it_too(profile: Profile) -> None:
    plan = forced(profile, 4)
    predicted = cost_model(plan, profile, catalog())(round(plan.workload.n_in), round(plan.workload.n_out))
    assert predicted.tpot_s == pytest.approx(plan.tpot_s) and predicted.cost_usd_per_request == pytest.approx(plan.cost_usd_per_request)
    problem = problem_of(plan, profile, catalog())
    simulated = of_placement(problem, Placement(plan.main, plan.layers, plan.instances), "the plan", np.array([40.0]), plan.workload.n_out)
    assert simulated.step_s[1] == pytest.approx(plan.tpot_s)
    table_of(plan, problem, catalog())  # raises where the page's formulas give other figures
    assert explanation(plan, profile, catalog(), request_of(plan))["money"]
    assert main_function.prices_of(problem, Main(plan.main)).memory_mb == plan.main.memory_mb


def test_profiles_keep_it_and_refuse_what_does_not_fit(profile: Profile, tmp_path: Path) -> None:
    made = read_profile(mix({profile.path: 1.0, _copy(profile, tmp_path / "copy").path: 1.0}, tmp_path / "mixed").path)
    assert made.record.assistant == profile.record.assistant and len(made.arrays["assisted_passes"]) == 2 * len(
        profile.arrays["assisted_passes"]
    )
    parts = [
        {name: array[:1] for name, array in profile.arrays.items()} | {"prompt_index": np.array([at], dtype=np.int32)} for at in (1, 0)
    ]
    assert len(join([part | {"trace_prompt": np.zeros(1, dtype=np.int32)} for part in parts])["assistant_tokens"]) == 2
    without = {name: array for name, array in profile.arrays.items() if name != "assistant_tokens"}
    with pytest.raises(ArtifactError, match="assistant_tokens has shape None"):
        write_profile(tmp_path / "a", profile.record, without)
    with pytest.raises(ArtifactError, match="is not that of the assistant that it names"):
        write_profile(tmp_path / "b", profile.record.model_copy(update={"assistant": None}), profile.arrays)


def test_a_given_placement_has_it_where_it_fits(profile: Profile, tmp_path: Path) -> None:
    (given := tmp_path / "given.json").write_text(json_text(forced(profile, "off")))
    assistant = AssistantRef(path="small", revision="local:1", spec=SIZES.model_copy(update={"bytes": 20_000 * MB}))
    large = write_profile(tmp_path / "large", profile.record.model_copy(update={"assistant": assistant}), profile.arrays)
    plans = [plan_of(one, catalog(), placement_file=given, speculate=4) for one in (profile, large)]
    assert [plan.assistant is not None for plan in plans] == [True, False] and verify(plans[1], large, catalog()) == ()
    assert plan_of(large, catalog(), speculate=4, solver="scan").assistant is None


def _copy(profile: Profile, path: Path) -> Profile:
    return write_profile(path, profile.record, profile.arrays)
