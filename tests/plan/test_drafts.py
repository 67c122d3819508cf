"""Plans with draft tokens: against brute force, against recorded traffic, and against the verifier."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.artifacts import json_text
from remoe_cli.cli.kept import command_again
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import ArtifactError, UsageError
from remoe_cli.model.draft import Speculate
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Plan, ScenarioKind
from remoe_cli.plan.explain.rows import summary_rows
from remoe_cli.plan.explain.why import explanation
from remoe_cli.plan.problem import batches
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.drafting import Drafting, drafting_of
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import make_problem, problem_of, request_of
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.solve import columns
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.variants import StepTable
from remoe_cli.plan.verify import steps
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.acceptance import MEASURED, MOST_ROWS
from remoe_cli.profile.record import Profile, write_profile
from remoe_cli.report.terms import table_of
from remoe_cli.runtime.expected_cost import cost_model
from remoe_cli.simulate.service import of_placement
from remoe_cli.usage.again import again
from remoe_cli.usage.served import with_routing
from tests.plan.test_exact import held_against, instance
from tests.plan.test_predicted import mixed
from tests.support.brute_force import Brute
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

BOX = {"name": "box", "memory_mb": 2600, "vcpus": 2.0, "usd_per_hour": 0.2}


def with_answers(profile: Profile, accepted: float, path: Path) -> Profile:
    """The profile with drafts in 7 of 10 passes, whose tokens are each accepted with this probability after the one before."""
    random, passes = np.random.default_rng(3), np.zeros((len(profile.arrays["decode_tokens"]), len(MEASURED), MOST_ROWS), dtype=np.int32)
    for prompt, tokens in enumerate(profile.arrays["decode_tokens"].tolist()):
        for row, speculate in enumerate(MEASURED):
            left = tokens
            while left:
                most = int(random.integers(1, 11)) if speculate == "auto" else int(speculate)
                draft = min(left - 1, most) if random.random() < 0.7 else 0
                right = int(np.argmin(np.append(random.random(draft) < accepted, False)))
                passes[prompt, row, draft] += 1
                left -= right + 1
    return write_profile(path, profile.record, profile.arrays | {"draft_passes": passes})


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    path = tmp_path_factory.mktemp("profile")
    made = synthetic_profile(path / "plain", experts=6, expert_mb=150, skew=1.5)
    return with_answers(made, 0.8, path / "answers")


def catalog(**main: Any) -> Catalog:
    menu = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": 1.0} for mb in (900, 1200, 1800, 3000)]
    return tiny_catalog({"menu": [*menu, BOX]} | main, warm_unbilled_s=1e-2, warm_billed_s=1e-3)


# Of skipped slots, a live target, CPU quotas, instances, experts on GPUs, kinds of requests, divided layers and cold starts.
@pytest.mark.sweep
@pytest.mark.parametrize(("seed", "requests"), [(0, 1), (16, 2), (28, 1), (2, 1), (44, 1), (7, 1), (3, 1)])
def test_exact_is_brute_force(seed: int, requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "DRAFTED_STEPS", 24)
    alone, problem = instance(seed, tmp_path)
    drafts = Drafting(0.6, (0.3, 0.0, 0.25, 0.45))
    problem = replace(problem, concurrency=requests, speculate=3, workload=replace(problem.workload, drafts={3: drafts}))
    assert problem.workload.consecutive is not None and problem.invocations == "per-layer"
    brute = Brute(
        alone.profile,
        alone.catalog,
        alone.kinds,
        alone.per_hour,
        alone.cold_share,
        concurrency=requests,
        drafts=(0.6, drafts.rows),
        drafted=24,
    )
    held_against(brute, problem)


def test_tables_of_one_solve_share_their_memory_and_say_the_same_with_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "DRAFTED_STEPS", 24)
    problem = instance(2, tmp_path)[1]  # with divided layers, so with several tables
    problem = replace(problem, speculate=3, workload=replace(problem.workload, drafts={3: Drafting(0.6, (0.5, 0.5))}))
    found, kept_bytes = [], []
    for room_bytes in (0, 20_000, 2**30):
        monkeypatch.setattr(columns, "KEPT_BYTES", room_bytes)
        made = columns.build_columns(problem, candidate_sets(problem))
        found.append([made.decode_s(problem, [spec]).tolist() for spec in problem.menu])
        tables = [table for table in made.decode_tables if isinstance(table, StepTable)]
        arrays = [array for table in tables for array in table._waits.values()]
        arrays += [array for table in tables for loads in table._loads.values() for load in loads for array in (load.rows, load.hits)]
        kept_bytes.append(sum(array.nbytes for array in arrays))
    assert found[0] == found[1] == found[2]
    assert kept_bytes[0] == 0 < kept_bytes[1] <= 20_000 < kept_bytes[2]


def test_drawn_steps_are_recorded_tokens_that_follow_each_other(profile: Profile) -> None:
    """A pass of three tokens uses as many experts, and as often those of a function, as three recorded tokens in a row."""
    workload, trace = from_profile(profile), profile.arrays["trace_ids"]
    followed = Drafting(0.5, (0.5, 0.0, 0.5))
    for layer in range(trace.shape[1]):
        rows = workload.step_rows(layer, 1, followed)
        assert rows.sum() == rows.shape[1] * 2 * trace.shape[2]  # of half of the steps three tokens, of the others one
        rare = workload.ranks[layer] < 2
        used, far = [], []
        for width in (1, 3):
            each = [set(trace[np.arange(at, at + width) % len(trace), layer].ravel().tolist()) for at in range(len(trace))]
            used.append(np.mean([len(one) for one in each]))
            far.append(np.mean([bool(one & set(np.flatnonzero(rare).tolist())) for one in each]))
        assert (rows > 0).sum(axis=0).mean() == pytest.approx(np.mean(used), rel=0.02)
        assert (rows[rare] > 0).any(axis=0).mean() == pytest.approx(np.mean(far), abs=0.04)


def test_without_tokens_that_follow_each_other_rows_are_drawn_independently(profile: Profile) -> None:
    """Tokens that follow each other share experts; where the profile has none, the plan says that it counts too many."""
    arrays = dict(profile.arrays)
    trace = arrays["trace_ids"].copy()
    trace[1::2] = trace[::2]  # every second token chooses as the one before
    arrays["trace_ids"] = trace
    alike = replace(profile, arrays=arrays)
    shuffled = replace(profile, arrays=arrays | {"trace_prompt": arrays["trace_prompt"][::-1].copy()})
    pair = Drafting(0.5, (0.0, 1.0))
    used = [float((from_profile(one).step_rows(0, 1, pair) > 0).sum(axis=0).mean()) for one in (alike, shuffled)]
    assert used[0] < 0.9 * used[1]
    notes = [" ".join(plan_of(one, catalog(), speculate=4).notes) for one in (alike, shuffled)]
    assert "that follow each other." in notes[0] and "independently" in notes[1]
    for one in (alike, shuffled):
        assert verify(plan_of(one, catalog(), speculate=4, examine=True), one, catalog()) == ()


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options",
    [
        {"speculate": "auto"},
        {"speculate": 7, "objective": "tpot", "cold_share": 0.3},
        {"speculate": 4, "requests_per_hour": 4000.0, "concurrency": 3},
        {"speculate": 10, "remote_share": 0.5},
        {"speculate": 2, "routing": mixed((1, 4, 7), (5, 2, 3))},
        {"speculate": "auto", "solver": "scan", "tpot_s": 0.02, "examine": False},
    ],
)
def test_the_verifier_agrees(profile: Profile, options: dict[str, Any]) -> None:
    plan = plan_of(profile, catalog(), **({"examine": True} | options))
    assert plan.workload.speculate == options["speculate"] and plan.speculate != "off"
    assert verify(plan, profile, catalog()) == ()
    for one in plan.scenarios:  # half of the prompts, with as many passes for a token
        assert one.kind != ScenarioKind.HELD_OUT_PROMPTS or one.tpot_s < 1.3 * plan.tpot_s
    other: Speculate = 3 if plan.speculate != 3 else 5
    for update, field in (
        ({"speculate": other}, "tpot_s" if options["speculate"] == "auto" else "speculate"),
        ({"speculate": "off"}, "tpot_s" if options["speculate"] == "auto" else "speculate"),
        ({"speculate": 32}, "speculate"),
        ({"tpot_s": plan.tpot_s * (1 - 1e-7)}, "tpot_s"),
    ):
        assert field in {finding.field for finding in verify(plan.model_copy(update=update), profile, catalog())}, field


@pytest.mark.parametrize("objective", ["cost", "tpot"])
def test_the_planner_chooses_the_best_of_all_depths(profile: Profile, objective: Any) -> None:
    aim = Aim(objective)
    chosen = plan_of(profile, catalog(), objective=objective, speculate="auto")
    depths: tuple[Speculate, ...] = ("off", 1, 2, 4, 7, 10)
    each = {speculate: plan_of(profile, catalog(), objective=objective, speculate=speculate) for speculate in depths}
    values = {speculate: aim.value(plan.outcome) for speculate, plan in each.items()}
    value, bound = aim.value(chosen.outcome), chosen.lower_bound_usd if objective == "cost" else chosen.lower_bound_s
    assert bound is not None and bound <= value <= min(values.values()) * (1 + 1e-3) and chosen.status in ("optimal", "within-gap")
    assert values["off"] > 1.3 * value  # drafts are right so often that they pay
    assert chosen.speculate in MEASURED and len(set(values.values())) > 5
    assert all(plan.ttft_s == pytest.approx(each["off"].ttft_s) for plan in each.values() if plan.layers == each["off"].layers)
    rows = dict(summary_rows(chosen))
    assert "as the planner chose" in rows["drafts"]


def test_drafts_that_are_never_right_are_not_chosen(profile: Profile, tmp_path: Path) -> None:
    wrong = with_answers(profile, 0.0, tmp_path / "wrong")
    chosen, plain = (plan_of(wrong, catalog(), speculate=speculate) for speculate in ("auto", "off"))
    assert chosen.speculate == "off" and dict(summary_rows(chosen))["drafts"] == "none, as the planner chose"
    assert chosen.outcome == plain.outcome and chosen.layers == plain.layers
    assert verify(chosen, wrong, catalog()) == ()
    assert "speculate" not in json_text(plain) and "drafts" not in dict(summary_rows(plain))


def test_drafts_keep_a_target_that_single_tokens_miss(profile: Profile) -> None:
    target = 0.9 * plan_of(profile, catalog(), objective="tpot", solver="scan").tpot_s
    plan = plan_of(profile, catalog(), tpot_s=target, speculate="auto", solver="scan")
    assert plan.speculate != "off" and plan.tpot_s <= target


def forced(profile: Profile, speculate: Speculate, **options: Any) -> Plan:
    return plan_of(profile, catalog(), remote_share=0.5, speculate=speculate, **options)


def test_what_is_predicted_and_shown_has_the_plan_s_drafts(profile: Profile) -> None:
    plan = forced(profile, 4)
    predicted = cost_model(plan, profile, catalog())(round(plan.workload.n_in), round(plan.workload.n_out))
    assert predicted.tpot_s == pytest.approx(plan.tpot_s) and predicted.cost_usd_per_request == pytest.approx(plan.cost_usd_per_request)
    problem = problem_of(plan, profile, catalog())
    assert problem.speculate == 4 and request_of(plan).speculate == 4
    placement = Placement(plan.main, plan.layers, plan.instances)
    simulated = of_placement(problem, placement, "the plan", np.array([40.0]), plan.workload.n_out)
    assert simulated.step_s[1] == pytest.approx(plan.tpot_s)
    decode_usd = sum(plan.costs.layers_usd) - float(simulated.prefill_usd[0])
    assert plan.workload.n_out * simulated.token_usd[1] == pytest.approx(decode_usd)
    table_of(plan, problem, catalog())  # raises where the page's formulas give other figures
    sections = explanation(plan, profile, catalog(), request_of(plan))
    assert any("calls for each token" in text for _, text in sections["money"])


def test_a_deployment_has_the_plan_s_drafts_or_says_so(profile: Profile) -> None:
    plan, said = forced(profile, 4), list[str]()
    assert DeployOptions().drafts(plan, said.append) == DeployOptions(speculate=4).drafts(plan, said.append) == 4 and not said
    assert DeployOptions(speculate="off").drafts(plan, said.append) == "off"
    assert said == [
        "warning: The plan is for --speculate 4, and the deployment has --speculate off: what answers take and cost is not what the plan "
        "says."
    ]
    assert command_again(plan, catalog(), "p").endswith(" --speculate 4 --remote-share 0.5")


def test_accepted_tokens_share_calls(profile: Profile) -> None:
    plain, drafted = forced(profile, "off"), forced(profile, 4)
    assert drafted.tpot_s < 0.8 * plain.tpot_s and sum(drafted.costs.layers_usd) < sum(plain.costs.layers_usd)


def test_a_mixture_counts_each_prompt_by_its_share(profile: Profile) -> None:
    arrays = {
        "draft_passes": np.zeros((2, len(MEASURED), MOST_ROWS), dtype=np.int32),
        "decode_tokens": np.array([10, 40], dtype=np.int32),
    }
    arrays["draft_passes"][0, :, 0] = 10  # no draft at all
    arrays["draft_passes"][1, :, 2] = 20  # two tokens of each pass with two draft tokens
    some = replace(profile, arrays=profile.arrays | arrays)
    assert drafting_of(some)[2] == Drafting(0.6, pytest.approx((1 / 3, 0, 2 / 3)))  # type: ignore[arg-type]
    half = drafting_of(some, np.array([0, 1]), np.array([3.0, 3.0]))[2]
    assert half == Drafting(0.75, pytest.approx((2 / 3, 0, 1 / 3)))  # type: ignore[arg-type]


def test_what_cannot_be_priced_is_refused(profile: Profile, tmp_path: Path) -> None:
    plain = synthetic_profile(tmp_path / "plain")
    for asked, options, said in (
        (plain, {"speculate": 4}, "does not know how many draft tokens"),
        (profile, {"speculate": 11}, "at most 10 tokens"),
        (profile, {"speculate": "auto", "solver": "paper"}, "--solver paper is the paper's, which has no drafts"),
        (profile, {"speculate": 4, "invocations": "per-expert"}, "--invocation per-expert"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_of(asked, catalog(), **options)
    plan = forced(profile, 4)
    with pytest.raises(ArtifactError, match="does not know the drafts"):
        problem_of(plan, replace(profile, arrays={name: a for name, a in profile.arrays.items() if name != "draft_passes"}), catalog())


def test_planner_and_verifier_draw_the_same_steps(profile: Profile) -> None:
    from remoe_cli.plan.verify.inputs import verifier_inputs

    plan = forced(profile, 3)
    for speculate, requests in itertools.product(("auto", 3), (1, 2)):
        workload = plan.workload.model_copy(update={"concurrency": requests})
        asked = plan.model_copy(update={"speculate": speculate, "workload": workload})
        inputs, problem = verifier_inputs(asked, profile, catalog()), problem_of(asked, profile, catalog())
        for layer in range(2):
            rows = steps.drawn(inputs, layer, inputs.layers[layer], requests)
            assert np.array_equal(rows.T, problem.step_rows(layer))


def test_a_given_placement_has_drafts_that_meet_the_targets(tmp_path: Path) -> None:
    """Where the cheapest length of drafts misses a target, a dearer one that meets it is chosen."""
    made = synthetic_profile(tmp_path / "plain", experts=8, skew=3.0, expert_mb=95, main_vcpus=1)
    profile, given = with_answers(made, 0.6, tmp_path / "answers"), tmp_path / "given.json"
    prices = tiny_catalog(memory_menu_mb=[128, 256, 512, 1024], warm_unbilled_s=2e-3, warm_billed_s=7e-4)
    options: dict[str, Any] = {"n_in": 20, "n_out": 60}
    given.write_text(json_text(plan_of(profile, prices, remote_share=0.5, **options)))
    options |= {"placement_file": given}
    cheapest, fast = (plan_of(profile, prices, speculate=one, **options) for one in ("auto", 10))
    assert cheapest.tpot_s > 1.05 * fast.tpot_s
    assert plan_of(profile, prices, speculate="auto", tpot_s=fast.tpot_s, **options).tpot_s <= fast.tpot_s


def test_planning_again_weighs_all_lengths_and_the_served_routing(tmp_path: Path) -> None:
    """A call that takes 50 ms more makes another length the best; experts that are served more cost more, with drafts too."""
    made = with_answers(synthetic_profile(tmp_path / "a", layers=2, experts=8, skew=3.0, expert_mb=95, main_vcpus=1), 0.3, tmp_path / "b")
    catalogs = [tiny_catalog(memory_menu_mb=[128, 256, 512, 1024], warm_unbilled_s=s, warm_billed_s=s) for s in (1e-4, 5e-2)]
    asked: dict[str, Any] = {"cold_share": 0.0, "n_in": 60, "n_out": 40, "objective": "tpot", "remote_share": 0.5, "speculate": "auto"}
    plan, new = (plan_of(made, catalog, **asked) for catalog in catalogs)
    assert plan.speculate != new.speculate
    now = again(plan, problem_of(plan, made, catalogs[1]), make_problem(made, catalogs[1], request_of(plan)))
    assert now.best.tpot_s == pytest.approx(new.tpot_s, rel=1e-3)

    served = np.ones((2, 8), dtype=np.int64)
    for row, layer in zip(served, new.layers, strict=True):
        row[list(layer.remote)] = 1000
    drafted = plan_of(made, catalogs[0], **asked | {"speculate": 4})
    problem, placement = problem_of(drafted, made, catalogs[0]), Placement(drafted.main, drafted.layers, drafted.instances)
    before, after = (evaluate(each, placement) for each in (problem, with_routing(problem, 0 * served, served)))
    assert after.tpot_s > 1.05 * before.tpot_s
