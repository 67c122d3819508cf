"""Plans for predicted prompts: the mixture of recorded prompts that stands for a prediction, and `remoe plan --data`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.model.checkpoint import find
from remoe_cli.model.vectors import prompt_features
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import Plan, PredictedRouting, ScenarioKind, Source
from remoe_cli.plan.problem.predicted import predict_routing
from remoe_cli.plan.problem.problem import Placement
from remoe_cli.plan.problem.request import PlanRequest, inputs_of, make_problem
from remoe_cli.plan.verify.check import verify
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.mixture import LARGEST, mixture
from remoe_cli.predict.train import train
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import ModelRef, Profile, write_profile
from remoe_cli.runtime.expected_cost import cost_model
from tests.profile.test_run import WORDS, save_checkpoint
from tests.support import forked
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

TOPICS, PROMPTS, LAYERS, EXPERTS, TOP_K, TOKENS = 3, 60, 2, 4, 2, 20
LIKED = ({0, 1}, {2, 3}, {1, 2})  # experts that most tokens of a topic use


def texts(topic: int, prompts: int, seed: int) -> tuple[str, ...]:
    """Prompts of ten words from the topic's third of the vocabulary."""
    random, third = np.random.default_rng(seed), len(WORDS) // TOPICS
    return tuple(" ".join(random.choice(WORDS[topic * third :][:third], 10)) for _ in range(prompts))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Prompts of three topics in turn; a prompt's words decide which experts its tokens use."""
    folder = tmp_path_factory.mktemp("profile")
    base = synthetic_profile(folder / "base", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, prompts=PROMPTS, expert_mb=90)
    random = np.random.default_rng(1)
    logits = np.array([[3.0 if expert in LIKED[i % TOPICS] else 0.0 for expert in range(EXPERTS)] for i in range(PROMPTS)])
    draws = logits[:, None, None] + random.gumbel(size=(PROMPTS, 2 * TOKENS, LAYERS, EXPERTS))
    chosen = np.argsort(-draws, axis=3)[..., :TOP_K]
    used = (chosen[..., None] == np.arange(EXPERTS)).any(axis=3)
    checkpoint = find(str(save_checkpoint(folder / "model")))
    by_topic = [texts(topic, PROMPTS // TOPICS, topic) for topic in range(TOPICS)]
    arrays = base.arrays | {
        "prefill_counts": used[:, :TOKENS].sum(axis=1, dtype=np.int32),
        "decode_counts": used[:, TOKENS:].sum(axis=1, dtype=np.int32),
        "prompt_tokens": np.full(PROMPTS, TOKENS, dtype=np.int32),
        "decode_tokens": np.full(PROMPTS, TOKENS, dtype=np.int32),
        "trace_ids": chosen[:, TOKENS:].reshape(-1, LAYERS, TOP_K).astype(np.int16),
        "trace_prompt": np.repeat(np.arange(PROMPTS, dtype=np.int32), TOKENS),
        **prompt_features(checkpoint, [by_topic[i % TOPICS][i // TOPICS] for i in range(PROMPTS)], None),
    }
    model = ModelRef(path=checkpoint.name, revision=checkpoint.revision)
    made = write_profile(folder / "profile", base.record.model_copy(update={"model": model}), arrays)
    train(made)
    return made


def mixed(recorded: tuple[int, ...], weights: tuple[int, ...]) -> PredictedRouting:
    source = Source(path="prompts.txt", sha256="0" * 64)
    return PredictedRouting(
        prompts=source, count=1, predictor="SPS", validation_bits=0.1, mixture_bits=0.01, recorded=recorded, weights=weights
    )


def test_a_mixture_is_found_again() -> None:
    frequencies = np.random.default_rng(0).dirichlet(np.full(16, 0.3), size=(30, 4))
    recorded, shares, left = mixture(0.7 * frequencies[4] + 0.3 * frequencies[9], frequencies)
    assert {int(p): round(float(s), 2) for p, s in zip(recorded, shares, strict=True) if s > 0.005} == {4: 0.7, 9: 0.3}
    assert left < 1e-4
    # What no mixture reaches is approached: no single prompt is nearer.
    other = np.random.default_rng(1).dirichlet(np.full(16, 0.3), size=4)
    assert mixture(other, frequencies)[2] < jensen_shannon(frequencies, other).mean(axis=1).min()


def test_a_mixture_of_many_prompts_is_cut_to_the_largest_shares() -> None:
    frequencies = np.random.default_rng(0).dirichlet(np.full(8, 0.5), size=(LARGEST + 100, 2))
    recorded, shares, left = mixture(frequencies.mean(axis=0), frequencies)
    assert len(recorded) == LARGEST and (np.diff(recorded) > 0).all() and shares.sum() == pytest.approx(1)
    assert left < 1e-3


def test_a_weight_is_how_often_a_prompt_occurs(profile: Profile, tmp_path: Path) -> None:
    """All prompts here are equally long, so a profile that repeats them has the mixture for its mean."""
    rows, routing = np.array([3, 3, 7, 7, 7, 11]), mixed((3, 7, 11), (20, 30, 10))
    tokens = np.concatenate([np.flatnonzero(profile.arrays["trace_prompt"] == row) for row in rows])
    taken = {name: profile.arrays[name][rows] for name in ("prefill_counts", "decode_counts", "prompt_tokens", "decode_tokens")}
    trace = {"trace_ids": profile.arrays["trace_ids"][tokens], "trace_prompt": np.repeat(np.arange(6, dtype=np.int32), TOKENS)}
    none = {"prompt_vectors": np.zeros((6, 0), dtype=np.float32), "bag_sizes": np.zeros(6, dtype=np.int32)}
    none |= {name: np.zeros(0, dtype=np.int32) for name in ("bag_tokens", "bag_counts")}
    repeated = write_profile(tmp_path / "repeated", profile.record, profile.arrays | taken | trace | none)
    catalog = tiny_catalog()
    for options in ({"remote_share": 0.5}, {"solver": "scan"}, {"solver": "paper"}):
        plain, weighed = plan_of(repeated, catalog, **options), plan_of(profile, catalog, routing=routing, **options)
        assert weighed.layers == plain.layers
        assert weighed.outcome.model_dump() == pytest.approx(plain.outcome.model_dump(), rel=1e-12)
        assert verify(weighed, profile, catalog) == ()


def test_experts_that_the_prompts_will_use_stay_local(profile: Profile) -> None:
    catalog = tiny_catalog()
    mean = plan_of(profile, catalog, remote_share=0.5)
    for topic in range(TOPICS):
        routing = predict_routing(profile, PromptSet("new", "prompt", texts(topic, 6, 10 + topic)))
        plan = make_plan(profile, catalog, PlanRequest(remote_share=0.5, routing=routing))
        assert all(set(range(EXPERTS)) - set(layer.remote) == LIKED[topic] for layer in plan.layers)
        assert verify(plan, profile, catalog) == ()
        # Priced with what such prompts really used, it is cheaper than the plan for all of them, which keeps what the third topic likes.
        own = mixed(tuple(range(topic, PROMPTS, TOPICS)), (1,) * (PROMPTS // TOPICS))
        truth = make_problem(profile, catalog, PlanRequest(routing=own))
        costs = [evaluate(truth, Placement(p.main, p.layers)).cost_usd_per_request for p in (plan, mean)]
        assert costs[0] < costs[1] or (topic == 2 and mean.layers == plan.layers)
        assert any(scenario.kind == ScenarioKind.PROFILE_ROUTING for scenario in plan.scenarios)


def test_few_tokens_in_a_mixture_are_insufficient_evidence(profile: Profile) -> None:
    catalog = tiny_catalog()
    few, enough = (plan_of(profile, catalog, routing=mixed(tuple(range(n)), (1,) * n)) for n in (9, 10))  # of 20 tokens each
    assert few.verdict == "insufficient-evidence" != enough.verdict
    assert verify(few, profile, catalog) == verify(enough, profile, catalog) == ()


def test_receipts_are_predicted_with_the_plans_routing(profile: Profile, tmp_path: Path) -> None:
    from remoe_cli import artifacts
    from remoe_cli.plan.catalog.catalog import read_catalog

    plan = plan_of(profile, read_catalog("local"), remote_share=0.5, routing=mixed((0, 1), (3, 1)))
    artifacts.write_json(tmp_path / "plan.json", plan)
    found = cost_model(*inputs_of(tmp_path / "plan.json"))(round(plan.workload.n_in), round(plan.workload.n_out))
    assert found.model_dump() == pytest.approx(plan.outcome.model_dump())


def test_on_the_command_line(profile: Profile, tmp_path: Path) -> None:
    """The same bytes whatever the hash seed and the order of the prompts; the paper's solver predicts as the paper does."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "plan.json"
    given = texts(0, 4, 20) + texts(1, 2, 21)
    options = ["plan", str(profile.path), "-o", str(out), "--data", str(prompts), "--remote-share", "0.5", "--explain", "--yes", "--json"]
    prompts.write_text("\n".join(given))
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-m", "remoe_cli", *options], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=120)
    first = out.read_bytes()
    prompts.write_text("\n".join(given[::-1]))
    document: dict[str, Any] = forked.document(*options[:-1])
    assert out.read_bytes() == first
    routing = document["workload"]["routing"]
    assert routing["count"] == 6 and routing["prompts"]["path"] == str(prompts)
    winner = json.loads((profile.path / "predictor.json").read_text())
    assert routing["predictor"] == winner["default"] != "SPS"
    assert routing["validation_bits"] == pytest.approx(winner["validation_bits"][winner["default"]], rel=5e-3)
    assert routing["prompts"]["sha256"] == PromptSet("", "", tuple(sorted(given))).sha256
    [text] = [text for name, text in document["explanation"]["inputs"] if name == "prompts"]
    assert f"6 of {prompts}" in text and any("recorded prompts" in note for note in document["notes"])
    document = forked.document(*options[:4], "--data", str(prompts), "--solver", "paper", "--yes")
    assert document["workload"]["routing"]["predictor"] == "SPS"


def test_a_plan_without_prompts_says_nothing_of_them(profile: Profile) -> None:
    plan = plan_of(profile, tiny_catalog(), remote_share=0.5)
    assert "routing" not in json.loads(plan.model_dump_json())["workload"]
    assert Plan.model_validate(plan.model_dump()).workload.routing is None


def test_what_cannot_be_predicted_from(profile: Profile, tmp_path: Path) -> None:
    synthetic_profile(tmp_path / "bare", hidden_size=0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2")
    for made, file, message in (
        (tmp_path / "bare", prompts, "has no vectors of its prompts"),
        (profile.path, tmp_path / "missing.txt", "There is no file"),
    ):
        error = forked.document("plan", str(made), "-o", str(tmp_path / "plan.json"), "--data", str(file), code=2)["error"]
        assert message in error["message"] and not (tmp_path / "plan.json").exists()
    untraced = replace(profile, arrays=profile.arrays | {"trace_prompt": profile.arrays["trace_prompt"][:0]})
    from remoe_cli.errors import UsageError

    with pytest.raises(UsageError, match="no prompt with routing"):
        predict_routing(untraced, PromptSet("new", "prompt", texts(0, 1, 0)))
