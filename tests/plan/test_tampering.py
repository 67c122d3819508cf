"""What is altered in a plan the verifier names: the field itself, or, where another value would be as good an input, the figure that no
longer follows from it. More of a plan's fields are in test_build.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import BaselineName, Lengths, Plan, PredictedRouting, Source
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

BOX = {"name": "box", "memory_mb": 4096, "vcpus": 1.0, "usd_per_hour": 0.05}
KINDS = (Lengths(share=0.25, n_in=20, n_out=30), Lengths(share=0.75, n_in=60, n_out=10))
MIXTURE = PredictedRouting(
    prompts=Source(path="prompts.txt", sha256="0" * 64),
    count=2,
    predictor="SPS",
    validation_bits=None,
    mixture_bits=0.0,
    recorded=tuple(range(2, 19)),
    weights=tuple(range(1, 18)),
)
GPU = next(spec for spec in read_catalog("aws-us-east-1").main.menu if spec.usd_per_hour is not None)
CHEAP = read_catalog("aws-us-east-1")
CHEAP = CHEAP.model_copy(
    update={"reference": CHEAP.reference.model_copy(update={"gpus": (CHEAP.reference.gpus[0].model_copy(update={"usd_per_hour": 1e-3}),)})}
)
CASES: dict[str, tuple[Catalog, dict[str, Any]]] = {
    "by use": (tiny_catalog(), {"budget_usd": 1.0, "remote_share": 0.5, "examine": True}),
    "rented": (tiny_catalog({"menu": [BOX]}), {"traffic": one_length(40, 15, 50_000.0)}),  # more than two boxes have time for
    "kinds": (tiny_catalog(), {"traffic": Traffic(KINDS, 2.0), "cold_share": 0.3, "remote_share": 0.5}),
    "mixture": (tiny_catalog(), {"remote_share": 0.5, "routing": MIXTURE, "examine": True}),
    "divided": (tiny_catalog(memory_menu_mb=[128, 384], max_functions=3), {"remote_share": 1.0}),
    "unknown traffic": (CHEAP, {}),
    "GPU by use": (read_catalog("paper"), {"traffic": one_length(40, 15, 20.0), "cold_share": 0.3, "remote_share": 0.5}),
    "GPU rented": (read_catalog("aws-us-east-1"), {"traffic": one_length(40, 15, 90_000.0)}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, dict[str, Plan]]:
    profile = synthetic_profile(tmp_path_factory.mktemp("profile"), layers=2, experts=4, skew=2.0, expert_mb=90)
    plans = {name: plan_of(profile, catalog, **options) for name, (catalog, options) in CASES.items()}
    assert plans["rented"].instances >= 3 and plans["kinds"].workload.kinds == KINDS and plans["kinds"].layers[1].remote
    assert len(plans["divided"].layers[0].functions) == 2 and len(plans["by use"].scenarios) == 6
    assert len(plans["by use"].baselines) == len(plans["GPU by use"].baselines) == 5 and plans["rented"].missing.keys() == {"cpu"}
    unknown = plans["unknown traffic"]
    assert unknown.break_even_traffic is not None and unknown.baselines[BaselineName.GPU].cost_usd_per_request is None
    for name, plan in plans.items():
        assert verify(plan, profile, CASES[name][0]) == (), name
    return profile, plans


def put(*path: str | int) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """The value at a path of the plan's JSON, given or made of the one that is there."""

    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def apply(data: Any) -> None:
            for step in path[:-1]:
                data = data[step]
            data[path[-1]] = value(data[path[-1]]) if callable(value) else value

        return apply

    return to


def more(value: float) -> float:
    return value * (1 + 1e-7)


