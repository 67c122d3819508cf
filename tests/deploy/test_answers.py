"""From a plan made by hand to answers on the twin: layers divided over functions, and over replicas as the planner divides them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.artifacts import read_json
from remoe_cli.deploy import main_files
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import ArtifactError, DeployError, UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import LayerPlan, Outcome, Served
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import PlanRequest, inputs_of, make_problem, problem_of
from remoe_cli.plan.solve.columns import fewest_functions
from remoe_cli.profile.latency_record import CpuQuota, Curve, Exponential, Physical, Roofline
from remoe_cli.profile.record import ModelRef, Profile, write_profile
from remoe_cli.runtime import client
from remoe_cli.runtime.dispatch import divide
from remoe_cli.runtime.expected_cost import cost_model
from remoe_cli.runtime.invoke import make_caller
from remoe_cli.runtime.load_main import load_here
from remoe_cli.runtime.main_function import Request
from remoe_cli.runtime.server_config import ServerConfig
from tests.support import other_user
from tests.support.by_hand import PROMPT, ByHand, by_hand, on_twin
from tests.support.synthetic import plan_of, synthetic_profile

HERE = target.LocalTarget(SILENT)
LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 3, 5, 6, 7), memory_mb=1769, replicas=1, functions=((1, 7), (2, 5), (3, 6))),
    LayerPlan(layer=1, remote=(1, 3, 4, 6), memory_mb=1769, replicas=2),
)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    """A deployment that no planner made; nothing of it outlives the test."""
    with on_twin(by_hand(tmp_path, LAYERS), tmp_path, monkeypatch) as made:
        yield made


def once(line: dict[str, Any]) -> int:
    """Invocations of a receipt's line without second ones, which calls get that take long on a busy machine."""
    invocations: int = line["invocations"] - line.get("hedges", 0)
    return invocations


