"""The main job on the demo model: real language, real workers, through the command line."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli import artifacts
from remoe_cli.demo_data import PROMPTS
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.profile.record import ProfileRecord
from remoe_cli.runtime.main_function import load_here
from tests.forked import document as remoe
from tests.harness import clear_steps

EVERY_16TH = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[::16]]
# What comparing with transformers may take where it cannot ask all prompts sooner. The figures of docs/ took more.
BUDGET_S = float(os.environ.get("REMOE_TEST_S") or 30)
Measured = Callable[[str], None]


class Stage:
    """Profiles and deployments of the demo model for all tests here, each made when it is first asked for.

    A deployment is named after its number type, and stands until another share of remote experts is asked for under its name.
    `as_deployed` keeps the status that each began with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.as_deployed: dict[tuple[str, float], dict[str, Any]] = {}
        self._standing: dict[str, float] = {}

    def profile(self, dtype: str) -> Path:
        """float32 is measured, as by default. bfloat16 is described and little: without a CPU that has it, each prompt takes seconds."""
        path = self.folder / f"profile-{dtype}"
        if not path.exists():
            prompts, tokens, *latency = ("24", "12") if dtype == "float32" else ("4", "2", "--latency-from", "paper")
            options = ["--data", str(PROMPTS), "--limit", prompts, "--max-new-tokens", tokens, *latency, "-o", str(path)]
            document = remoe("profile", str(demo_model(dtype)), *options)
            assert (document["layers"], document["experts_per_layer"], document["top_k"]) == (30, 8, 2)
            assert (document["prompts"], document["latency"]) == (int(prompts), "described" if latency else "measured")
        return path

    def deployed(self, dtype: str, share: float) -> dict[str, Any]:
        """The status of a deployment with a forced share of remote experts."""
        if self._standing.get(dtype) != share:
            self.destroy(dtype)
            plan = self.folder / f"plan-{dtype}.json"
            remoe("plan", str(self.profile(dtype)), "-o", str(plan), "--remote-share", str(share))
            self.as_deployed[dtype, share] = remoe("deploy", str(plan), "--name", dtype)
            self._standing[dtype] = share
        return remoe("status", dtype)

    def destroy(self, dtype: str) -> None:
        if self._standing.pop(dtype, None) is not None:
            remoe("destroy", dtype)


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(folder))
        yield folder
        for name in [d.name for d in (folder / "deployments").glob("*")]:
            remoe("destroy", name)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def _reference(dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_model(dtype), experts_implementation="eager")
    return model.eval()


def _reference_answer(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The greedy answer of plain transformers, and the logits [answer, V] that it was chosen from."""
    ids = torch.tensor([prompt])
    options = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "disable_compile": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def _in_time(items: Sequence[Any], least: int) -> Iterator[Any]:
    """As many of the items as can be started in BUDGET_S, `least` of them in any case."""
    give_up = time.monotonic() + BUDGET_S
    for done, item in enumerate(items):
        if done >= least and time.monotonic() > give_up:
            return
        yield item


def _fed(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [answer, V] of a model that is fed the prompt and then, one by one, somebody else's answer."""
    cache, logits = None, []
    with torch.inference_mode():
        for ids in (prompt, *([token] for token in answer[:-1])):
            output = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits.append(output.logits[0, -1].float())
    return torch.stack(logits)


@pytest.mark.timeout(600 + BUDGET_S)
def test_float32_answers_are_token_for_token_those_of_transformers(stage: Stage, tmp_path: Path, measured: Measured) -> None:
    stage.deployed("float32", 0.5)
    prompts = tmp_path / "prompts.jsonl"
    reference, tokenizer = _reference("float32"), load_tokenizer(find(str(demo_model("float32"))))
    answers: list[Any] = []
    expected: list[Any] = []
    # Both compute in one thread, so they take no more time together than the slower one alone.
    with ThreadPoolExecutor(1) as asking:
        for some in _in_time([EVERY_16TH[i : i + 2] for i in range(0, len(EVERY_16TH), 2)], least=1):
            prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some))
            asked = asking.submit(remoe, "infer", "float32", "--input", str(prompts), "--max-new-tokens", "64")
            expected += [(ids, _reference_answer(reference, ids, 64)[0]) for ids in (encode(tokenizer, p) for p in some)]
            answers += asked.result()
    equal = [(a["prompt_token_ids"], a["token_ids"]) == e for a, e in zip(answers, expected, strict=True)]
    measured(f"{sum(equal)} of {len(equal)} prompts x 64 greedy tokens equal to transformers' in float32, half of the experts remote")
    assert all(equal)
    assert all(a["receipt"]["invocations"] > 30 for a in answers)


