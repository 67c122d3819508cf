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
from contextlib import contextmanager
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
from remoe_cli.runtime.server import ServerConfig, load_engine
from tests.harness import clear_steps

EVERY_16TH = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[::16]]
Measured = Callable[[str], None]


def remoe(*arguments: str, code: int = 0) -> Any:
    """Run the command with --json and return its document; every line of stdout must be JSON."""
    run = subprocess.run(
        [sys.executable, "-m", "remoe_cli", *arguments, "--json"], capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == code, run.stdout + run.stderr
    documents = [json.loads(line) for line in run.stdout.splitlines()]
    assert "Traceback" not in run.stderr
    return documents[0] if len(documents) == 1 else documents


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(folder))
        yield folder
        for name in [d.name for d in (folder / "deployments").glob("*")]:
            remoe("destroy", name)


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small profile of the demo model in one number type, made when it is first asked for."""
    made: dict[str, Path] = {}

    def profile(dtype: str) -> Path:
        if dtype not in made:
            path = tmp_path_factory.mktemp("profile") / dtype
            options = ("--data", str(PROMPTS), "--limit", "24", "--max-new-tokens", "12", "-o", str(path))
            document = remoe("profile", str(demo_model(dtype)), *options)
            assert (document["layers"], document["experts_per_layer"], document["top_k"], document["prompts"]) == (30, 8, 2, 24)
            made[dtype] = path
        return made[dtype]

    return profile


@contextmanager
def deployed(profile: Path, folder: Path, name: str, share: float) -> Iterator[dict[str, Any]]:
    """A deployment with a forced share of remote experts; yields its status document."""
    plan = folder / f"{name}.json"
    remoe("plan", str(profile), "-o", str(plan), "--remote-share", str(share))
    yield remoe("deploy", str(plan), "--name", name)
    remoe("destroy", name)


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
    """All of the items where the CPU has fast bfloat16; elsewhere as many as can be started in 60 s, `least` of them in any case."""
    give_up = time.monotonic() + 60
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


@pytest.mark.timeout(600)
def test_float32_answers_are_token_for_token_those_of_transformers(
    profiles: Callable[[str], Path], tmp_path: Path, measured: Measured
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    reference, tokenizer = _reference("float32"), load_tokenizer(find(str(demo_model("float32"))))
    answers: list[Any] = []
    expected: list[Any] = []
    # Both compute in one thread, so they take no more time together than the slower one alone.
    with deployed(profiles("float32"), tmp_path, "same", 0.5), ThreadPoolExecutor(1) as asking:
        for some in _in_time([EVERY_16TH[i : i + 5] for i in range(0, 20, 5)], least=1):
            prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some))
            asked = asking.submit(remoe, "infer", "same", "--input", str(prompts), "--max-new-tokens", "64")
            expected += [(ids, _reference_answer(reference, ids, 64)[0]) for ids in (encode(tokenizer, p) for p in some)]
            answers += asked.result()
    equal = [(a["prompt_token_ids"], a["token_ids"]) == e for a, e in zip(answers, expected, strict=True)]
    measured(f"{sum(equal)} of {len(equal)} prompts x 64 greedy tokens equal to transformers' in float32, half of the experts remote")
    assert all(equal)
    assert all(a["receipt"]["invocations"] > 30 for a in answers)


@pytest.mark.timeout(600)
def test_bfloat16_agrees_wherever_the_reference_is_clear(
    profiles: Callable[[str], Path], state: Path, tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fed the reference's own tokens, one by one; a clear step is one whose two best logits differ by more than two bfloat16 steps."""
    reference = _reference("bfloat16")
    clear_count = steps = agreed = same_greedy = asked = 0
    losses = {"reference": 0.0, "remote": 0.0}
    with deployed(profiles("bfloat16"), tmp_path, "bf16", 0.5) as status:
        monkeypatch.setenv("REMOE_ENDPOINT", status["endpoint"])
        engine = load_engine(artifacts.read_json(state / "deployments" / "bf16" / "server.json", ServerConfig))
        for text in _in_time(EVERY_16TH, least=5):
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


