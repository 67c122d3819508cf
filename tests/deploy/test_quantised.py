"""Quantised checkpoints from profile to answer on the twin, with half of the experts remote, and a scale that changes on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.calibrate import restart
from remoe_cli.function.weights import Head, ShardFile, read_head
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.ffn import from_storage
from remoe_cli.package.bundle import Manifest
from remoe_cli.plan.document import read_plan
from remoe_cli.profile.latency_record import Roofline
from remoe_cli.profile.record import read_profile, write_profile
from remoe_cli.runtime.last_resort import ShardPlace
from remoe_cli.runtime.server_config import ServerConfig
from tests.support import forked
from tests.support.damage import flip
from tests.support.families import VOCAB_SIZE, save
from tests.support.forked import document as remoe
from tests.support.harness import clear_steps
from tests.support.quantised import PAIRS, WIDE, dequantised, save_quantised

PROMPT = " ".join(f"w{i}" for i in range(1, 21))
PROMPT_IDS = list(range(1, 21))
TOKENS = 12


Deployed = Callable[[str, str], tuple[Path, dict[str, Any]]]
# The one that a test damages stands for both tests.
DAMAGED = ("gpt_oss", "mxfp4")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Deploys a family in a form as "q", unless it stands; returns the folder of what it was made from, and the status as deployed."""
    standing: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def deploy(family: str, form: str) -> tuple[Path, dict[str, Any]]:
        if (family, form) not in standing or not lifecycle.names():
            destroy()
            folder = tmp_path_factory.mktemp(f"{family}-{form}")
            standing[family, form] = folder, remoe("deploy", str(planned(folder, family, form)), "--name", "q")
        return standing[family, form]

    def destroy() -> None:
        standing.clear()
        for name in lifecycle.names():
            lifecycle.destroy(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield deploy
        destroy()


def planned(folder: Path, family: str, form: str) -> Path:
    """A plan with half of the experts remote, for a profile that remoe made of a quantised checkpoint."""
    save_quantised(family, form, folder / "model")
    plan = planned_of(folder)
    if (family, form) == ("qwen3_moe", "fp8"):
        _plan_again_with_quick_packed_experts(folder, plan)
    return plan


def _plan_again_with_quick_packed_experts(folder: Path, plan: Path) -> None:
    """Where they take less time, the planner has functions compute from the stored bytes."""
    assert not read_plan(plan).model.packed
    profile = read_profile(folder / "profile")
    packed = profile.record.latency.packed_expert
    assert packed is not None and isinstance(packed.curve, Roofline)
    quick = packed.curve.model_copy(update={"overhead_s": 0.0, "weights_s": 0.0, "per_token_s": 0.0})
    latency = profile.record.latency.model_copy(update={"packed_expert": packed.model_copy(update={"curve": quick})})
    write_profile(folder / "profile", profile.record.model_copy(update={"latency": latency}), profile.arrays)
    remoe("plan", str(folder / "profile"), "-o", str(plan), "--remote-share", "0.5", "--yes")
    assert read_plan(plan).model.packed


def planned_of(folder: Path, *more: str) -> Path:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{PROMPT} w{i}"}) + "\n" for i in range(2)))
    profile, plan = folder / "profile", folder / "plan.json"
    options = ["--data", str(folder / "prompts.jsonl"), "--max-new-tokens", "2", "--latency-from", "paper", *more]
    remoe("profile", str(folder / "model"), *options, "-o", str(profile))
    remoe("plan", str(profile), "-o", str(plan), "--remote-share", "0.5")
    return plan


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "form"), sorted(PAIRS, key=lambda pair: pair == DAMAGED))
def test_it_answers_as_transformers_does(family: str, form: str, deployed: Deployed) -> None:
    folder, status = deployed(family, form)
    spec = read_profile(folder / "profile").record.spec
    assert spec.stored is not None and spec.stored.served and spec.read_expert_bytes < 0.6 * spec.expert_bytes
    assert 0 < status["main"]["local_experts"] < spec.experts
    answer = remoe("infer", "q", "--prompt", PROMPT, "--max-new-tokens", str(TOKENS))
    assert answer["receipt"]["functions"]
    ids = answer["token_ids"]
    whole, asked = dequantised(folder / "model", folder / "scratch"), torch.tensor([PROMPT_IDS + ids])
    with torch.inference_mode():
        logits = whole(asked).logits[0, len(PROMPT_IDS) - 1 : -1].float()
    clear = clear_steps(logits)
    assert clear.sum() >= len(ids) // 2
    assert torch.equal(logits.argmax(-1)[clear], torch.tensor(ids)[clear])
    # What is stored and sent is what the plan counts, but for what rounding and alignment do to tiny tensors.
    manifest = read_json(lifecycle.state_dir("q") / "bundle" / "manifest.json", Manifest)
    served = read_json(lifecycle.state_dir("q") / "server.json", ServerConfig)
    assert [ShardPlace.of(function).form for function in served.functions] == [function.form for function in manifest.functions]
    for function in manifest.functions:
        stored = function.shard_bytes - function.head_bytes
        assert stored == pytest.approx(len(function.experts) * spec.read_expert_bytes, rel=0.05)
        assert function.form == ("ready" if form == "fp8" and family != "qwen3_moe" else "packed") and spec.is_packed == (form != "fp8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, and a state folder of its own, of which nothing is left running."""
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path
    for name in lifecycle.names():
        lifecycle.destroy(name)


def test_experts_that_are_quantised_on_request(folder: Path) -> None:
    """Only remote ones are. What it loses and saves is measured and said, and what loses too much is refused."""
    model = save("qwen3_moe", torch.bfloat16, folder / "model", fused=False, **WIDE)
    plan = planned_of(folder, "--experts", "int8")
    record = read_profile(folder / "profile").record
    assert record.spec.remote is not None and record.loss is not None and record.latency.unquantised_expert is not None
    assert 0 < record.loss.divergence_bits < 1e-3 and abs(record.loss.perplexity_rise) < 0.01 and record.loss.prompts == 2
    packaged = remoe("package", str(plan), "--experts", "int8", "-o", str(folder / "package"))
    quantised = packaged["quantised"]
    assert quantised["experts"] == "int8" and quantised["loss"]["excess"] is None
    assert quantised["cost_usd_per_request"] < quantised["as_stored_usd_per_request"]
    other = forked.remoe("package", str(plan), "--experts", "int4", "-o", str(folder / "other"))
    assert other.returncode == 2 and "is not a plan for experts in INT4" in other.stderr and "--experts int4" in other.stderr
    done = forked.remoe("deploy", str(plan), "--name", "q")
    assert done.returncode == 0 and "Remote experts are in INT8. What that loses: perplexity" in done.stderr
    assert "What that saves: " in done.stderr
    answer = remoe("infer", "q", "--prompt", PROMPT, "--max-new-tokens", str(TOKENS))
    assert answer["receipt"]["functions"]
    manifest = read_json(lifecycle.state_dir("q") / "bundle" / "manifest.json", Manifest)
    layers = {layer.layer: layer.parameters() for layer in expert_layers(model)}
    for function in manifest.functions:
        shard = ShardFile(lifecycle.state_dir("q") / "bundle" / function.shard)
        assert (
            function.form == "packed"
            and function.shard_bytes - function.head_bytes == len(function.experts) * record.spec.fetched_expert_bytes
        )
        for expert in function.experts:
            for name, weights in shard.tensors(expert).items():
                layers[function.layer][name].data[expert] = from_storage(np.array(weights), torch.bfloat16)
    ids = answer["token_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT_IDS + ids])).logits[0, len(PROMPT_IDS) - 1 : -1].float()
    clear = clear_steps(logits)
    assert clear.sum() >= len(ids) // 2 and torch.equal(logits.argmax(-1)[clear], torch.tensor(ids)[clear])
    much = record.model_copy(update={"loss": record.loss.model_copy(update={"divergence_bits": 0.2})})
    write_profile(folder / "profile", much, read_profile(folder / "profile").arrays)
    remoe("plan", str(folder / "profile"), "-o", str(plan), "--remote-share", "0.5", "--yes")
    for command in (("package", str(plan), "-o", str(folder / "more")), ("deploy", str(plan), "--name", "r")):
        done = forked.remoe(*command)
        assert done.returncode == 2 and "0.2 bits, and 0.01 is the most" in done.stderr and "--accept-loss" in done.stderr
    assert not (folder / "more").exists() and lifecycle.names() == ["q"]
    assert remoe("package", str(plan), "--accept-loss", "-o", str(folder / "more"))["quantised"]["loss"]["excess"]


def test_a_changed_scale_is_caught_by_the_digest(deployed: Deployed) -> None:
    deployed(*DAMAGED)
    place = lifecycle.state_dir("q") / "bundle"
    for function in read_json(place / "manifest.json", Manifest).functions:
        head = Head.parse(read_head(place / function.shard))
        for tensors in head.tensors.values():
            flip(place / function.shard, tensors["down_proj.0.scales"].first)
    for called in read_json(lifecycle.state_dir("q") / "server.json", ServerConfig).functions:
        restart("q", called.function)
    done = forked.remoe("infer", "q", "--prompt", PROMPT, "--max-new-tokens", "2")
    assert done.returncode != 0 and "is not the one that was deployed" in done.stderr
    lifecycle.destroy("q")