def test_kill_worker_main_and_supervisor(stage: Stage, state: Path) -> None:
    question = ("--prompt", "Count from one to thirty in words.", "--max-new-tokens", "40")
    stage.deployed("float32", 0.5)
    expected = remoe("infer", "float32", *question)
    status = remoe("status", "float32")

    # A worker in mid-request: tried again on a new instance, same tokens.
    pids = [i["pid"] for f in status["functions"] for i in f["instances"]]
    answer = _infer_and_kill(status["endpoint"], lambda: [os.kill(pid, signal.SIGKILL) for pid in pids[:10]], *question)
    assert json.loads(answer.stdout)["token_ids"] == expected["token_ids"]
    assert json.loads(answer.stdout)["receipt"]["cold_starts"] >= 5

    # The main server: a clear error, and the supervisor starts it again.
    answer = _infer_and_kill(status["endpoint"], lambda: os.kill(status["main"]["pid"], signal.SIGKILL), *question)
    error = json.loads(answer.stdout)["error"]
    assert answer.returncode == 1 and error["kind"] == "Deploy" and "ended before the answer" in error["message"]
    assert "repeat the command" in error["hint"]
    _await(lambda: remoe("status", "float32")["main"].get("expert_bytes_held"))
    assert remoe("infer", "float32", *question)["token_ids"] == expected["token_ids"]

    # The supervisor: a clear error, nothing of it survives, destroy and a new deploy work.
    now = remoe("status", "float32")
    answer = _infer_and_kill(now["endpoint"], lambda: os.kill(now["pid"], signal.SIGKILL), *question)
    assert answer.returncode == 1 and json.loads(answer.stdout)["error"]["message"]
    assert remoe("status", "float32")["state"] == "dead"
    assert remoe("infer", "float32", *question, code=1)["error"]["kind"] == "Deploy"
    stage.destroy("float32")
    assert not (state / "deployments" / "float32").exists()
    left = [now["main"]["pid"], *(i["pid"] for f in now["functions"] for i in f["instances"])]
    _await(lambda: not any(_alive(pid) for pid in left))
    # Which experts are remote changes no token of float32.
    stage.deployed("float32", 0.8)
    assert remoe("infer", "float32", *question)["token_ids"] == expected["token_ids"]


