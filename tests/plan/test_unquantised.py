"""Beside the plan for a quantised checkpoint there is one for a copy that is not; whole models run where a server reads their format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.model.stored import StoredWeights
from remoe_cli.plan.assess.verdict import cheapest_rival
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import BaselineName, Basis, Plan
from remoe_cli.plan.explain.rows import alternative_texts, baseline_rows
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

MB = 2**20
PACKED = StoredWeights(format="MXFP4", expert_bytes=25 * MB, nonexpert_bytes=100 * MB, served=True, packed=True)
READY = PACKED.model_copy(update={"format": "FP8", "packed": False})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"), layers=2, experts=8, skew=3.0, expert_mb=95, main_vcpus=1)


def of(profile: Profile, stored: StoredWeights | None, described: bool = True) -> Profile:
    """The profile of a checkpoint that is stored like this, with times of a description."""
    spec = profile.record.spec.model_copy(update={"stored": stored})
    times = {"latency": latency_from("lambda", spec)} if described else {}
    return replace(profile, record=profile.record.model_copy(update={"spec": spec, **times}))


def catalog() -> Catalog:
    return tiny_catalog(memory_menu_mb=[128, 256, 512, 1024])


OPTIONS: dict[str, Any] = {"examine": True, "cold_share": 0.2, "solver": "scan"}


@pytest.mark.parametrize("stored", [PACKED, READY], ids=["packed", "ready"])
def test_it_is_the_plan_that_the_copy_has(made: Profile, stored: StoredWeights) -> None:
    plan, copy = plan_of(of(made, stored), catalog(), **OPTIONS), plan_of(of(made, None), catalog(), **OPTIONS)
    beside = plan.unquantised
    assert beside is not None and beside.dtype == "bfloat16" and any(layer.remote for layer in beside.layers)
    assert (beside.spec, beside.instances, beside.layers) == (copy.main.name, copy.instances, copy.layers)
    for name in ("cost_usd_per_request", "ttft_s", "tpot_s", "cold_start_s"):
        assert getattr(beside, name) == pytest.approx(getattr(copy, name), rel=1e-12)
    assert beside.cost_usd_per_request > plan.cost_usd_per_request and beside.cold_start_s > plan.cold_start_s
    assert verify(plan, of(made, stored), catalog()) == ()


def test_measured_times_of_functions_stay(made: Profile) -> None:
    """What a copy's functions would take is not known where the packed ones were measured."""
    plan = plan_of(of(made, PACKED, described=False), catalog(), **OPTIONS)
    copy = plan_of(of(made, None, described=False), catalog(), **OPTIONS)
    assert plan.unquantised is not None and plan.unquantised.tpot_s == copy.tpot_s
    assert verify(plan, of(made, PACKED, described=False), catalog()) == ()


ALTERED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    *((lambda copy, name=name: copy.update({name: copy[name] * 1.0001}), name) for name in ("ttft_s", "tpot_s", "cold_start_s")),
    (lambda copy: copy.update(cost_usd_per_request=copy["cost_usd_per_request"] * 0.999), "cost_usd_per_request"),
    (lambda copy: copy.update(dtype="float32"), "dtype"),
    (lambda copy: copy.update(spec="other"), "spec"),
    (lambda copy: copy.update(instances=2), "instances"),
    (lambda copy: copy["layers"][0].update(memory_mb=128), "layers[0].memory_mb"),
    (lambda copy: copy["layers"][0].update(remote=copy["layers"][0]["remote"][::-1]), "layers[0].remote"),
    (lambda copy: copy["layers"][0].update(timeout_s=1), "layers[0].timeout_s"),
]


@pytest.fixture(scope="module")
def planned(made: Profile) -> Plan:
    return plan_of(of(made, PACKED), catalog(), **OPTIONS)


@pytest.mark.parametrize(("alter", "field"), ALTERED)
def test_the_verifier_works_it_out_again(alter: Callable[[dict[str, Any]], Any], field: str, made: Profile, planned: Plan) -> None:
    data = planned.model_dump(mode="json")
    alter(data["unquantised"])
    found = {finding.field for finding in verify(Plan.model_validate(data), of(made, PACKED), catalog())}
    assert f"unquantised.{field}" in found


