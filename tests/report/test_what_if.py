"""The table behind the page's sliders against the planner, at many settings, and the page's own sums against the table's."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import ArtifactError
from remoe_cli.model.stored import StoredWeights
from remoe_cli.plan.assess.baselines import all_local_on, baselines
from remoe_cli.plan.assess.robustness import dearer_functions, slower_calls
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.cost.placement import evaluate as planned
from remoe_cli.plan.cost.placement import layer_outcomes
from remoe_cli.plan.document import BaselineName, Costs, LayerPlan, Lengths, MainKind, Plan
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES, copy_title, unlike_baselines
from remoe_cli.plan.problem.problem import Placement, Problem
from remoe_cli.plan.problem.request import problem_of, request_of
from remoe_cli.plan.problem.traffic import Traffic
from remoe_cli.profile.hardware import dequantised_times, latency_from
from remoe_cli.profile.record import Profile
from remoe_cli.report.terms import table_of
from remoe_cli.report.what_if import THIS_PLAN, Setting, Table, evaluate
from remoe_cli.simulate.ways import with_instances
from tests.support.paths import ROOT
from tests.support.synthetic import inverse, invocation, plan_of, synthetic_profile, tiny_catalog

PRICES, OVERHEADS, TRAFFICS = (0.25, 1.0, 3.0), (0.1, 1.0, 8.0), (0.5, 20.0, 4000.0)
AT_ONCE = (1, 4, 32)
Case = tuple[Profile, Catalog, Plan]


def by_use(path: Path, **options: Any) -> Case:
    profile, catalog = synthetic_profile(path, layers=3, experts=8), tiny_catalog()
    return profile, catalog, plan_of(profile, catalog, remote_share=0.5, **options)


def spread_overhead(path: Path) -> Case:
    profile = synthetic_profile(path)
    latency = profile.record.latency.model_copy(update={"invocation": invocation(3)})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    return profile, tiny_catalog(), plan_of(profile, tiny_catalog(), remote_share=0.5, requests_per_hour=20.0)


def on_a_gpu(path: Path) -> Case:
    profile = synthetic_profile(path, experts=12, skew=1.5, expert_mb=60.0, main_vcpus=1, local_expert=(1e-3, 1e-4))
    latency = profile.record.latency.model_copy(update={"gpu_expert": inverse(1e-4, 1e-6, at_vcpus=1)})
    profile = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    spec = {"name": "gpu", "memory_mb": 900, "vcpus": 1.0, "gpu_memory_mb": 900, "usd_per_hour": 0.2}
    catalog = tiny_catalog({"menu": [spec]}, max_functions=4)
    plan = plan_of(profile, catalog, requests_per_hour=20.0, tpot_s=0.05)
    assert any(layer.gpu for layer in plan.layers) and any(layer.remote for layer in plan.layers)
    return profile, catalog, plan


def scaled_to_zero(path: Path) -> Case:
    aws = read_catalog("aws-us-east-1")
    menu = tuple(spec for spec in aws.main.menu if spec.kind == MainKind.TO_ZERO)
    catalog = aws.model_copy(update={"main": aws.main.model_copy(update={"menu": menu})})
    profile = synthetic_profile(path, layers=3, experts=8, expert_mb=150.0, nonexpert_mb=900.0)
    return profile, catalog, plan_of(profile, catalog, requests_per_hour=6.0, remote_share=0.5)


def divided(path: Path, **options: Any) -> Case:
    """One layer of several functions, one of replicas, one without remote experts: as no planner of this size chooses."""
    profile, catalog, plan = by_use(path, requests_per_hour=20.0, **options)
    layers = (
        LayerPlan(layer=1, remote=(0, 2, 3, 5), memory_mb=256, replicas=1, functions=((0, 3), (2, 5))),
        LayerPlan(layer=2, remote=(1, 2, 4, 6, 7), memory_mb=512, replicas=2),
        LayerPlan(layer=3, remote=(), memory_mb=0, replicas=0),
    )
    problem, placement = problem_of(plan, profile, catalog), Placement(plan.main, layers)
    usd = tuple(layer.usd for layer in layer_outcomes(problem, placement))
    found = planned(problem, placement)
    costs = Costs(main_usd=found.cost_usd_per_request - sum(usd), layers_usd=usd)
    return profile, catalog, plan.model_copy(update={"layers": layers, "costs": costs} | found.model_dump())


def at_once(path: Path) -> Case:
    return by_use(path, requests_per_hour=20.0, cold_share=0.3, concurrency=4)


def rented_at_once(path: Path) -> Case:
    profile, catalog, _ = on_a_gpu(path)
    plan = plan_of(profile, catalog, requests_per_hour=400.0, cold_share=0.3, tpot_s=0.06, concurrency=3)
    assert any(layer.gpu for layer in plan.layers) and any(layer.remote for layer in plan.layers)
    return profile, catalog, plan


def one_at_a_time(path: Path) -> Case:
    """What is paid by use serves one request at a time, and what is rented several."""
    profile = synthetic_profile(path, layers=3, experts=8)
    box = {"name": "box", "memory_mb": 3000, "vcpus": 2.0, "usd_per_hour": 0.2}
    menu = [*(spec.model_dump() for spec in tiny_catalog().main.menu), box]
    catalog = tiny_catalog({"menu": menu, "serverless_concurrency": 1})
    plan = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=20.0, concurrency=8)
    assert plan.main.kind == MainKind.BY_USE and (plan.concurrency, plan.workload.concurrency) == (1, 8)
    return profile, catalog, plan


def quantised(path: Path) -> Case:
    """Beside the plan for a quantised checkpoint there is one for a copy that is not, on a main function of its own."""
    made = synthetic_profile(path, layers=2, experts=8, skew=3.0, expert_mb=95, main_vcpus=1)
    stored = StoredWeights(format="MXFP4", expert_bytes=25 * 2**20, nonexpert_bytes=100 * 2**20, served=True, packed=True)
    spec = made.record.spec.model_copy(update={"stored": stored})
    profile = replace(made, record=made.record.model_copy(update={"spec": spec, "latency": latency_from("lambda", spec)}))
    catalog = tiny_catalog(memory_menu_mb=[128, 256, 512, 1024])
    plan = plan_of(profile, catalog, examine=True, solver="scan", requests_per_hour=20.0)
    assert plan.unquantised is not None and any(layer.remote for layer in plan.unquantised.layers)
    assert plan.unquantised.layers != plan.layers
    return profile, catalog, plan


LENGTHS = (Lengths(share=0.3, n_in=7, n_out=40), Lengths(share=0.7, n_in=90, n_out=5))
CASES = {
    "by use": lambda path: by_use(path, requests_per_hour=20.0),
    "unknown traffic": by_use,
    "cold share": lambda path: by_use(path, requests_per_hour=20.0, cold_share=0.4),
    "per-expert": lambda path: by_use(path, requests_per_hour=20.0, invocations="per-expert"),
    "kinds of requests": lambda path: by_use(path, traffic=Traffic(LENGTHS, per_hour=20.0)),
    "spread overhead": spread_overhead,
    "on a GPU": on_a_gpu,
    "scaled to zero": scaled_to_zero,
    "divided": divided,
    "at once": at_once,
    "at once, divided": lambda path: divided(path, concurrency=3),
    "at once, rented": rented_at_once,
    "one at a time": one_at_a_time,
    "quantised": quantised,
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    return {name: make(folder / str(index)) for index, (name, make) in enumerate(CASES.items())}


def tables(cases: dict[str, Case]) -> dict[str, Table]:
    return {name: table_of(plan, problem_of(plan, profile, catalog), catalog) for name, (profile, catalog, plan) in cases.items()}


def at_traffic(case: Case, per_hour: float) -> Problem:
    """The problem of the same requests at another traffic, with the cold requests that it implies unless the plan was given a share."""
    profile, catalog, plan = case
    workload = plan.workload
    own = Traffic(workload.lengths, workload.requests_per_hour).cold_share(catalog.function.idle_ttl_s)
    cold = Traffic(workload.lengths, per_hour).cold_share(catalog.function.idle_ttl_s)
    update = {"requests_per_hour": per_hour, "cold_share": cold if own == workload.cold_share else workload.cold_share, "waking": None}
    return problem_of(plan.model_copy(update={"workload": workload.model_copy(update=update)}), profile, catalog)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_the_table_gives_what_the_planner_gives(name: str, cases: dict[str, Case]) -> None:
    profile, catalog, plan = cases[name]
    table = tables({name: cases[name]})[name]
    traffics = (*TRAFFICS, plan.workload.requests_per_hour)
    numbers = [number for number in AT_ONCE if number in table.numbers]
    whole = [(*each, None) for each in itertools.product(PRICES, OVERHEADS, traffics)]
    for price, overhead, per_hour, number in [*whole, *itertools.product((3.0,), (0.1, 8.0), TRAFFICS[1:], numbers)]:
        problem = at_traffic(cases[name], per_hour) if per_hour else problem_of(plan, profile, catalog)
        problem = problem if number is None else replace(problem, concurrency=number)
        changed = dearer_functions(slower_calls(problem, overhead), price)
        placement = with_instances(changed, Placement(plan.main, plan.layers, plan.instances))
        setting, theirs = Setting(price=price, overhead=overhead, per_hour=per_hour, concurrency=number), planned(changed, placement)
        ours, figures = evaluate(table, setting)[THIS_PLAN], (theirs.cost_usd_per_request, theirs.ttft_s, theirs.tpot_s)
        assert (ours.usd, ours.ttft_s, ours.tpot_s) == pytest.approx(figures, rel=1e-9), setting
        assert ours.instances == placement.instances


def test_the_slider_of_requests_at_once_has_what_the_plan_can_serve(cases: dict[str, Case], tmp_path: Path) -> None:
    found = {name: table.numbers for name, table in tables(cases).items()}
    assert found["by use"] == found["at once"] == found["one at a time"] == (1, 2, 4, 8, 16, 32)
    assert found["at once, divided"] == (1, 2, 3, 4, 8, 16, 32)
    assert found["per-expert"] == (1,)
    # 35 MB of KV cache and hidden states for each request: the main function holds them for eight, and not for 16.
    profile, catalog = (
        synthetic_profile(tmp_path, layers=2, experts=8),
        tiny_catalog({"menu": [{"name": "m", "memory_mb": 1250, "vcpus": 1.0}]}),
    )
    plan = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=20.0, n_in=100, n_out=6700)
    table = table_of(plan, problem_of(plan, profile, catalog), catalog)
    assert table.numbers == (1, 2, 4, 8)
    assert table.most.startswith("The slider ends where 16 requests at once would break a limit: m holds ")


def test_baselines_are_those_that_the_planner_finds_for_so_many_requests_at_once(cases: dict[str, Case]) -> None:
    """Of each kind the best one, on another instance than for one request where more memory or time is needed."""
    profile, catalog, plan = cases["at once, rented"]
    (table,) = tables({"": cases["at once, rented"]}).values()
    for number in AT_ONCE:
        found = baselines(replace(problem_of(plan, profile, catalog), concurrency=number), request_of(plan).aim).priced
        ours = evaluate(table, Setting(per_hour=table.per_hour, concurrency=number))
        for name in unlike_baselines(plan):
            theirs = found[name]
            figures = (theirs.cost_usd_per_request, theirs.ttft_s, theirs.tpot_s, theirs.instances)
            one = ours[BASELINE_TITLES[name]]
            assert (one.usd, one.ttft_s, one.tpot_s, one.instances) == pytest.approx(figures, rel=1e-9), (number, name)


def test_the_table_has_the_copy_that_is_not_quantised_too(cases: dict[str, Case]) -> None:
    profile, catalog, plan = cases["quantised"]
    copy, (table,) = plan.unquantised, tables({"quantised": cases["quantised"]}).values()
    assert copy is not None
    main = next(spec for spec in catalog.main.menu if spec.name == copy.spec)
    spec, latency = profile.record.spec.model_copy(update={"stored": None}), dequantised_times(profile.record.latency, profile.record.spec)
    for price, overhead, per_hour in itertools.product(PRICES, OVERHEADS, TRAFFICS):
        problem = replace(at_traffic(cases["quantised"], per_hour), spec=spec, latency=latency)
        theirs = planned(dearer_functions(slower_calls(problem, overhead), price), Placement(main, copy.layers, copy.instances))
        ours = evaluate(table, Setting(price=price, overhead=overhead, per_hour=per_hour))[copy_title(copy)]
        figures = (theirs.cost_usd_per_request, theirs.ttft_s, theirs.tpot_s)
        assert (ours.usd, ours.ttft_s, ours.tpot_s) == pytest.approx(figures, rel=1e-9), (price, overhead, per_hour)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["by use", "unknown traffic", "scaled to zero", "at once", "one at a time"])
@pytest.mark.parametrize("per_hour", TRAFFICS)
def test_all_experts_local_follow_the_traffic(name: str, per_hour: float, cases: dict[str, Case]) -> None:
    _, catalog, plan = cases[name]
    baseline = plan.baselines.get(BaselineName.ALL_LOCAL)
    assert baseline is not None
    spec = next(one for one in catalog.main.menu if one.name == baseline.spec)
    theirs = all_local_on(at_traffic(cases[name], per_hour), spec)
    ours = evaluate(tables({name: cases[name]})[name], Setting(per_hour=per_hour))[BASELINE_TITLES[BaselineName.ALL_LOCAL]]
    assert theirs is not None
    assert (ours.usd, ours.ttft_s) == pytest.approx((theirs.outcome.cost_usd_per_request, theirs.outcome.ttft_s), rel=1e-9)


def test_parts_sum_to_the_cost_and_the_functions_are_those_of_the_plan(cases: dict[str, Case]) -> None:
    for name, table in tables(cases).items():
        plan = cases[name][2]
        found = evaluate(table, Setting(per_hour=table.per_hour))[THIS_PLAN]
        assert found.functions_usd == pytest.approx(sum(plan.costs.layers_usd), rel=1e-9), name
        assert found.busy_usd is not None and found.busy_usd + found.idle_usd + found.fees_usd == pytest.approx(
            plan.costs.main_usd, rel=1e-9
        )


def test_what_is_rented_has_no_price_without_traffic(cases: dict[str, Case]) -> None:
    (table,) = tables({"on a GPU": cases["on a GPU"]}).values()
    assert evaluate(table, Setting(per_hour=None))[THIS_PLAN].usd is None


def test_a_table_that_does_not_give_the_plans_figures_is_refused(cases: dict[str, Case]) -> None:
    profile, catalog, plan = cases["by use"]
    bent = plan.model_copy(update={"tpot_s": plan.tpot_s * 1.001})
    with pytest.raises(ArtifactError, match=r"The formulas of the page give .* for 'this plan'"):
        table_of(bent, problem_of(plan, profile, catalog), catalog)


def page_setting(setting: Setting) -> dict[str, float | None]:
    """Write a setting as the page has it."""
    return {
        "price": setting.price,
        "overhead": setting.overhead,
        "perHour": setting.per_hour,
        "concurrency": setting.concurrency,
    }


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; docs/measure/report_page.py does the same in a browser")
def test_the_pages_sums_are_those_of_the_table(cases: dict[str, Case]) -> None:
    made = tables(cases)
    chosen = list(itertools.product(PRICES, OVERHEADS, (*TRAFFICS, None)))
    settings = {
        name: [Setting(price=p, overhead=o, per_hour=h) for p, o, h in chosen]
        + [Setting(price=3.0, overhead=o, per_hour=20.0, concurrency=n) for o in OVERHEADS for n in table.numbers]
        for name, table in made.items()
    }
    asked = {
        "tables": {name: table.model_dump(mode="json") for name, table in made.items()},
        "settings": {name: [page_setting(one) for one in some] for name, some in settings.items()},
    }
    stubs = "const module = {}; const document = { getElementById: () => ({ textContent: '{}' }) }; const matchMedia = () => ({});"
    script = (ROOT / "remoe_cli/report/page_files/page.js").read_text(encoding="utf-8")
    ask = (
        "const asked = JSON.parse(require('fs').readFileSync(0)); const found = {};"
        "for (const name in asked.tables) found[name] = asked.settings[name].map((one) => evaluate(asked.tables[name], one));"
        "console.log(JSON.stringify(found));"
    )
    run = subprocess.run(["node", "-e", f"{stubs}\n{script}\n{ask}"], input=json.dumps(asked), capture_output=True, text=True, check=True)
    for name, of_page in json.loads(run.stdout).items():
        for setting, ways in zip(settings[name], of_page, strict=True):
            for theirs, (title, ours) in zip(ways, evaluate(made[name], setting).items(), strict=True):
                assert theirs["title"] == title and theirs["instances"] == ours.instances
                assert (theirs["usd"] is None) == (ours.usd is None)
                figures = np.array([theirs["usd"] or 0.0, theirs["ttftS"], theirs["tpotS"], theirs["functions"]])
                assert figures == pytest.approx([ours.usd or 0.0, ours.ttft_s, ours.tpot_s, ours.functions_usd], rel=1e-12), (name, setting)
