"""Plans from profile to document: the verifier's agreement, verdicts, messages, determinism, forced placements."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, InfeasibleError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import BaselineName, BreakEven, LayerPlan, Outcome, Plan, Scenario, ScenarioKind
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES
from remoe_cli.plan.explain.rows import (
    LAYER_COLUMNS,
    alternative_texts,
    baseline_rows,
    layer_rows,
    scenario_rows,
    summary_rows,
)
from remoe_cli.plan.problem.workload import from_profile
from remoe_cli.plan.verify.check import verify
from remoe_cli.plan.wording import id_ranges
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

# Remote pays: most experts are hardly used, and memory beyond the measured vCPUs brings no speed.
PAYS: dict[str, Any] = {"layers": 3, "experts": 8, "skew": 3.0, "expert_mb": 100, "main_vcpus": 1, "remote_expert": (1e-4, 1e-5)}
# It cannot: experts are small and evenly used.
NOT: dict[str, Any] = {"layers": 3, "experts": 4, "skew": 0.0, "expert_mb": 2}


@pytest.fixture(scope="module")
def paying(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Catalog]:
    return synthetic_profile(tmp_path_factory.mktemp("paying"), **PAYS), tiny_catalog({"menu": menu()})


@pytest.fixture(scope="module")
def recommended(paying: tuple[Profile, Catalog]) -> Plan:
    return plan_of(*paying)


def menu(largest_mb: int = 4096) -> list[dict[str, Any]]:
    return [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(768, largest_mb + 1, 512)]


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options", [{}, {"remote_share": 0.5}, {"remote_share": 0.0}, {"remote_share": 1.0}, {"n_in": 7, "n_out": 90}, {"tpot_s": 0.02}]
)
@pytest.mark.parametrize("shape", [PAYS, NOT, {"layers": 4, "experts": 16, "top_k": 4, "skew": 1.5, "expert_mb": 30}, {"decode_tokens": 2}])
def test_the_verifier_agrees(shape: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, **shape)
    for catalog in (tiny_catalog({"menu": menu()}), tiny_catalog({"menu": menu(), "usd_per_accelerator_gb_second": 5e-5}, max_replicas=3)):
        memory = catalog.model_copy(update={"function": catalog.function.model_copy(update={"memory_menu_mb": (256, 1024, 2048)})})
        plan = plan_of(profile, memory, **options)
        assert verify(plan, profile, memory) == ()


def tamperings() -> dict[str, Any]:
    """What to change in a plan's JSON, by the field that must be found."""

    def layer(**change: Any) -> Any:
        def apply(data: dict[str, Any]) -> None:
            next(entry for entry in data["layers"] if len(entry["remote"]) > 1).update(change)

        return apply

    def drop_expert(data: dict[str, Any]) -> None:
        entry = next(entry for entry in data["layers"] if len(entry["remote"]) > 1)
        entry["remote"] = entry["remote"][1:]

    def scale(field: str, factor: float) -> Any:
        return lambda data: data.update({field: data[field] * factor})

    return {
        "cost_usd_per_request": scale("cost_usd_per_request", 1 + 1e-8),
        "ttft_s": scale("ttft_s", 1 - 1e-8),
        "tpot_s": scale("tpot_s", 1 + 1e-8),
        "lower_bound_usd": scale("lower_bound_usd", 1.01),
        "gap": lambda data: data.update(gap=0.01),
        "status": lambda data: data.update(status="forced"),
        "status method": lambda data: data.update(method="forced"),
        "verdict": lambda data: data.update(verdict="not-recommended"),
        "targets ttft": lambda data: data["targets"].update(ttft_s=data["ttft_s"] * 0.999),
        "targets tpot": lambda data: data["targets"].update(tpot_s=data["tpot_s"] * 0.999),
        "main": lambda data: data["main"].update(memory_mb=data["main"]["memory_mb"] + 1),
        "main vcpus": lambda data: data["main"].update(vcpus=9.0),
        "main.memory_mb": lambda data: data.update(main=menu()[0]),
        "layers": lambda data: data["layers"].pop(),
        "layers order": lambda data: data["layers"].reverse(),
        "layers[0].remote": lambda data: data["layers"][0].update(remote=[0, 99], memory_mb=512, replicas=1),
        "layers[0].remote twice": lambda data: data["layers"][0].update(remote=[1, 1], memory_mb=512, replicas=1),
        "cost_usd_per_request fewer remote": drop_expert,
        "layers[": layer(memory_mb=300),
        "layers[ too small": layer(memory_mb=128),
        "layers[ replicas": layer(replicas=9),
        "layers[ no replicas": layer(replicas=0),
        "baselines": lambda data: data.update(baselines={}),
        "baselines.all-local.tpot_s": lambda data: data["baselines"]["all-local"].update(tpot_s=0.5),
        "baselines.all-local.cost_usd_per_request": lambda data: data["baselines"]["all-local"].update(cost_usd_per_request=1.0),
        "ttft_s workload": lambda data: data["workload"].update(n_in=data["workload"]["n_in"] + 1),
        "cost_usd_per_request workload": lambda data: data["workload"].update(n_out=data["workload"]["n_out"] + 1),
        "workload": lambda data: data["workload"].update(n_out=0),
        "profile.sha256": lambda data: data["profile"].update(sha256="0" * 64),
        "catalog.sha256": lambda data: data["catalog"].update(sha256="0" * 64),
    }