def test_only_the_planners_own_plan_of_a_quantised_checkpoint_has_it(made: Profile, planned: Plan) -> None:
    not_served = PACKED.model_copy(update={"served": False, "packed": False})
    for stored, options in ((None, {}), (not_served, {}), (PACKED, {"remote_share": 0.5, "solver": "exact"}), (PACKED, {"examine": False})):
        plan = plan_of(of(made, stored), catalog(), **OPTIONS | options)
        assert plan.unquantised is None and "unquantised" not in json.loads(plan.model_dump_json())
    plain = plan_of(of(made, None), catalog(), **OPTIONS)
    stated = plain.model_copy(update={"unquantised": planned.unquantised})
    assert "unquantised.dtype" in {finding.field for finding in verify(stated, of(made, None), catalog())}


def test_it_is_shown_among_the_alternatives(planned: Plan) -> None:
    assert planned.unquantised is not None
    name, _, _, _, spec, against = baseline_rows(planned)[0]
    assert (name, spec) == ("the same for a copy in bfloat16", planned.unquantised.spec) and against.endswith("less")
    sentence = next(alternative_texts(planned))
    copies, own = (sum(x.memory_mb * len(x.parts) * x.replicas for x in layers) for layers in (planned.unquantised.layers, planned.layers))
    assert f"functions have {copies:,} MB in all, not {own:,}, and a cold start takes" in sentence
    assert sentence.endswith("plan for that copy, of 1.8 GB.")
    without = planned.model_copy(update={"unquantised": None})
    assert len(baseline_rows(without)) == len(baseline_rows(planned)) - 1
    assert not any("a copy" in sentence for sentence in alternative_texts(without))  # perhaps nobody looked for it


def test_a_format_that_no_server_is_known_to_read_has_no_price_as_it_is_stored(made: Profile) -> None:
    odd = READY.model_copy(update={"format": "MXFP8"})
    plan = plan_of(of(made, odd), catalog(), requests_per_hour=20.0)
    assert not {BaselineName.STORED_CPU, BaselineName.STORED_GPU} & plan.baselines.keys()
    assert "computes from MXFP8 on the CPUs of 'lambda'" in plan.missing[BaselineName.STORED_CPU]
    assert "computes from MXFP8" in plan.missing[BaselineName.STORED_GPU].replace("compute from", "computes from")
    assert verify(plan, of(made, odd), catalog()) == ()
    known = plan_of(of(made, READY), catalog(), requests_per_hour=20.0)
    assert {BaselineName.STORED_CPU, BaselineName.STORED_GPU} <= known.baselines.keys()
    for name in (BaselineName.STORED_CPU, BaselineName.STORED_GPU):
        stated = plan.model_copy(update={"baselines": {**plan.baselines, name: known.baselines[name]}, "missing": {
            other: text for other, text in plan.missing.items() if other != name
        }})  # fmt: skip
        assert f"baselines.{name}" in {finding.field for finding in verify(stated, of(made, odd), catalog())}


@pytest.mark.parametrize(
    ("tpot_s", "wins", "said"),
    [
        (None, BaselineName.STORED_CPU, "The whole model, quantised as it is stored, on CPUs, lambda-6144, is cheaper: "),
        (0.02, BaselineName.STORED_GPU, "The whole model, quantised as it is stored, on a GPU, ml.g4dn.xlarge, is cheaper: "),
    ],
)
def test_a_small_quantised_model_is_cheaper_whole_and_the_verdict_says_so(
    tpot_s: float | None, wins: BaselineName, said: str, tmp_path: Path
) -> None:
    """20 GB in bfloat16, 5 GB as it is stored: one large function holds that, and so does the smallest GPU."""
    whole = synthetic_profile(tmp_path, layers=8, experts=16, skew=0.2, expert_mb=150, nonexpert_mb=300)
    stored = StoredWeights(format="MXFP4", expert_bytes=38 * MB, nonexpert_bytes=250 * MB, served=True, packed=True)
    aws = read_catalog("aws-us-east-1")
    plan = plan_of(of(whole, stored), aws, requests_per_hour=600.0, solver="scan", n_in=100, n_out=100, tpot_s=tpot_s)
    assert plan.basis == Basis.DEARER_THAN_WHOLE_MODEL and plan.verdict == "not-recommended"
    assert cheapest_rival(plan.baselines) == wins and plan.reason.startswith(said)
    assert verify(plan, of(whole, stored), aws) == ()
