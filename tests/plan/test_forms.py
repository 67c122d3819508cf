"""Where functions may dequantise experts or compute from stored bytes, the plan is the better of the plans with each form."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remoe_cli.cli.plan_make import _frontier
from remoe_cli.errors import InfeasibleError, OverBudgetError
from remoe_cli.model.stored import StoredWeights
from remoe_cli.plan import choose
from remoe_cli.plan.document import Plan
from remoe_cli.plan.explain.rows import summary_rows
from remoe_cli.plan.explain.why import explanation
from remoe_cli.plan.problem.request import PlanRequest, problem_of
from remoe_cli.plan.solve.exact import Solution
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.verify.check import verify
from remoe_cli.plan.wording import dollars
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.record import Profile, packed_form
from remoe_cli.report.content import Content
from remoe_cli.report.sections import sections
from remoe_cli.report.summary import labels
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

MB = 2**20
EITHER = StoredWeights(format="FP8", expert_bytes=48 * MB, nonexpert_bytes=120 * MB, served=True, either=True)
CATALOG = tiny_catalog(memory_menu_mb=[128, 256, 512, 1024])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), layers=2, experts=8, skew=3.0, expert_mb=95, main_vcpus=1)


def of(profile: Profile, slower: float) -> Profile:
    """The profile of a checkpoint in FP8, whose packed experts take so many times as long as dequantised ones."""
    spec = profile.record.spec.model_copy(update={"stored": EITHER})
    latency = latency_from("lambda", spec)
    ready = latency.remote_expert.curve
    times = {name: getattr(ready, name) * slower for name in ("weights_s", "per_token_s")}
    packed = latency.remote_expert.model_copy(update={"curve": ready.model_copy(update=times)})
    return replace(
        profile, record=profile.record.model_copy(update={"spec": spec, "latency": latency.model_copy(update={"packed_expert": packed})})
    )


def alone(profile: Profile, packed: bool) -> Profile:
    """The same, of functions that have one form."""
    spec, latency = profile.record.spec, profile.record.latency
    if packed:
        spec, latency = packed_form(spec, latency)
    else:
        stored = EITHER.model_copy(update={"either": False})
        spec, latency = spec.model_copy(update={"stored": stored}), latency.model_copy(update={"packed_expert": None})
    return replace(profile, record=profile.record.model_copy(update={"spec": spec, "latency": latency}))


OPTIONS: dict[str, Any] = {"cold_share": 0.2, "n_in": 60, "n_out": 40}


@pytest.mark.parametrize(("slower", "packed"), [(0.6, True), (3.0, False)])
@pytest.mark.parametrize("solver", ["exact", "scan"])
def test_the_better_form_is_chosen(made: Profile, slower: float, packed: bool, solver: str) -> None:
    profile = of(made, slower)
    plan = plan_of(profile, CATALOG, solver=solver, examine=True, **OPTIONS)
    assert any(layer.remote for layer in plan.layers) and plan.model.packed is packed
    one, other = (plan_of(alone(profile, form), CATALOG, solver=solver, **OPTIONS) for form in (packed, not packed))
    assert (one.model.packed, other.model.packed) == (packed, not packed)
    assert plan.layers == one.layers and plan.cost_usd_per_request == one.cost_usd_per_request < other.cost_usd_per_request
    if solver == "exact":  # and no plan in either form is below the bound
        assert plan.lower_bound_usd is not None and one.lower_bound_usd is not None and other.lower_bound_usd is not None
        assert plan.lower_bound_usd <= one.lower_bound_usd and plan.lower_bound_usd <= other.lower_bound_usd
        assert plan.lower_bound_usd >= 0.998 * one.cost_usd_per_request
    assert verify(plan, profile, CATALOG) == ()
    assert problem_of(plan, profile, CATALOG).spec.is_packed is packed
    assert plan.unquantised is not None and plan.unquantised.tpot_s > 0
    changed = plan.model_copy(update={"model": plan.model.model_copy(update={"packed": not packed})})
    assert verify(changed, profile, CATALOG)


@pytest.mark.parametrize(("slower", "packed"), [(0.6, True), (3.0, False)])
def test_a_plan_says_which_form_it_has_and_why(made: Profile, slower: float, packed: bool) -> None:
    """The note has the other form's best scanned plan; the command, the explanation and the report name the form."""
    profile = of(made, slower)
    plan = plan_of(profile, CATALOG, examine=True, **OPTIONS)
    (note,) = (text for text in plan.notes if text.startswith("Expert functions have their experts"))
    other = plan_of(alone(profile, not packed), CATALOG, solver="scan", **OPTIONS).cost_usd_per_request
    more = other / plan.cost_usd_per_request - 1
    weighed = f"weighed too: the best plan with them that the fast scan finds costs {dollars(other)} a request, {more:.1%} more."
    assert note.endswith(f"{'Ready' if packed else 'Packed'} ones were {weighed}") and more > 0.001
    assert f"experts {'packed' if packed else 'ready'}: " in note
    form = dict(summary_rows(plan))["expert form"]
    takes = {True: "packed: functions compute from the stored bytes, 50.3 MB an expert", False: "ready: functions dequantise each expert"}
    assert form.startswith(takes[packed])
    inputs = dict(explanation(plan, profile, CATALOG, PlanRequest(**OPTIONS))["inputs"])["expert form"]
    ready_ms, packed_ms = (1e3 * float(form.record.latency.remote_expert.seconds(1, 1.0)) for form in (profile, profile.in_form(True)))
    each = [f"packed, 50.3 MB and {packed_ms:.3g} ms", f"ready, 99.6 MB and {ready_ms:.3g} ms"]
    assert inputs == f"{form}; in memory, and for a token on one vCPU, an expert takes: {'; '.join(each if packed else each[::-1])}"
    content = Content("model", (), plan=plan)
    assert dict(labels(content))["expert form"] == form
    assert any(f"Form of the experts in functions: {form}." in section.inner for section in sections(content))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"packed": True, "either": False, "format": "MXFP4"}, "Experts in MXFP4 always are, for the memory that this saves."),
        ({"either": False}, "They cannot be packed: functions have no product for FP8 as this checkpoint stores it."),
        ({}, "The profile has no times of packed ones, so only this form could be weighed."),
    ],
)
def test_the_only_form_has_its_reason(made: Profile, change: dict[str, Any], why: str) -> None:
    profile = alone(of(made, 1.0), packed=False)
    spec = profile.record.spec.model_copy(update={"stored": EITHER.model_copy(update=change)})
    profile = replace(profile, record=profile.record.model_copy(update={"spec": spec}))
    plan = plan_of(profile, CATALOG, remote_share=0.5, **OPTIONS)
    (note,) = (text for text in plan.notes if text.startswith("Expert functions have their experts"))
    assert note.endswith(why) and plan.model.packed == bool(change.get("packed"))