@pytest.mark.parametrize("name", tamperings())
def test_the_verifier_catches(name: str, paying: tuple[Profile, Catalog], recommended: Plan) -> None:
    data = recommended.model_dump(mode="json")
    tamperings()[name](data)
    findings = verify(Plan.model_validate(data), *paying)
    assert any(finding.field.startswith(name.split()[0]) for finding in findings), findings


def test_the_verifier_catches_a_payload_over_the_limit(paying: tuple[Profile, Catalog]) -> None:
    profile, catalog = paying
    catalog = catalog.model_copy(update={"function": catalog.function.model_copy(update={"memory_menu_mb": (1024,)})})
    plan = plan_of(profile, catalog, remote_share=0.5)
    tight = catalog.model_copy(update={"function": catalog.function.model_copy(update={"payload_limit_bytes": 3000})})
    assert any("of 3000 bytes" in finding.found for finding in verify(plan, profile, tight))


def test_remote_is_chosen_and_recommended_where_it_pays(recommended: Plan) -> None:
    plan = recommended
    assert (plan.verdict, plan.basis) == ("recommended", "cheaper")
    assert plan.gap <= 1e-3
    assert sum(len(layer.remote) for layer in plan.layers) >= 6
    saving = 1 - plan.cost_usd_per_request / plan.baselines["all-local"].cost_usd_per_request
    assert saving > 0.05


def test_all_local_where_remote_cannot_pay(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, **NOT)
    plan = plan_of(profile, tiny_catalog({"menu": menu()}))
    assert (plan.verdict, plan.basis) == ("not-recommended", "all-local-is-cheapest")
    assert not any(layer.remote for layer in plan.layers)
    assert plan.outcome.model_dump().items() <= plan.baselines["all-local"].model_dump().items()


def test_a_forced_plan_sends_the_least_used_share_and_says_what_it_costs(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, **(NOT | {"skew": 2.0}))
    catalog = tiny_catalog({"menu": menu()})
    exact, forced = plan_of(profile, catalog), plan_of(profile, catalog, remote_share=0.5)
    assert (forced.method, forced.status, forced.verdict) == ("forced", "forced", "not-recommended")
    assert forced.lower_bound_usd == pytest.approx(exact.lower_bound_usd)
    assert forced.gap > 0.05
    assert forced.basis == "dearer-than-all-local" and sum(len(layer.remote) for layer in forced.layers) == 6
    for index, layer in enumerate(forced.layers):
        tokens = profile.arrays["prefill_counts"][:, index].sum(0) + profile.arrays["decode_counts"][:, index].sum(0)
        assert set(layer.remote) == set(tokens.argsort(kind="stable")[:2].tolist())