def test_the_main_process_holds_only_its_share(profiles: Callable[[str], Path], tmp_path: Path, measured: Measured) -> None:
    # Both have functions to call, so both carry boto3: what differs is experts.
    with deployed(profiles("bfloat16"), tmp_path, "most", 0.2) as most, deployed(profiles("bfloat16"), tmp_path, "fifth", 0.8) as fifth:
        held = {share: status["main"]["expert_bytes_held"] for share, status in ((0.2, most), (0.8, fifth))}
        model = fifth["main"]["expert_bytes_of_model"]
    assert held == {0.2: model * 4 // 5, 0.8: model // 5}
    saved = most["main"]["anonymous_bytes"] - fifth["main"]["anonymous_bytes"]
    measured(
        f"80% remote: holds {held[0.8] / 1e6:.1f} of {model / 1e6:.1f} MB of experts; {saved / 1e6:.1f} MB less memory than at 20% remote"
    )
    assert saved == pytest.approx(held[0.2] - held[0.8], rel=0.25)


def test_kill_worker_main_and_supervisor(profiles: Callable[[str], Path], tmp_path: Path, state: Path) -> None:
    question = ("--prompt", "Count from one to thirty in words.", "--max-new-tokens", "40")
    with deployed(profiles("bfloat16"), tmp_path, "killed", 0.5) as status:
        expected = remoe("infer", "killed", *question)

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
        _await(lambda: remoe("status", "killed")["main"].get("expert_bytes_held"))
        assert remoe("infer", "killed", *question)["token_ids"] == expected["token_ids"]

        # The supervisor: a clear error, nothing of it survives, destroy and a new deploy work.
        now = remoe("status", "killed")
        answer = _infer_and_kill(now["endpoint"], lambda: os.kill(now["pid"], signal.SIGKILL), *question)
        assert answer.returncode == 1 and json.loads(answer.stdout)["error"]["message"]
        assert remoe("status", "killed")["state"] == "dead"
        assert remoe("infer", "killed", *question, code=1)["error"]["kind"] == "Deploy"
        remoe("destroy", "killed")
        assert not (state / "deployments" / "killed").exists()
        left = [now["main"]["pid"], *(i["pid"] for f in now["functions"] for i in f["instances"])]
        _await(lambda: not any(_alive(pid) for pid in left))
        remoe("deploy", str(tmp_path / "killed.json"), "--name", "killed")
        assert remoe("infer", "killed", *question)["token_ids"] == expected["token_ids"]


def _infer_and_kill(endpoint: str, kill: Callable[[], object], *question: str) -> subprocess.CompletedProcess[str]:
    """Ask, kill once the answer is well under way, and return the finished command."""

    def invocations() -> int:
        return sum(f["invocations"] for f in httpx.get(f"{endpoint}/remoe/status", trust_env=False).json()["functions"])

    before = invocations()
    command = [sys.executable, "-m", "remoe_cli", "infer", "killed", *question, "--json"]
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
        time.sleep(0.2)


def test_an_impossible_target_exits_3_and_names_the_limit(profiles: Callable[[str], Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    error = remoe("plan", str(profiles("bfloat16")), "-o", str(plan), "--tpot", "0.001", code=3)["error"]
    assert error["kind"] == "Infeasible" and "TPOT" in error["message"] and not plan.exists()
    least = float(re.findall(r"\d+\.\d+", error["message"] + error["hint"])[-1])
    document = remoe("plan", str(profiles("bfloat16")), "-o", str(plan), "--tpot", str(least))
    assert document["tpot_s"] <= least
    assert document["gap"] <= 1e-3 and 0 < document["lower_bound_usd"] <= document["cost_usd_per_request"]
    assert document["verdict"] == "not recommended" and "all-local" in document["baselines"]


def test_demo_model_is_the_studied_one() -> None:
    assert artifacts.sha256_file(demo_model("bfloat16") / "model.safetensors").startswith("95d759d336df9aaa")


def test_a_main_server_that_cannot_start_says_why_and_leaves_nothing(profiles: Callable[[str], Path], tmp_path: Path, state: Path) -> None:
    """The model loses its tokenizer between planning and deploying."""
    model = tmp_path / "model"
    shutil.copytree(demo_model("bfloat16"), model)
    profile = tmp_path / "profile"
    shutil.copytree(profiles("bfloat16"), profile)
    record = artifacts.read_json(profile / "profile.json", ProfileRecord)
    moved = record.model.model_copy(update={"path": str(model), "revision": find(str(model)).revision})
    artifacts.write_json(profile / "profile.json", record.model_copy(update={"model": moved}))
    remoe("plan", str(profile), "-o", str(tmp_path / "plan.json"), "--remote-share", "0.1")
    (model / "tokenizer.json").unlink()
    error = remoe("deploy", str(tmp_path / "plan.json"), "--name", "mute", code=1)["error"]
    assert error["kind"] == "Deploy" and f"The tokenizer of {model} cannot be loaded" in error["message"]
    assert "Traceback" not in error["message"] and "Fatal" not in error["message"]
    assert not (state / "deployments" / "mute").exists()