def _infer_and_kill(endpoint: str, kill: Callable[[], object], *question: str) -> subprocess.CompletedProcess[str]:
    """Ask, kill once the answer is well under way, and return the finished command."""

    def invocations() -> int:
        return sum(f["invocations"] for f in httpx.get(f"{endpoint}/remoe/status", trust_env=False).json()["functions"])

    before = invocations()
    command = [sys.executable, "-m", "remoe_cli", "infer", "float32", *question, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        _await(lambda: invocations() > before + 60)
        kill()
        stdout, stderr = asking.communicate(timeout=120)
    return subprocess.CompletedProcess(command, asking.returncode, stdout, stderr)


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _await(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_the_main_process_holds_only_its_share(stage: Stage, measured: Measured) -> None:
    # Both have functions to call, so both carry boto3: what differs is experts.
    for share in (0.5, 0.8):
        if ("float32", share) not in stage.as_deployed:
            stage.deployed("float32", share)
    half, fifth = (stage.as_deployed["float32", share]["main"] for share in (0.5, 0.8))
    model = fifth["expert_bytes_of_model"]
    assert (half["expert_bytes_held"], fifth["expert_bytes_held"]) == (model // 2, model // 5)
    saved = half["anonymous_bytes"] - fifth["anonymous_bytes"]
    held = f"holds {fifth['expert_bytes_held'] / 1e6:.1f} of {model / 1e6:.1f} MB of float32 experts"
    measured(f"80% remote: {held}; {saved / 1e6:.1f} MB less memory than at 50% remote")
    assert saved == pytest.approx(half["expert_bytes_held"] - fifth["expert_bytes_held"], rel=0.25)


@pytest.mark.timeout(600 + BUDGET_S)
def test_bfloat16_agrees_wherever_the_reference_is_clear(stage: Stage, state: Path, measured: Measured) -> None:
    """Fed the reference's own tokens, one by one; a clear step is one whose two best logits differ by more than two bfloat16 steps."""
    reference = _reference("bfloat16")
    clear_count = steps = agreed = same_greedy = asked = 0
    losses = {"reference": 0.0, "remote": 0.0}
    endpoint = stage.deployed("bfloat16", 0.5)["endpoint"]
    engine = load_here(state / "deployments" / "bfloat16" / "server.json", endpoint).engine
    for text in _in_time(EVERY_16TH, least=3):
        prompt = engine.prompt_ids(text)
        answer, theirs = _reference_answer(reference, prompt, 40)
        ours = _fed(engine.model, prompt, answer)
        target = torch.tensor(answer)
        for name, output in (("reference", theirs), ("remote", ours)):
            losses[name] += float(torch.nn.functional.cross_entropy(output, target, reduction="sum"))
        clear = clear_steps(theirs)
        agree = ours.argmax(-1) == theirs.argmax(-1)
        # Fed the same tokens, a model that agrees at every step would have generated them.
        same_greedy, asked = same_greedy + bool(agree.all()), asked + 1
        clear_count, steps, agreed = clear_count + int(clear.sum()), steps + len(clear), agreed + int((agree & clear).sum())
    change = math.exp((losses["remote"] - losses["reference"]) / steps) - 1
    measured(f"bfloat16: argmax agrees at {agreed} of {clear_count} clear steps (of {steps}), perplexity {change:+.4%}")
    measured(f"bfloat16: {same_greedy} of {asked} prompts x 40 tokens have wholly equal greedy tokens")
    assert agreed == clear_count > steps / 2
    # Over the 700 steps of 20 prompts rounding averages out; over a few hundred, one token counts for several thousandths.
    assert abs(change) < (0.002 if asked == len(EVERY_16TH) else 0.01)


def test_an_impossible_target_exits_3_and_names_the_limit(stage: Stage, tmp_path: Path) -> None:
    plan, profile = tmp_path / "plan.json", str(stage.profile("float32"))
    error = remoe("plan", profile, "-o", str(plan), "--tpot", "0.001", code=3)["error"]
    assert error["kind"] == "Infeasible" and "TPOT" in error["message"] and not plan.exists()
    least = float(re.findall(r"\d+\.\d+", error["message"] + error["hint"])[-1])
    document = remoe("plan", profile, "-o", str(plan), "--tpot", str(least))
    assert document["tpot_s"] <= least
    assert document["gap"] <= 1e-3 and 0 < document["lower_bound_usd"] <= document["cost_usd_per_request"]
    assert document["verdict"] == "not recommended" and "all-local" in document["baselines"]


def test_demo_model_is_the_studied_one() -> None:
    assert artifacts.sha256_file(demo_model("bfloat16") / "model.safetensors").startswith("95d759d336df9aaa")


def test_a_main_server_that_cannot_start_says_why_and_leaves_nothing(stage: Stage, tmp_path: Path, state: Path) -> None:
    """The model loses its tokenizer between planning and deploying."""
    model = tmp_path / "model"
    shutil.copytree(demo_model("bfloat16"), model)
    profile = tmp_path / "profile"
    shutil.copytree(stage.profile("bfloat16"), profile)
    record = artifacts.read_json(profile / "profile.json", ProfileRecord)
    moved = record.model.model_copy(update={"path": str(model), "revision": find(str(model)).revision})
    artifacts.write_json(profile / "profile.json", record.model_copy(update={"model": moved}))
    remoe("plan", str(profile), "-o", str(tmp_path / "plan.json"), "--remote-share", "0.1")
    (model / "tokenizer.json").unlink()
    error = remoe("deploy", str(tmp_path / "plan.json"), "--name", "mute", code=1)["error"]
    assert error["kind"] == "Deploy" and f"The tokenizer of {model} cannot be loaded" in error["message"]
    assert "Traceback" not in error["message"] and "Fatal" not in error["message"]
    assert not (state / "deployments" / "mute").exists()
