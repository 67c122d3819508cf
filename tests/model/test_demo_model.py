"""The main job on the demo model: real language, real workers, through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from remoe_cli.model import demo
from remoe_cli.model.checkpoint import find
from remoe_cli.model.demo import demo_model
from remoe_cli.model.tokens import encode, load_tokenizer
from tests.support.forked import document as remoe
from tests.support.stage import BUDGET_S, EVERY_16TH, Stage, in_time, reference, reference_answer, staged

Measured = Callable[[str], None]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage")) as made:
        yield made


@pytest.mark.nightly
@pytest.mark.timeout(600 + BUDGET_S)
def test_float32_answers_are_token_for_token_those_of_transformers(stage: Stage, tmp_path: Path, measured: Measured) -> None:
    stage.deployed("float32", 0.5)
    prompts = tmp_path / "prompts.jsonl"
    model, tokenizer = reference("float32"), load_tokenizer(find(str(demo_model("float32"))))
    answers: list[Any] = []
    expected: list[Any] = []
    # Both compute in one thread, so they take no more time together than the slower one alone.
    with ThreadPoolExecutor(1) as asking:
        for some in in_time([EVERY_16TH[i : i + 2] for i in range(0, len(EVERY_16TH), 2)], least=1):
            prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some))
            asked = asking.submit(remoe, "infer", "float32", "--data", str(prompts), "--max-new-tokens", "64")
            expected += [(ids, reference_answer(model, ids, 64)[0]) for ids in (encode(tokenizer, p) for p in some)]
            answers += asked.result()
    equal = [(a["prompt_token_ids"], a["token_ids"]) == e for a, e in zip(answers, expected, strict=True)]
    measured(f"{sum(equal)} of {len(equal)} prompts x 64 greedy tokens equal to transformers' in float32, half of the experts remote")
    assert all(equal)
    assert all(a["receipt"]["invocations"] > 30 for a in answers)


@pytest.mark.nightly
def test_kill_worker_main_and_supervisor(stage: Stage) -> None:
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
    assert not (stage.state / "deployments" / "float32").exists()
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
        time.sleep(0.05)  # an answer is whole in seconds


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_an_impossible_target_exits_3_and_names_the_limit(stage: Stage, tmp_path: Path) -> None:
    plan, profile = tmp_path / "plan.json", str(stage.profile("float32"))
    error = remoe("plan", profile, "-o", str(plan), "--tpot", "0.001", code=3)["error"]
    assert error["kind"] == "Infeasible" and "TPOT" in error["message"] and not plan.exists()
    least = float(re.findall(r"\d+\.\d+", error["message"] + error["hint"])[-1])
    document = remoe("plan", profile, "-o", str(plan), "--tpot", str(least))
    assert document["tpot_s"] <= least
    assert document["gap"] <= 1e-3 and 0 < document["lower_bound_usd"] <= document["cost_usd_per_request"]
    assert document["verdict"] == "not-recommended" and "all-local" in document["baselines"]


def test_two_that_need_the_demo_model_at_once_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(wheel: Path, folder: Path, dtype: str) -> None:
        built.append(folder)
        time.sleep(0.2)  # the other one comes meanwhile
        folder.mkdir()
        (folder / "model.safetensors").touch()

    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(demo, "_fetch", lambda say: tmp_path)
    monkeypatch.setattr(demo, "_build", build)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(demo_model, ["bfloat16"] * 2)] == 2 * built
