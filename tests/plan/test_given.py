"""A placement from a file: priced as it stands, refused in one sentence where it is none, with exit code 3 where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import artifacts
from remoe_cli.errors import InfeasibleError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Lengths, Plan
from remoe_cli.plan.problem.traffic import Traffic, one_length
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

SHAPE: dict[str, Any] = {"layers": 2, "experts": 4, "skew": 3.0, "expert_mb": 100, "main_vcpus": 1, "remote_expert": (1e-4, 1e-5)}
BOX = {"name": "box", "memory_mb": 2600, "vcpus": 1.0, "usd_per_hour": 0.2}
MENU = [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in (900, 1000, 1200, 1800)] + [BOX]
NONE = {"remote": [], "memory_mb": 0, "replicas": 0}


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return synthetic_profile(tmp_path / "profile", **SHAPE)


def catalog(menu: Any = MENU, **function: Any) -> Catalog:
    return tiny_catalog({"menu": menu}, memory_menu_mb=[256, 512, 1024], **function)


def priced(tmp_path: Path, profile: Profile, prices: Catalog, placement: Any, **options: Any) -> Plan:
    (tmp_path / "placement.json").write_text(json.dumps(placement))
    plan = plan_of(profile, prices, placement_file=tmp_path / "placement.json", **options)
    assert verify(plan, profile, prices) == ()
    assert (plan.method, plan.status, plan.gap, plan.lower_bound_usd, plan.lower_bound_s) == ("given", "given", None, None, None)
    return plan


def layers(*each: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"layer": index, **layer} for index, layer in enumerate(each, 1)]


def remote(*experts: int, memory_mb: int = 512, replicas: int = 1, **more: Any) -> dict[str, Any]:
    return {"remote": list(experts), "memory_mb": memory_mb, "replicas": replicas, **more}


ROUND_TRIPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cheapest": (MENU, {}),
    "fastest": (MENU, {"objective": "tpot", "budget_usd": 2e-5}),
    "forced": (MENU, {"remote_share": 1.0}),
    "rented": ([BOX], {"traffic": one_length(40, 15, 100_000.0)}),
    "kinds": (
        MENU,
        {"traffic": Traffic((Lengths(share=0.5, n_in=9, n_out=40), Lengths(share=0.5, n_in=60, n_out=9))), "cold_share": 0.3},
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_plan_prices_to_itself(name: str, profile: Profile, tmp_path: Path) -> None:
    menu, options = ROUND_TRIPS[name]
    plan = plan_of(profile, catalog(menu), **options)
    assert (plan.instances > 1) == (name == "rented") and (name != "forced" or all(len(layer.remote) == 4 for layer in plan.layers))
    artifacts.write_json(tmp_path / "plan.json", plan)
    given = {option: value for option, value in options.items() if option != "remote_share"}
    again = plan_of(profile, catalog(menu), placement_file=tmp_path / "plan.json", **given)
    assert verify(again, profile, catalog(menu)) == ()
    same = ("main", "instances", "layers", "workload", "targets", "baselines", "verdict")
    assert {field: getattr(again, field) for field in same} == {field: getattr(plan, field) for field in same}
    for field, value in again.outcome:
        assert value == (getattr(plan, field) if value is None else pytest.approx(getattr(plan, field), rel=1e-12))
    assert (again.method, again.status, again.gap) == ("given", "given", None)


@pytest.mark.parametrize("main", ["m1200", MENU[2]])
def test_only_main_and_layers(main: Any, profile: Profile, tmp_path: Path) -> None:
    """By name or in full; what is not given takes its default."""
    placement = {"main": main, "layers": layers(remote(0, 1, 2, 3, memory_mb=1024), NONE), "comment": "by hand"}
    plan = priced(tmp_path, profile, catalog(), placement)
    assert (plan.main.name, plan.instances) == ("m1200", 1)
    assert [(layer.remote, layer.memory_mb, layer.replicas, layer.functions) for layer in plan.layers] == [
        ((0, 1, 2, 3), 1024, 1, ()),
        ((), 0, 0, ()),
    ]
    all_local = priced(tmp_path, profile, catalog(), {"main": "m1800", "layers": layers(NONE, NONE)})
    assert all_local.outcome.model_dump().items() <= all_local.baselines["all-local"].model_dump().items()


def test_functions_and_replicas_are_priced_as_they_are_given(profile: Profile, tmp_path: Path) -> None:
    def cost(layer: dict[str, Any]) -> float:
        return priced(tmp_path, profile, catalog(), {"main": "m1800", "layers": layers(layer, NONE)}).cost_usd_per_request

    costs = [cost(remote(0, 1, 2)), cost(remote(0, 1, 2, replicas=2)), cost(remote(0, 1, 2, functions=[[0, 2], [1]]))]
    assert len(set(costs)) == 3
    assert cost(remote(0, 1, 2, functions=[[1], [0, 2]])) == costs[2]  # what they are called does not matter


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read"),
    "too deep": ("[" * 100_000, "cannot be read"),
    "a list": ("[]", "wrong as a whole"),
    "an expert below 0": ({"main": "m1800", "layers": layers(remote(-1, 1), NONE)}, "wrong at 'layers.0.remote.0'"),
    "no main": ({"layers": layers(NONE, NONE)}, "wrong at 'main'"),
    "no layers": ({"main": "m1800"}, "wrong at 'layers'"),
    "unknown field": ({"main": "m1800", "layers": layers({**NONE, "gpu": 1}, NONE)}, "wrong at 'layers.0.gpu'"),
    "unknown main": ({"main": "m7", "layers": layers(NONE, NONE)}, "'m7' is not on the menu"),
    "another main": ({"main": {"name": "m1800", "memory_mb": 1801, "vcpus": 1.0}, "layers": layers(NONE, NONE)}, "'m1800' is not on the"),
    "no instances": ({"main": "m1800", "layers": layers(NONE, NONE), "instances": 0}, "0 instances of 'm1800'"),
    "instances by use": ({"main": "m1800", "layers": layers(NONE, NONE), "instances": 2}, "2 instances of 'm1800'"),
    "instances, no traffic": ({"main": "m1800", "layers": layers(NONE, NONE), "instances": 2}, "2 instances of 'm1800'"),
    "rented, no traffic": ({"main": "box", "layers": layers(NONE, NONE)}, "rented by the hour, so a request has no price"),
    "too few layers": ({"main": "m1800", "layers": layers(NONE)}, r"exactly the model's MoE layers \(1, 2\)"),
    "too many layers": ({"main": "m1800", "layers": layers(NONE, NONE, NONE)}, "exactly the model's MoE layers"),
    "layers in disorder": ({"main": "m1800", "layers": layers(NONE, NONE)[::-1]}, "exactly the model's MoE layers"),
}
BAD_LAYERS = {
    "no such expert": remote(1, 4),
    "twice": remote(1, 1),
    "in disorder": remote(2, 1),
    "off the menu": remote(1, memory_mb=300),
    "no memory": remote(1, memory_mb=0),
    "too many replicas": remote(1, replicas=3),
    "no replicas": remote(1, replicas=0),
    "memory for none": {**NONE, "memory_mb": 256},
    "replicas of none": {**NONE, "replicas": 1},
    "functions of none": {**NONE, "functions": [[]]},
    "one function": remote(1, 2, functions=[[1, 2]]),
    "an empty function": remote(1, 2, functions=[[1, 2], []]),
    "too many functions": remote(0, 1, 2, functions=[[0], [1], [2]]),
    "an expert missed": remote(0, 1, 2, functions=[[0], [1]]),
    "an expert in two": remote(0, 1, functions=[[0], [0, 1]]),
    "another expert": remote(0, 1, functions=[[0], [1, 2]]),
    "replicas of functions": remote(0, 1, functions=[[0], [1]], replicas=2),
}


def refused(
    placement: Any, pattern: str, profile: Profile, tmp_path: Path, prices: Catalog, error: type[Exception], **options: Any
) -> None:
    path = tmp_path / "placement.json"
    path.write_text(placement if isinstance(placement, str) else json.dumps(placement))
    with pytest.raises(error, match=pattern) as raised:
        plan_of(profile, prices, placement_file=path, **options)
    assert raised.value.hint  # type: ignore[attr-defined]
    assert type(raised.value) is error


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_placement(name: str, profile: Profile, tmp_path: Path) -> None:
    refused(*BAD[name], profile, tmp_path, catalog(), UsageError)


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_a_layer_that_there_is_not(name: str, profile: Profile, tmp_path: Path) -> None:
    placement = {"main": "m1800", "layers": layers(NONE, BAD_LAYERS[name])}
    refused(placement, "^Layer 2 of the placement .* names experts, memory, ", profile, tmp_path, catalog(max_functions=2), UsageError)


def test_a_file_that_is_not_there(profile: Profile, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            plan_of(profile, catalog(), placement_file=path)


DOES_NOT_FIT: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    # 500 MB for the runtime, 200 MB for the model and 8 experts of 100 MB.
    "main memory": ({"main": "m900", "layers": layers(NONE, NONE)}, "m900 holds 1 experts beside .* but 8 are local", {}, {}),
    # 60 MB for the runtime, and 125 MB for each expert.
    "function memory": (
        {"main": "m1800", "layers": layers(NONE, remote(0, 1, memory_mb=256))},
        "the experts of layer 2 need 310 MB in a function of 256 MB",
        {},
        {},
    ),
    # Of several functions the fullest counts.
    "a function's memory": (
        {"main": "m1800", "layers": layers(NONE, remote(0, 1, 2, memory_mb=256, functions=[[0], [1, 2]]))},
        "the experts of layer 2 need 310 MB in a function of 256 MB",
        {},
        {},
    ),
    # 80 slots of 2,048 bytes, a third more on the wire.
    "payload": (
        {"main": "m1800", "layers": layers(remote(0, 1, 2, 3, memory_mb=1024), NONE)},
        r"a prompt of 40 tokens sends 218453 bytes to layer 1, and the limit is 200000",
        {"payload_limit_bytes": 200_000},
        {},
    ),
    "concurrency": (
        {"main": "m1800", "layers": layers(remote(0, 1, replicas=2), remote(0, 1, functions=[[0], [1]]))},
        "4 instances of functions are more than the 3 that may work at once",
        {"concurrency_limit": 3},
        {},
    ),
    # One request takes longer than a hundredth of a second, so 360,000 an hour are too many for one instance.
    "time": (
        {"main": "box", "layers": layers(NONE, NONE)},
        "a request takes .* s, but 1 x box has 0.01 s for it",
        {},
        {"traffic": one_length(40, 15, 360_000.0)},
    ),
}


@pytest.mark.parametrize("name", DOES_NOT_FIT)
def test_what_does_not_fit_names_the_limit(name: str, profile: Profile, tmp_path: Path) -> None:
    placement, pattern, function, options = DOES_NOT_FIT[name]
    refused(placement, "does not fit: " + pattern, profile, tmp_path, catalog(**function), InfeasibleError, **options)
    assert InfeasibleError.exit_code == 3


def test_what_just_fits_is_priced(profile: Profile, tmp_path: Path) -> None:
    """The same limits, an inch wider."""
    placement = {"main": "m1800", "layers": layers(remote(0, 1, 2, 3, memory_mb=1024), NONE)}
    priced(tmp_path, profile, catalog(payload_limit_bytes=218_454), placement)
    busy = {"main": "m1800", "layers": layers(remote(0, 1, replicas=2), remote(0, 1, functions=[[0], [1]]))}
    priced(tmp_path, profile, catalog(concurrency_limit=4), busy)
    box = {"main": "box", "layers": layers(NONE, NONE)}
    one = priced(tmp_path, profile, catalog(), box, requests_per_hour=1.0)
    request_s = one.ttft_s + 15 * one.tpot_s
    traffic = one_length(40, 15, 2.999 * 3600 / request_s)
    three = priced(tmp_path, profile, catalog(), {**box, "instances": 3}, traffic=traffic)
    assert three.cost_usd_per_request == pytest.approx(3 * 0.2 / (traffic.per_hour or 0))
    refused({**box, "instances": 2}, "2 x box has", profile, tmp_path, catalog(), InfeasibleError, traffic=traffic)


@pytest.mark.parametrize("target", ["ttft_s", "tpot_s", "budget_usd"])
def test_a_missed_target_is_priced_and_not_recommended(target: str, profile: Profile, tmp_path: Path) -> None:
    """Of a placement that is recommended where no target is missed, as no main function holds all experts."""
    prices = catalog(MENU[:2])
    best = plan_of(profile, prices)
    placement = json.loads(best.model_dump_json())
    value = {"ttft_s": best.ttft_s, "tpot_s": best.tpot_s, "budget_usd": best.cost_usd_per_request}[target]
    assert priced(tmp_path, profile, prices, placement, **{target: value * 1.001}).verdict == "recommended"
    missed = priced(tmp_path, profile, prices, placement, **{target: value * 0.999})
    assert missed.verdict == "not-recommended" and missed.basis == "misses-target"
    assert missed.outcome == priced(tmp_path, profile, prices, placement).outcome
