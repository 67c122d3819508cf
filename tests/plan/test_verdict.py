"""The verdict: what it is based on, the sentence that says so, and that nothing compares the sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import InfeasibleError
from remoe_cli.plan.assess.verdict import VERDICTS
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import BaselineName, Basis, Plan
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

# Remote experts pay: most are hardly used, and memory beyond the measured vCPUs brings no speed.
PAYS: dict[str, Any] = {"layers": 3, "experts": 8, "skew": 3.0, "expert_mb": 100, "main_vcpus": 1, "remote_expert": (1e-4, 1e-5)}
# They cannot pay: they are small.
SMALL: dict[str, Any] = {"layers": 3, "experts": 4, "skew": 2.0, "expert_mb": 2}

# To change what `remoe plan` says: its sentence is in remoe_cli/plan/assess/verdict.py and here. "#" stands for a figure.
REMOTE_EXPERT = (
    "In a million requests, moving one expert out saves # of main memory; its calls cost at least # "
    "(the cheapest: layer #, used by # of decode tokens), and each call takes time."
)
SENTENCES = {
    Basis.TOO_FEW_TOKENS: "The profile traced # decode tokens; at least # are needed to tell how often experts are used.",
    Basis.MISSES_TARGET: "It misses a target: its TTFT is # s, its TPOT # s, its cost # a request.",
    Basis.NOTHING_ELSE_FITS: (
        "All experts local need a main function of # MB, but the largest has # MB. This plan costs # per million output tokens."
    ),
    Basis.OTHERS_MISS_TARGETS: (
        "With all experts local, no main function meets the targets (on m3328: TTFT # s, TPOT # s, # a request). "
        "This plan costs # per million output tokens."
    ),
    Basis.CHEAPER: (
        "It costs # instead of # per million output tokens for all experts local on m3328, the best alternative: # less. "
        "An answer of # tokens takes # s instead of # s."
    ),
    Basis.DEPENDS_ON_TRAFFIC: (
        "Below # requests an hour it costs less than an always-on g4dn.xlarge with the whole model on a GPU, which costs # a month however "
        "many requests come; above, rent that. An answer of # tokens takes # s warm, # s where nothing is, instead of # s. Give "
        "--requests-per-hour for the cost of a month."
    ),
    Basis.DEARER_THAN_WHOLE_MODEL: (
        "The whole model on a GPU, g4dn.xlarge, is cheaper: # instead of # a month. An answer of # tokens takes # s instead of # s."
    ),
    Basis.DEARER_THAN_ALL_LOCAL: (
        f"With # experts remote, it costs # per million output tokens, # more than all experts local on m3328 (#). {REMOTE_EXPERT}"
    ),
    Basis.ALL_LOCAL_IS_CHEAPEST: (
        f"Keeping all experts local, on m3328, is the cheapest plan: # per million output tokens. {REMOTE_EXPERT}"
    ),
}


def menu(largest_mb: int = 4096) -> dict[str, Any]:
    return {"menu": [{"name": f"m{mb}", "memory_mb": mb, "vcpus": mb / 1769} for mb in range(768, largest_mb + 1, 512)]}


def gpus(catalog: Catalog, usd_per_hour: float | None) -> Catalog:
    """The catalog with GPUs at that price, or without any."""
    prices = () if usd_per_hour is None else (catalog.reference.gpus[0].model_copy(update={"usd_per_hour": usd_per_hour}),)
    return catalog.model_copy(update={"reference": catalog.reference.model_copy(update={"gpus": prices})})


def too_few_tokens(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, prompts=9, decode_tokens=22), tiny_catalog()
    return plan_of(profile, catalog), profile, catalog


def misses_target(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), tiny_catalog(menu())
    best = plan_of(profile, catalog)
    (tmp_path / "given.json").write_text(best.model_dump_json())
    return plan_of(profile, catalog, placement_file=tmp_path / "given.json", tpot_s=best.tpot_s * 0.99), profile, catalog


def nothing_else_fits(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), gpus(tiny_catalog(menu(2304)), None)
    return plan_of(profile, catalog), profile, catalog


def others_miss_targets(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), tiny_catalog(menu())
    usd = plan_of(profile, catalog).cost_usd_per_request
    return plan_of(profile, catalog, budget_usd=usd * 1.001), profile, catalog


def cheaper(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), tiny_catalog(menu())
    return plan_of(profile, catalog, examine=True), profile, catalog


def dearer_than_whole_model(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), gpus(tiny_catalog(menu()), 1e-6)
    return plan_of(profile, catalog, requests_per_hour=20.0), profile, catalog


def depends_on_traffic(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), gpus(tiny_catalog(menu()), 1e-3)
    return plan_of(profile, catalog), profile, catalog


def dearer_than_all_local(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **SMALL), tiny_catalog(menu())
    return plan_of(profile, catalog, remote_share=0.5), profile, catalog


def all_local_is_cheapest(tmp_path: Path) -> tuple[Plan, Profile, Catalog]:
    profile, catalog = synthetic_profile(tmp_path, **SMALL), tiny_catalog(menu())
    return plan_of(profile, catalog), profile, catalog


CASES: dict[Basis, Callable[[Path], tuple[Plan, Profile, Catalog]]] = {
    Basis.TOO_FEW_TOKENS: too_few_tokens,
    Basis.MISSES_TARGET: misses_target,
    Basis.NOTHING_ELSE_FITS: nothing_else_fits,
    Basis.OTHERS_MISS_TARGETS: others_miss_targets,
    Basis.CHEAPER: cheaper,
    Basis.DEPENDS_ON_TRAFFIC: depends_on_traffic,
    Basis.DEARER_THAN_WHOLE_MODEL: dearer_than_whole_model,
    Basis.DEARER_THAN_ALL_LOCAL: dearer_than_all_local,
    Basis.ALL_LOCAL_IS_CHEAPEST: all_local_is_cheapest,
}


@pytest.mark.parametrize("basis", Basis)
def test_the_wording_of_each_verdict(basis: Basis, tmp_path: Path) -> None:
    plan, *_ = CASES[basis](tmp_path)
    assert plan.basis == basis
    assert re.sub(r"\$?\b\d+(?:[.,]\d+)*(?:e[+-]?\d+)?%?", "#", plan.reason) == SENTENCES[basis]


@pytest.mark.sweep
@pytest.mark.parametrize("basis", Basis)
def test_the_verifier_agrees_and_names_another_basis_or_verdict(basis: Basis, tmp_path: Path) -> None:
    plan, profile, catalog = CASES[basis](tmp_path)
    assert plan.verdict == VERDICTS[basis] and verify(plan, profile, catalog) == ()
    for other in set(Basis) - {basis}:
        assert "basis" in {finding.field for finding in verify(plan.model_copy(update={"basis": other}), profile, catalog)}
    for verdict in set(VERDICTS.values()) - {plan.verdict}:
        assert "verdict" in {finding.field for finding in verify(plan.model_copy(update={"verdict": verdict}), profile, catalog)}


def test_a_stored_plan_whose_every_sentence_was_reworded_still_verifies(tmp_path: Path) -> None:
    plan, profile, catalog = nothing_else_fits(tmp_path / "a")
    examined, *rest = cheaper(tmp_path / "b")
    for made, *inputs in ((plan, profile, catalog), (examined, *rest)):
        data = json.loads(made.model_dump_json())
        sentences = [path for path, text in texts(data) if " " in text]
        assert ("reason",) in sentences and any(path[0] in ("notes", "missing") for path in sentences)
        for path in sentences:
            put(data, path, "In other words.")
        reworded = Plan.model_validate(data)
        assert reworded != made and verify(reworded, *inputs) == ()


def texts(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], str]]:
    """Every string of a JSON document, and where it is."""
    if isinstance(data, str):
        return [(path, data)]
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in inside for found in texts(value, (*path, key))]


def put(data: Any, path: tuple[Any, ...], text: str) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = text


# What the sentences say is so


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_the_saving_in_the_sentence_is_that_of_the_figures(tmp_path: Path) -> None:
    plan, *_ = cheaper(tmp_path)
    saving = 1 - plan.cost_usd_per_request / plan.baselines["all-local"].cost_usd_per_request  # type: ignore[index]
    assert number(plan.reason, r"alternative: ([\d.]+)% less") == pytest.approx(100 * saving, abs=0.05)


def test_a_remote_expert_saves_less_than_it_costs_where_none_is_remote(tmp_path: Path) -> None:
    plan, *_ = all_local_is_cheapest(tmp_path)
    saved = number(plan.reason, r"saves \$([\d.]+) of main memory")
    assert saved < number(plan.reason, r"calls cost at least \$([\d.]+) ")


def test_too_few_tokens_are_counted(tmp_path: Path) -> None:
    assert "198 decode tokens" in too_few_tokens(tmp_path)[0].reason


def test_all_experts_local_by_order_are_not_called_the_cheapest(tmp_path: Path) -> None:
    """Remote experts would pay here; --remote-share 0 keeps them local."""
    profile, catalog = synthetic_profile(tmp_path, **PAYS), tiny_catalog(menu())
    free, forced = plan_of(profile, catalog), plan_of(profile, catalog, remote_share=0.0)
    assert free.cost_usd_per_request < forced.cost_usd_per_request
    assert "cheapest" not in forced.reason and "because you asked for that" in forced.reason


def test_an_equally_dear_alternative_that_is_faster_is_named(tmp_path: Path) -> None:
    """The whole model on the GPU of the same instance costs the same hours and answers sooner."""
    profile, catalog = synthetic_profile(tmp_path, **SMALL), read_catalog("aws-us-east-1")
    rented = tuple(spec for spec in catalog.main.menu if spec.name == "ml.g4dn.xlarge")
    only = catalog.model_copy(update={"main": catalog.main.model_copy(update={"menu": rented})})
    plan = plan_of(profile, only, requests_per_hour=20.0)
    gpu = plan.baselines[BaselineName.GPU]
    assert plan.basis == "all-local-is-cheapest" and plan.cost_usd_per_request == pytest.approx(gpu.cost_usd_per_request)
    assert "The whole model on a GPU, ml.g4dn.xlarge, costs the same and is faster." in plan.reason
    assert not any("cold start" in note for note in plan.notes)  # nothing of an always-on instance is cold


def test_a_plan_repeats_what_its_profile_warns_of(tmp_path: Path) -> None:
    """Who plans may not be who profiled, or has forgotten what was printed then."""
    profile = synthetic_profile(tmp_path, **SMALL)
    local = profile.record.latency.local_expert.model_copy(update={"held_out_error": 0.4})
    latency = profile.record.latency.model_copy(update={"local_expert": local})
    rough = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    (warning,) = latency.warnings
    assert warning in plan_of(rough, tiny_catalog()).notes and warning not in plan_of(profile, tiny_catalog()).notes


def test_cores_that_nobody_pays_for_are_told(tmp_path: Path) -> None:
    """The twin's main function has all cores of the machine at the price of its memory alone; Lambda sells cores with memory."""
    profile, local = synthetic_profile(tmp_path, main_vcpus=4, **SMALL), read_catalog("local")
    cheap = plan_of(profile, local)
    (note,) = (note for note in cheap.notes if "cores" in note)
    assert note.startswith(
        f"{cheap.main.name} has all 4 cores of the profile's machine, and is billed for {cheap.main.memory_mb:,} MB alone."
    )
    assert note.endswith(f"come with 7,076 MB, whose time costs {7076 / cheap.main.memory_mb:.1f} times as much.")
    assert not any("cores" in note for note in plan_of(profile, tiny_catalog()).notes)  # its menu says how many vCPUs each has


def test_without_traffic_what_is_rented_is_named_where_nothing_paid_by_use_is_fast_enough(tmp_path: Path) -> None:
    profile, catalog = synthetic_profile(tmp_path, **PAYS), read_catalog("aws-us-east-1")
    with pytest.raises(InfeasibleError, match="No plan that is paid by use meets a TPOT") as raised:
        plan_of(profile, catalog, tpot_s=1e-6)
    assert "With --requests-per-hour, main functions that are rented" in raised.value.hint
    with pytest.raises(InfeasibleError, match="No plan meets a TPOT"):
        plan_of(profile, catalog, tpot_s=1e-6, requests_per_hour=20.0)