def test_a_deployment_with_a_divided_layer_answers_as_transformers_does(inputs: ByHand) -> None:
    status = HERE.deploy(inputs.plan_path, "d", DeployOptions(speculate=4))
    assert [f["name"] for f in status["functions"]] == ["d-layer-000-0", "d-layer-000-1", "d-layer-000-2", "d-layer-001"]
    assert status["main"]["local_experts"] == 2 + 4
    served = read_json(lifecycle.state_dir("d") / "server.json", ServerConfig)
    assert served.speculate == status["main"]["speculate"] == 4
    # 3e-4 s an expert and 2e-4 s a row (tests/support/synthetic.py)
    assert [f.expert_rows for f in served.functions] == pytest.approx([1.5] * 4)
    catalog = inputs.catalog
    main_gb = inputs.plan.main.memory_mb / 1024
    assert served.prices.main.usd_per_s == pytest.approx(main_gb * catalog.main.usd_per_gb_second[catalog.architecture])
    assert served.prices.function.usd_per_gb_second == catalog.function.usd_per_gb_second[catalog.architecture]
    assert set(served.prices.storage_mb) == {f["name"] for f in status["functions"]}
    answer = client.answer(HERE.main_address("d"), PROMPT, 16, lambda text: None)
    assert answer["token_ids"] == inputs.tokens()
    assert {f["name"] for f in answer["receipt"]["functions"]} == {f["name"] for f in status["functions"]}
    # A prompt and 15 tokens: at most one invocation of a function a pass, and of its second replica for the prompt.
    assert all(0 < once(f) <= 16 + (f["name"] == "d-layer-001") for f in answer["receipt"]["functions"])
    assert answer["receipt"]["retries"] == 0
    assert (
        answer["receipt"]["main"]["device"] == HERE.status("d")["main"]["device"] and answer["receipt"]["main"]["device"]["kind"] == "cpu"
    )
    port = status["main"]["port"]  # for any HTTP client of this user
    asked = {"prompt": PROMPT, "max_new_tokens": 16}
    document = httpx.post(f"http://127.0.0.1:{port}/invocations", json=asked, trust_env=False, timeout=60).json()
    assert document["token_ids"] == inputs.tokens()
    assert document["receipt"]["predicted"] == answer["receipt"]["predicted"], "whoever asks gets it"
    twice = httpx.post(f"http://127.0.0.1:{port}/invocations", json=asked | {"n": 2}, trust_env=False, timeout=60).json()["receipt"]
    both = cost_model(inputs.plan, inputs.profile, inputs.catalog)(20, 15, 15)
    assert Outcome(**twice["predicted"]) == both
    served_here = load_here(lifecycle.state_dir("d") / "server.json", partial(make_caller, status["endpoint"]), cache_experts=True)
    cache = served_here.engine.dispatcher.cache
    assert not served.cache_experts and cache is not None and cache.room == served.spare_experts > 0
    for _ in range(3):
        here = served_here.answer(Request(prompt=PROMPT, max_new_tokens=16))
        assert list(here.token_ids) == inputs.tokens()
        cache.settle()
    assert here.receipt.saved_calls and served_here.state().cached_experts == len(cache.held)
    served_here.engine.dispatcher.caller.client.close()
    # Five tokens of a pass share one call of each function.
    again = asked | {"logit_bias": {"5": 100}}
    repeated = httpx.post(f"http://127.0.0.1:{port}/invocations", json=again, trust_env=False, timeout=60).json()
    receipt = repeated["receipt"]
    assert repeated["token_ids"] == [5] * 16 and receipt["accepted_tokens"] == receipt["draft_tokens"] > 8
    assert all(once(f) <= 16 - receipt["accepted_tokens"] + (f["name"] == "d-layer-001") for f in receipt["functions"])
    if other_user.can_run():
        assert other_user.ask(port, "POST", "/invocations", json.dumps(asked))[0] == 403
    problem = make_problem(inputs.profile, catalog, PlanRequest(n_in=20, n_out=15))
    outcome, predicted = evaluate(problem, Placement(inputs.plan.main, LAYERS)), Outcome(**answer["receipt"]["predicted"])
    assert predicted.model_dump() == pytest.approx(outcome.model_dump(), rel=1e-12)


def test_layers_with_more_functions_than_memory_needs_answer_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand(tmp_path, LAYERS)
    plan = plan_of(made.profile, made.catalog, remote_share=0.75, objective="tpot")
    problem = problem_of(plan, made.profile, made.catalog)
    assert all(len(layer.functions) > fewest_functions(problem, at, layer) == 1 for at, layer in enumerate(plan.layers))
    with on_twin(replace(made, plan=plan), tmp_path, monkeypatch) as inputs:
        status = HERE.deploy(inputs.plan_path, "d", DeployOptions())
        assert len(status["functions"]) == sum(len(layer.functions) for layer in plan.layers)
        answer = client.answer(HERE.main_address("d"), PROMPT, 16, lambda text: None)
        assert answer["token_ids"] == inputs.tokens()
        assert {f["name"] for f in answer["receipt"]["functions"]} == {f["name"] for f in status["functions"]}