def test_a_share_that_no_layer_can_give_alone_is_met_over_all_layers(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, **(NOT | {"skew": 2.0}))
    sizes = [len(layer.remote) for layer in plan_of(profile, tiny_catalog({"menu": menu()}), remote_share=0.8).layers]
    assert sum(sizes) == round(0.8 * 12) and max(sizes) - min(sizes) == 1


def test_a_resized_workload_is_that_of_the_profile_at_those_lengths(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    resized, anew = from_profile(profile).resized(7, 90), from_profile(profile, 7, 90)
    assert (resized.n_in, resized.n_out) == (7, 90)
    assert resized.prefill_tokens == pytest.approx(anew.prefill_tokens, rel=1e-12)
    for (sets, counts), (sets_anew, counts_anew) in zip(resized.patterns, anew.patterns, strict=True):
        assert (sets == sets_anew).all() and (counts == counts_anew).all()


def test_a_model_too_large_for_any_main_spec(paying: tuple[Profile, Catalog]) -> None:
    profile, _ = paying
    plan = plan_of(profile, tiny_catalog({"menu": menu(2304)}))
    assert "all-local" not in plan.baselines
    assert plan.missing["all-local"].endswith("the largest has 2304 MB")
    assert (plan.verdict, plan.basis) == ("recommended", "nothing-else-fits") and plan.break_even_traffic is None
    assert plan.baselines["gpu"].cost_usd_per_request is None and plan.baselines["gpu"].usd_per_hour
    plan = plan_of(profile, tiny_catalog({"menu": menu(2304)}), requests_per_hour=20.0)
    assert (plan.verdict, plan.basis) == ("recommended", "cheaper")
    assert "the whole model on a GPU" in plan.reason and "g4dn.xlarge" in plan.reason


def test_same_input_same_bytes(paying: tuple[Profile, Catalog], tmp_path: Path) -> None:
    for name in ("a", "b"):
        artifacts.write_json(tmp_path / name, plan_of(*paying, tpot_s=0.02))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert artifacts.read_json(tmp_path / "a", Plan) == plan_of(*paying, tpot_s=0.02)


@pytest.mark.parametrize("target", ["ttft_s", "tpot_s"])
def test_a_target_out_of_reach_names_the_least_that_does(target: str, paying: tuple[Profile, Catalog]) -> None:
    with pytest.raises(InfeasibleError, match=f"No plan meets a {target[:4].upper()} of 0.0001 s") as raised:
        plan_of(*paying, **{target: 1e-4})  # type: ignore[arg-type]
    assert raised.value.exit_code == 3
    least = number(raised.value.message, r"least \w+ is ([\d.e-]+) s")
    assert plan_of(*paying, **{target: least}).method == "exact"  # type: ignore[arg-type]
    with pytest.raises(InfeasibleError):
        plan_of(*paying, **{target: least * 0.995})  # type: ignore[arg-type]


def test_what_is_said_of_an_alternative_is_said_of_a_row(paying: tuple[Profile, Catalog]) -> None:
    """Where the whole model on CPUs is what all experts local are, the table has one row for both."""
    plan = plan_of(*paying)
    same = plan.baselines[BaselineName.ALL_LOCAL]
    plan = plan.model_copy(update={"baselines": {BaselineName.ALL_LOCAL: same, BaselineName.CPU: same}, "missing": {}})
    titles = {row[0] for row in baseline_rows(plan)}
    assert len(titles) == 1 and {text.partition(":")[0] for text in alternative_texts(plan)} == titles


def test_targets_that_conflict_name_the_least_tpot_at_that_ttft(tmp_path: Path) -> None:
    # In prefill the remote side is far faster than the main function, in decoding far slower.
    profile = synthetic_profile(tmp_path, layers=2, experts=4, local_expert=(1e-5, 1e-3), remote_expert=(1e-5, 1e-6), main_vcpus=1)
    catalog = tiny_catalog(warm_unbilled_s=0.005, warm_billed_s=0.005)
    ttft, tpot = 0.04, 0.012
    for alone in ({"ttft_s": ttft}, {"tpot_s": tpot}):
        assert plan_of(profile, catalog, **alone).method == "exact"  # type: ignore[arg-type]
    with pytest.raises(InfeasibleError, match="together") as raised:
        plan_of(profile, catalog, ttft_s=ttft, tpot_s=tpot)
    least = number(raised.value.message, r"least TPOT is ([\d.e-]+) s")
    assert plan_of(profile, catalog, ttft_s=ttft, tpot_s=least).tpot_s <= least * (1 + 1e-8)


def test_memory_out_of_reach_names_the_least_that_does(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, expert_mb=500)
    with pytest.raises(InfeasibleError, match="memory of the main function is too small") as raised:
        plan_of(profile, tiny_catalog())
    least = int(number(raised.value.message, r"at least (\d+) MB"))
    assert plan_of(profile, tiny_catalog({"menu": [{"name": "x", "memory_mb": least, "vcpus": 1.0}]})).main.memory_mb == least
    with pytest.raises(InfeasibleError):
        plan_of(profile, tiny_catalog({"menu": [{"name": "x", "memory_mb": least - 1, "vcpus": 1.0}]}))


def test_payload_out_of_reach_names_the_least_that_does(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, expert_mb=100, prompt_tokens=400)
    small = {"menu": menu()[:1]}
    with pytest.raises(InfeasibleError, match="payload limit of 5000 bytes is too small") as raised:
        plan_of(profile, tiny_catalog(small, payload_limit_bytes=5000, memory_menu_mb=[1024]))
    least = int(number(raised.value.message, r"only with (\d+) bytes"))
    assert plan_of(profile, tiny_catalog(small, payload_limit_bytes=least, memory_menu_mb=[1024])).main.memory_mb == 768
    with pytest.raises(InfeasibleError, match="payload"):
        plan_of(profile, tiny_catalog(small, payload_limit_bytes=least - 1, memory_menu_mb=[1024]))


def test_a_forced_set_that_no_function_holds_is_named(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, expert_mb=300)
    with pytest.raises(InfeasibleError, match="memory of expert functions is too small: 4 experts of layer 1 need 15"):
        plan_of(profile, tiny_catalog(max_functions=1), remote_share=1.0)


def test_workloads_that_cannot_be_used(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path)
    for options in ({"n_in": 0}, {"n_out": -1}, {"remote_share": 1.5}):
        with pytest.raises(UsageError):
            plan_of(profile, tiny_catalog(), **options)
    profile.arrays["trace_ids"] = profile.arrays["trace_ids"][:0]
    with pytest.raises(ArtifactError, match="no routing of decode tokens"):
        plan_of(profile, tiny_catalog())


def test_utility_weighs_prefill_and_decode_by_the_lengths_asked_for(tmp_path: Path) -> None:
    """Experts 0 and 1 serve prompts, 2 and 3 serve generation: what is least used turns with the lengths."""
    profile = synthetic_profile(tmp_path)
    profile.arrays["prefill_counts"][:] = [45, 25, 6, 4]
    profile.arrays["trace_ids"][:] = [2, 3]
    long_prompt = plan_of(profile, tiny_catalog(), n_in=100, n_out=1, remote_share=0.5)
    long_answer = plan_of(profile, tiny_catalog(), n_in=1, n_out=100, remote_share=0.5)
    assert [layer.remote for layer in long_prompt.layers] == [(2, 3)] * 2
    assert [layer.remote for layer in long_answer.layers] == [(0, 1)] * 2


def test_lengths_default_to_the_medians_of_the_profile(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, prompts=5)
    profile.arrays["prompt_tokens"][:] = [10, 20, 30, 400, 500]
    profile.arrays["decode_tokens"][:] = [0, 0, 0, 9, 9]
    workload = plan_of(profile, tiny_catalog()).workload
    assert (workload.n_in, workload.n_out) == (30, 1)


def test_an_accelerator_takes_the_nonexpert_part_out_of_cpu_memory(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path, expert_mb=20, nonexpert_mb=200, hidden_size=2**18)  # 0.5 MB a hidden state
    for usd, needed_mb in ((0.0, 500 + 200 + 8 * 20 + 50 * 0.5 + 50 * 3 / 1024), (5e-5, 500 + 8 * 20 + 30 * 0.5)):
        for spare_mb, fits in ((1, True), (-1, False)):
            menu = [{"name": "only", "memory_mb": round(needed_mb) + spare_mb, "vcpus": 1.0}]
            catalog = tiny_catalog({"menu": menu, "usd_per_accelerator_gb_second": usd}, network_bytes_per_s=1e12)
            plan = plan_of(profile, catalog, n_in=20, n_out=30)
            assert ("all-local" in plan.baselines) == fits
            assert verify(plan, profile, catalog) == ()


def test_rows_for_people(recommended: Plan) -> None:
    plan = recommended
    rows = layer_rows(plan)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(len(row) == len(LAYER_COLUMNS) for row in rows)
    assert id_ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7, 8"
    lines = dict(summary_rows(plan))
    assert lines["verdict"] == "moving experts out: worth it"
    assert lines["cost"].startswith(f"${plan.cost_usd_per_request / 16 * 1e6:.3f} per million output tokens, $0.0000")
    assert lines["cost"].endswith(" a request of 40 prompt + 16 output tokens")
    assert isinstance(plan.outcome, Outcome)
    assert "all experts local" in [row[0] for row in baseline_rows(plan)]


def test_break_evens_in_one_line(recommended: Plan) -> None:
    def lines(plan: Plan, *at: float | None) -> list[str]:
        kinds = (ScenarioKind.CALL_OVERHEAD, ScenarioKind.FUNCTION_PRICE, ScenarioKind.EVEN_ROUTING)
        found = tuple(BreakEven(parameter=kind, against=BaselineName.ALL_LOCAL, at=one) for kind, one in zip(kinds, at, strict=False))
        return [text for name, text in summary_rows(plan.model_copy(update={"break_evens": found})) if name == "break-even"]

    assert lines(recommended) == []
    assert lines(recommended, 1.7, None, 0.25) == [
        "Remote experts and 'all experts local' cost the same at 1.7 times the call overhead, or if 25.0% of the tokens were routed evenly."
    ]
    everywhere = (
        "'all experts local' at call overheads and prices from 1/64 to 64 times today's, and even if all tokens used all experts equally."
    )
    assert lines(recommended, None, None, None) == [f"Robust: remote experts stay cheaper than {everywhere}"]
    dear = recommended.model_copy(update={"cost_usd_per_request": 1.0})
    assert lines(dear, None, None, None) == [f"Robust: remote experts stay dearer than {everywhere}"]
    none = recommended.model_copy(update={"layers": tuple(LayerPlan(layer=i, remote=(), memory_mb=0, replicas=1) for i in range(3))})
    assert lines(none, None, None, None) == [f"Robust: remote experts stay dearer than {everywhere}"]


def test_every_baseline_and_scenario_has_words(recommended: Plan) -> None:
    assert BASELINE_TITLES.keys() == set(BaselineName) and len(set(BASELINE_TITLES.values())) == len(BaselineName)
    outcome = recommended.outcome.model_dump()
    each = [Scenario(**outcome, kind=kind, value=0.5, planned_prompts=3, judged_prompts=2, meets=True) for kind in ScenarioKind]
    names = [name for name, _ in scenario_rows(recommended.model_copy(update={"scenarios": tuple(each)}))]
    assert len(set(names)) == len(ScenarioKind) and not any("-" in name for name in names)
