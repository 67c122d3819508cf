"""From a plan made by hand to answers on the twin: layers divided over functions, and over replicas as the planner divides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy import main_share
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.plan import remote_side
from remoe_cli.plan.catalog import Catalog, read_catalog
from remoe_cli.plan.document import LayerPlan, Source
from remoe_cli.profile.latency_record import Curve, Exponential, Physical, Quota, Roofline
from remoe_cli.profile.record import ModelRef, Profile, write_profile
from remoe_cli.runtime.dispatch import divide
from remoe_cli.runtime.server_config import ServerConfig
from tests.families import VOCAB_SIZE, save
from tests.synthetic import plan_by_hand, synthetic_profile

LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 3, 5, 6, 7), memory_mb=1769, replicas=1, functions=((1, 7), (2, 5), (3, 6))),
    LayerPlan(layer=1, remote=(1, 3, 4, 6), memory_mb=1769, replicas=2),
)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Catalog, PreTrainedModel]:
    """A mixtral checkpoint with a tokenizer, a profile of it, and a plan that no planner made, taken for verified."""
    model = save("mixtral", torch.float32, tmp_path / "model", fused=False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    found = find(str(tmp_path / "model"))
    synthetic = synthetic_profile(tmp_path / "synthetic", experts=8)
    update = {"model": ModelRef(path=found.name, revision=found.revision), "spec": read_spec(found)}
    profile = write_profile(tmp_path / "profile", synthetic.record.model_copy(update=update), synthetic.arrays)
    catalog = read_catalog("local")
    plan = plan_by_hand(
        LAYERS, profile=Source(path=str(profile.path), sha256=profile.sha256), catalog=catalog.file, main=catalog.main.menu[0]
    )
    write_json(tmp_path / "plan.json", plan)
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(target, "read_inputs", lambda path: (plan, profile, catalog))
    return catalog, model


def test_a_deployment_with_a_divided_layer_answers_as_transformers_does(inputs: tuple[Catalog, PreTrainedModel], tmp_path: Path) -> None:
    catalog, model = inputs
    status = target.deploy(tmp_path / "plan.json", "d", rtt_ms=0, say=lambda _: None, progress=lambda done, total: None)
    try:
        assert [f["name"] for f in status["functions"]] == ["d-layer-000-0", "d-layer-000-1", "d-layer-000-2", "d-layer-001"]
        assert status["main"]["local_experts"] == 2 + 4
        served = read_json(lifecycle.state_dir("d") / "server.json", ServerConfig)
        # 3e-4 s an expert and 2e-4 s a row (tests/synthetic.py)
        assert [f.expert_rows for f in served.functions] == pytest.approx([1.5] * 4)
        assert served.prices.main_usd_per_gb_second == catalog.main.usd_per_gb_second[catalog.architecture]
        assert served.prices.function_usd_per_gb_second == catalog.function.usd_per_gb_second[catalog.architecture]
        prompt = list(range(1, 21))
        answer = _ask(status["main"]["port"], prompt)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole: Any = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert answer["token_ids"] == whole[0, 20:].tolist()
        assert {f["name"] for f in answer["receipt"]["functions"]} == {f["name"] for f in status["functions"]}
        # A prompt and 15 tokens: at most one invocation of a function a pass, and of its second replica for the prompt.
        assert all(0 < f["invocations"] <= 16 + (f["name"] == "d-layer-001") for f in answer["receipt"]["functions"])
        assert answer["receipt"]["retries"] == 0
    finally:
        lifecycle.destroy("d")


def _ask(port: int, prompt: list[int]) -> dict[str, Any]:
    request = {"prompt_token_ids": prompt, "max_new_tokens": 16}
    response = httpx.post(f"http://127.0.0.1:{port}/invocations", json=request, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


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
        (Quota(fixed_s=1e-3, per_token_s=5e-5, period_s=0.02), 20),
        (Quota(fixed_s=0.0, per_token_s=5e-5, period_s=0.02), 0),
        (Quota(fixed_s=1.0, per_token_s=1e-9, period_s=0.02), 1e6),
        (Quota(fixed_s=1e-3, per_token_s=0.0, period_s=0.02), 1e6),
        (Exponential(th1_s=1e-3, th2=1.0, th3_s=1e-3, per_token=0.02), 49),
        (Exponential(th1_s=1e-3, th2=1.0, th3_s=1e-3, per_token=1.5), 0),
        (Roofline(overhead_s=0.0, weights_s=1e-3, per_token_s=1e-6, saturation_vcpus=6.0), 1e6),
    ],
)
def test_what_an_expert_costs_in_rows(curve: Curve, expected: float, tmp_path: Path) -> None:
    assert main_share._expert_rows(_timed(synthetic_profile(tmp_path), curve)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return synthetic_profile(tmp_path_factory.mktemp("profile"))


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(16, 300), min_size=3, max_size=20), replicas=st.integers(1, 3), fixed=st.integers(0, 300))
def test_replicas_share_work_as_the_planner_reckons(counts: list[int], replicas: int, fixed: int, profile: Profile) -> None:
    """Seconds are multiples of a power of two, so that ties are ties in both."""
    curve = Quota(fixed_s=fixed / 2**16, per_token_s=1 / 2**16, period_s=0.02)
    batches = divide(
        {e: np.zeros((n, 4), np.float32) for e, n in enumerate(counts)},
        "float32",
        replicas,
        main_share._expert_rows(_timed(profile, curve)),
    )
    at = remote_side.lpt(curve.work_s(counts, 1.0), np.ones((1, len(counts)), dtype=bool), replicas)
    assert [b.experts for b in batches] == [tuple(np.flatnonzero(at[0] == replica)) for replica in range(replicas)]