def test_a_request_that_the_plan_does_not_cover_is_refused_before_it_costs_anything(
    inputs: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = inputs.plan.workload.model_copy(update={"served": Served(cover=0.99, share=0.99, tokens=30, n_in=20, n_out=15)})
    plan = inputs.plan.model_copy(update={"workload": workload})
    monkeypatch.setattr(target, "read_inputs", lambda path: (plan, inputs.profile, inputs.catalog))
    HERE.deploy(inputs.plan_path, "short", DeployOptions())
    address = HERE.main_address("short")
    billed_ms = [function["billed_ms"] for function in HERE.status("short")["functions"]]
    with pytest.raises(UsageError, match=r"up to 31 tokens in all, with prompts of up to 20 and up to 16 new ones"):
        client.answer(address, PROMPT, 64, lambda text: None)
    assert [function["billed_ms"] for function in HERE.status("short")["functions"]] == billed_ms
    assert client.answer(address, PROMPT, 4, lambda text: None)["token_ids"] == inputs.tokens()[:4]


def test_a_profile_that_is_not_the_plans_is_refused(inputs: ByHand) -> None:
    write_profile(inputs.profile.path, inputs.profile.record.model_copy(update={"settings": None}), inputs.profile.arrays)
    with pytest.raises(ArtifactError, match=f"The profile {inputs.profile.path} has changed since the plan {inputs.plan_path} was made"):
        inputs_of(inputs.plan_path)


def test_a_main_server_that_cannot_start_says_why_and_leaves_nothing(
    inputs: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model had no tokenizer when it was profiled."""
    for file in (tmp_path / "model").glob("tokenizer*.json"):  # all of it: packaging finds a tokenizer that is broken
        file.unlink()
    found = find(str(tmp_path / "model"))
    record = inputs.profile.record.model_copy(update={"model": ModelRef(path=found.name, revision=found.revision)})
    profile = Profile(inputs.profile.path, record, inputs.profile.arrays)
    monkeypatch.setattr(target, "read_inputs", lambda path: (inputs.plan, profile, inputs.catalog))
    with pytest.raises(DeployError, match=re.escape(f"The tokenizer of {tmp_path / 'model'} cannot be loaded")) as raised:
        HERE.deploy(inputs.plan_path, "mute", DeployOptions())
    assert "Traceback" not in raised.value.message and "Fatal" not in raised.value.message
    assert not lifecycle.state_dir("mute").exists()


def _timed(profile: Profile, curve: Curve) -> Profile:
    """The profile with another curve of the function's experts."""
    latency = profile.record.latency
    timing = latency.remote_expert.model_copy(update={"curve": curve})
    changed = latency.model_copy(update={"remote_expert": timing})
    return Profile(profile.path, profile.record.model_copy(update={"latency": changed}), profile.arrays)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (Physical(overhead_s=1e-4, weights_s=3e-4, per_token_s=1e-5), 40),
        (CpuQuota(fixed_s=1e-3, per_token_s=5e-5, period_s=0.02), 20),
        (CpuQuota(fixed_s=0.0, per_token_s=5e-5, period_s=0.02), 0),
        (CpuQuota(fixed_s=1.0, per_token_s=1e-9, period_s=0.02), 1e6),
        (CpuQuota(fixed_s=1e-3, per_token_s=0.0, period_s=0.02), 1e6),
        (Exponential(th1_s=1e-3, th2=1.0, th3_s=1e-3, per_token=0.02), 49),
        (Exponential(th1_s=1e-3, th2=1.0, th3_s=1e-3, per_token=1.5), 0),
        (Roofline(overhead_s=0.0, weights_s=1e-3, per_token_s=1e-6, saturation_vcpus=6.0), 1e6),
    ],
)
def test_what_an_expert_costs_in_rows(curve: Curve, expected: float, tmp_path: Path) -> None:
    assert main_files._expert_rows(_timed(synthetic_profile(tmp_path), curve)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"))


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(16, 300), min_size=3, max_size=20), replicas=st.integers(1, 3), fixed=st.integers(0, 300))
def test_replicas_share_work_as_the_planner_reckons(counts: list[int], replicas: int, fixed: int, profile: Profile) -> None:
    """Seconds are multiples of a power of two, so that ties are ties in both."""
    curve = CpuQuota(fixed_s=fixed / 2**16, per_token_s=1 / 2**16, period_s=0.02)
    batches = divide(
        {e: np.zeros((n, 4), np.float32) for e, n in enumerate(counts)},
        "float32",
        replicas,
        main_files._expert_rows(_timed(profile, curve)),
    )
    at = expert_functions.lpt(curve.work_s(counts, 1.0), np.ones((1, len(counts)), dtype=bool), replicas)
    assert [b.experts for b in batches] == [tuple(np.flatnonzero(at[0] == replica)) for replica in range(replicas)]