def test_what_has_no_form_says_none(made: Profile) -> None:
    """Where no expert is remote, and where none is quantised."""
    local, plain = plan_of(of(made, 1.0), CATALOG, remote_share=0.0, **OPTIONS), plan_of(made, CATALOG, remote_share=0.5, **OPTIONS)
    for plan in (local, plain):
        assert "expert form" not in dict(summary_rows(plan)) and not any("their experts" in note for note in plan.notes)
    assert any(note.startswith("The checkpoint is stored in FP8") for note in local.notes)
    assert not any("stored in" in note for note in plain.notes)


@pytest.mark.parametrize(("objective", "said"), [("tpot", "has a TPOT of"), ("ttft", "has a TTFT of")])
def test_forms_are_compared_by_what_was_asked_for(made: Profile, objective: str, said: str) -> None:
    plan = plan_of(of(made, 3.0), CATALOG, examine=True, objective=objective, **OPTIONS)
    assert any(f"the fast scan finds {said}" in note for note in plan.notes) == any(layer.remote for layer in plan.layers)


def test_the_copy_beside_it_does_not_depend_on_the_form(made: Profile) -> None:
    beside = [copy_of(plan_of(of(made, slower), CATALOG, solver="scan", examine=True, **OPTIONS)) for slower in (0.6, 3.0)]
    assert beside[0] == beside[1]


def copy_of(plan: Plan) -> Any:
    assert plan.unquantised is not None
    return plan.unquantised


def test_a_plan_in_one_form_where_the_other_has_none(made: Profile) -> None:
    """Dequantised experts need the memory for one more: no function of this menu has it."""
    small = tiny_catalog(memory_menu_mb=[128, 180])
    plan = plan_of(of(made, 20.0), small, remote_share=0.5, **OPTIONS)
    assert plan.model.packed and any(layer.remote for layer in plan.layers) and verify(plan, of(made, 20.0), small) == ()


@pytest.mark.parametrize("limit", ["tpot_s", "budget_usd"])
def test_what_is_impossible_is_so_in_both_forms(made: Profile, limit: str) -> None:
    """What a refusal says to be the least suffices, and is that of the form that has less."""
    profile, options = of(made, 0.6), OPTIONS | {"remote_share": 1.0}
    best = plan_of(profile, CATALOG, objective="tpot" if limit == "tpot_s" else "cost", **options)
    least = best.tpot_s if limit == "tpot_s" else best.cost_usd_per_request
    assert best.model.packed
    with pytest.raises((InfeasibleError, OverBudgetError)) as refused:
        plan_of(profile, CATALOG, **options | {limit: 0.9 * least})
    said = float(re.findall(r"least TPOT is (\S+) s|cheapest costs (\S+) USD", refused.value.message)[0][limit != "tpot_s"])
    assert said == pytest.approx(least, rel=2e-3)


def test_the_frontier_has_the_form_of_its_plan(made: Profile, tmp_path: Path) -> None:
    profile = of(made, 0.6)
    plan = plan_of(profile, CATALOG, **OPTIONS)
    assert plan.model.packed
    document: dict[str, Any] = {}
    _frontier(document, plan, profile, CATALOG, PlanRequest(examine=False, **OPTIONS), tmp_path / "plan.json")
    assert document["frontier"][-1]["cost_usd"] == pytest.approx(plan.cost_usd_per_request, rel=2e-3)


def test_the_time_limit_is_for_all_forms(made: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed wins here, and is solved to beat the other form and then alone."""
    limits, solve = list[float](), choose.solve

    def slow(task: Task, gap: float, limit_s: float, start: Solution | None) -> Solution | None:
        limits.append(limit_s)
        return solve(task, gap, limit_s, start)

    monkeypatch.setattr(choose, "time", SimpleNamespace(monotonic=lambda: 3.0 * len(limits)))
    monkeypatch.setattr(choose, "solve", slow)
    assert plan_of(of(made, 0.6), CATALOG, time_limit_s=7.0, **OPTIONS).model.packed
    assert limits == [7.0, 4.0, 1.0]