# Plan, what is put where, the field that a finding has to name.
TABLE: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("by use", put("model", "name")("other"), "model.name"),
    ("by use", put("model", "revision")("main"), "model.revision"),
    ("by use", put("model", "experts_per_layer")(5), "model.experts_per_layer"),
    ("by use", put("model", "expert_bytes")(lambda was: was + 1), "model.expert_bytes"),
    ("by use", put("model", "nonexpert_bytes")(lambda was: was - 1), "model.nonexpert_bytes"),
    ("by use", put("targets", "budget_usd")(1e-9), "targets.budget_usd"),
    ("by use", put("targets", "ttft_s")(1e-6), "targets.ttft_s"),
    ("by use", put("targets", "tpot_s")(1e-6), "targets.tpot_s"),
    ("by use", put("costs", "main_usd")(more), "costs.main_usd"),
    ("by use", put("costs", "layers_usd", 0)(more), "costs.layers_usd[0]"),
    ("by use", put("costs", "layers_usd", 1)(0.0), "costs.layers_usd[1]"),
    ("by use", put("costs", "layers_usd")(lambda was: was[:1]), "costs.layers_usd"),
    ("by use", put("costs", "layers_usd")(lambda was: [*was, 0.0]), "costs.layers_usd"),
    ("by use", put("layers", 0, "timeout_s")(29), "layers[0].timeout_s"),
    ("by use", put("spread", 0, "ttft_s")(more), "spread[0].ttft_s"),
    ("by use", put("spread", 2, "total_s")(more), "spread[2].total_s"),
    ("by use", put("spread", 1, "share")(0.9), "spread"),
    ("by use", put("targets", "ttft_percentile")(95), "targets.ttft_at"),
    ("by use", put("ttft_percentile_s")(1.0), "ttft_percentile_s"),
    ("kinds", put("workload", "longest", 0)([20, 29]), "workload.longest"),
    ("kinds", put("workload", "longest")([]), "workload.longest"),
    ("kinds", put("workload", "served")({"cover": 1, "share": 1, "tokens": 70, "n_in": 60, "n_out": 31}), "workload.served"),
    ("kinds", put("workload", "served")({"cover": 0.9, "share": 0.8, "tokens": 70, "n_in": 60, "n_out": 30}), "workload.served"),
    ("by use", put("basis")("cheaper"), "basis"),
    ("by use", put("instances")(2), "instances"),
    ("rented", put("instances")(0), "instances"),
    ("rented", put("instances")(lambda was: was - 1), "instances"),
    ("rented", put("instances")(lambda was: was + 1), "costs.main_usd"),
    ("rented", put("workload", "requests_per_hour")(-1.0), "workload.requests_per_hour"),
    ("rented", put("workload", "requests_per_hour")(more), "cost_usd_per_request"),
    ("rented", put("workload", "requests_per_hour")(None), "instances"),
    ("kinds", put("workload", "kinds", 0, "n_in")(0), "workload.kinds"),
    ("kinds", put("workload", "kinds", 1, "n_out")(0), "workload.kinds"),
    ("kinds", put("workload", "kinds", 0, "share")(0.5), "workload.kinds"),
    ("kinds", put("workload", "kinds", 0, "n_in")(21), "workload.n_in"),
    ("kinds", put("workload", "kinds", 1, "n_out")(11), "workload.n_out"),
    ("kinds", put("workload", "kinds")([]), "ttft_s"),
    ("kinds", put("workload", "n_in")(more), "workload.n_in"),
    ("kinds", put("workload", "n_out")(more), "workload.n_out"),
    ("kinds", put("workload", "cold_share")(1.1), "workload.cold_share"),
    ("kinds", put("workload", "cold_share")(-0.1), "workload.cold_share"),
    ("kinds", put("workload", "cold_share")(more), "ttft_s"),
    ("kinds", put("baselines", "fetch", "ideal")(False), "baselines.fetch.ideal"),
    *(("mixture", put("workload", "routing", "recorded", -1)(prompt), "workload.routing.recorded") for prompt in (-1, 17, 20)),
    ("mixture", put("workload", "routing", "recorded")([]), "workload.routing.recorded"),
    ("mixture", put("workload", "routing", "recorded")(lambda was: was[::-1]), "workload.routing.recorded"),
    ("mixture", put("workload", "routing", "recorded", -1)(19), "ttft_s"),
    ("mixture", put("workload", "routing", "weights", 0)(0), "workload.routing.weights"),
    ("mixture", put("workload", "routing", "weights")(lambda was: was[1:]), "workload.routing.weights"),
    ("mixture", put("workload", "routing", "weights", 0)(2), "tpot_s"),
    ("mixture", put("workload", "routing")(None), "tpot_s"),
    *(("mixture", put("scenarios", 5, field)(more), f"scenarios[5].{field}") for field in ("ttft_s", "tpot_s")),
    ("divided", put("layers", 0, "functions")([]), "layers[0].memory_mb"),
    ("divided", put("layers", 0, "functions")([[0, 1, 2, 3]]), "layers[0].functions"),
    ("divided", put("layers", 0, "functions", 0)(lambda was: was[:1]), "layers[0].functions"),
    ("divided", put("layers", 0, "functions")(lambda was: [was[0], was[0]]), "layers[0].functions"),
    ("divided", put("layers", 0, "functions")(lambda was: [*was, []]), "layers[0].functions"),
    ("divided", put("layers", 0, "functions")(lambda was: [[e] for part in was for e in part]), "layers[0].functions"),
    ("divided", put("layers", 1, "functions")(lambda was: [[was[0][0], was[1][0]], [was[0][1], was[1][1]]]), "costs.layers_usd[1]"),
    ("divided", put("layers", 0, "replicas")(2), "layers[0].replicas"),
    ("by use", put("scenarios", 5, "meets")(False), "scenarios[5].meets"),
    ("by use", put("scenarios", 4, "meets")(False), "scenarios[4].meets"),
    ("by use", put("scenarios", 3, "best_usd")(0.0), "scenarios[3].best_usd"),
    ("by use", put("scenarios", 2, "value")(4.0), "scenarios"),
    ("by use", put("scenarios", 2, "kind")("call-overhead"), "scenarios"),
    ("by use", put("scenarios")(lambda was: was[1:]), "scenarios"),
    ("by use", put("scenarios", 0, "judged_prompts")(10), "scenarios[0].judged_prompts"),
    ("by use", put("scenarios", 5, "planned_prompts")(11), "scenarios[5].planned_prompts"),
    ("by use", put("scenarios", 5, "judged_prompts")(None), "scenarios[5].judged_prompts"),
    *(("by use", put("scenarios", at, field)(more), f"scenarios[{at}].{field}") for at, field in [
        (0, "ttft_s"), (0, "cost_usd_per_request"), (1, "tpot_s"), (2, "cost_usd_per_request"), (3, "cost_usd_per_request"),
        (4, "ttft_s"), (4, "tpot_s"), (4, "cost_usd_per_request"),
    ]),
    *(("GPU rented", put("baselines", name, "instances")(lambda was: was + 1), f"baselines.{name}.spec") for name in ("all-local", "gpu")),
    ("rented", put("missing")({}), "baselines"),
    ("rented", put("missing", "gpu")("none holds it"), "baselines"),
    ("rented", lambda data: data["missing"].update(gpu=str(data["baselines"].pop("gpu"))), "baselines.gpu"),
    ("rented", lambda data: data["baselines"].update(cpu=data["baselines"]["gpu"]), "baselines.cpu"),
    *((case, put("baselines", name, field)(more if field != "spec" else "other"), f"baselines.{name}.{field}") for case, name, field in [
        ("by use", "mix", "cost_usd_per_request"), ("by use", "cpu", "tpot_s"), ("by use", "gpu", "ttft_s"),
        ("by use", "all-local", "spec"), ("rented", "mix", "spec"), ("kinds", "fetch", "ttft_s"), ("kinds", "cpu", "ttft_s"),
        ("GPU by use", "cpu", "cost_usd_per_request"), ("GPU by use", "cpu", "tpot_s"), ("GPU by use", "gpu", "cost_usd_per_request"),
        ("GPU by use", "fetch", "cost_usd_per_request"), ("GPU by use", "mix", "ttft_s"),
        ("GPU rented", "gpu", "cost_usd_per_request"), ("GPU rented", "gpu", "spec"), ("GPU rented", "fetch", "tpot_s"),
    ]),
    ("unknown traffic", put("baselines", "gpu", "cost_usd_per_request")(0.1), "baselines.gpu.cost_usd_per_request"),
    ("unknown traffic", put("baselines", "all-local", "cost_usd_per_request")(None), "baselines.all-local.cost_usd_per_request"),
    ("unknown traffic", put("baselines", "gpu", "usd_per_hour")(0.5), "baselines.gpu.usd_per_hour"),
    ("unknown traffic", put("baselines", "cpu", "cold_start_s")(more), "baselines.cpu.cold_start_s"),
    ("unknown traffic", put("cold_start_s")(more), "cold_start_s"),
    ("unknown traffic", put("main")(lambda was: GPU.model_dump(mode="json")), "main"),
    ("unknown traffic", put("break_even_traffic", "requests_per_hour")(lambda was: was * 1.01), "break_even_traffic.requests_per_hour"),
    ("unknown traffic", put("break_even_traffic", "by_use")("other"), "break_even_traffic.by_use"),
    ("unknown traffic", put("break_even_traffic", "usd_per_hour")(more), "break_even_traffic.usd_per_hour"),
    ("kinds", put("cold_start_s")(0.0), "cold_start_s"),
    *((case, put("baselines", name, "meets")(lambda was: not was), f"baselines.{name}.meets") for case, name in [
        ("by use", "all-local"), ("by use", "mix"), ("by use", "cpu"), ("by use", "gpu"), ("kinds", "fetch")
    ]),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(TABLE)), ids=[f"{case}: {field}" for case, _, field in TABLE])
def test_the_verifier_names_what_is_altered(row: int, made: tuple[Profile, dict[str, Plan]]) -> None:
    (profile, plans), (case, alter, field) = made, TABLE[row]
    data = plans[case].model_dump(mode="json")
    alter(data)
    altered = Plan.model_validate(data)
    assert altered != plans[case]
    findings = verify(altered, profile, CASES[case][0])
    assert field in {finding.field for finding in findings}, findings
