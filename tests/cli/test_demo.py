"""`remoe demo`: the story on two screens, and commands that work as printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remoe_cli import artifacts
from remoe_cli.cli import demo_story as story
from remoe_cli.model.demo import demo_model
from remoe_cli.plan.document import BaselineName, LayerPlan, Plan
from remoe_cli.plan.wording import price
from tests.support import forked
from tests.support.paths import ROOT

WIDTH, LINES = 100, 52  # two screens


@pytest.fixture
def plan() -> Plan:
    return artifacts.read_json(ROOT / "plans" / "demo-local.json", Plan)


def text_of(lines: list[str]) -> str:
    assert all(line.startswith("    ") and len(line) <= WIDTH for line in lines)
    return " ".join(line.strip() for line in lines)


def test_the_model_says_what_a_mixture_of_experts_is() -> None:
    spec: Any = SimpleNamespace(
        dtype="float32", moe_layers=range(30), experts_per_layer=8, experts=240, top_k=2, expert_bytes=663_552, nonexpert_bytes=379_429_632
    )
    text = text_of(story.model_lines(spec))
    assert "30 layers has 8 experts" in text and "2 are used for each token" in text and "240 experts are 30% of its weights" in text


def test_the_profile_says_what_was_left_out_and_how_to_run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counts = np.array([[[6, 1, 3, 10]], [[4, 1, 7, 8]]])  # 2 prompts, 1 layer, 4 experts
    profile: Any = SimpleNamespace(
        arrays={"prompt_tokens": np.array([700, 800]), "decode_tokens": np.array([10, 10]), "decode_counts": counts}
    )
    lines = story.profile_lines(profile, 320, tmp_path / "model", tmp_path / "my prompts.jsonl")
    text = text_of(lines[:-2])
    assert "only 2 of the 320 demo prompts were run: 1,500 prompt tokens and 20 generated ones" in text
    assert "90% of the generated tokens use the most popular expert, and 10% the least popular one" in text
    command = shlex.split("\n".join(lines[-2:]).replace("\\\n", " "))  # as a shell joins the lines
    assert command[-6:] == ["profile", "model", "--data", "my prompts.jsonl", "-o", "profiles/demo"]


def test_the_plan_says_money_first_and_why(plan: Plan) -> None:
    gpu = plan.baselines[BaselineName.GPU].model_copy(update={"usd_per_hour": 0.526})
    plan = plan.model_copy(update={"baselines": {**plan.baselines, BaselineName.GPU: gpu}})
    text = text_of(story.plan_lines(plan))
    assert text.startswith(f"No: it is not worth it here. {plan.reason} ")
    assert "The whole model on a GPU (g4dn.xlarge) costs $384 a month" in text
    assert "52 prompt tokens and 16 generated ones" in text
    without_gpu = plan.model_copy(update={"baselines": {}, "verdict": "recommended"})
    text = text_of(story.plan_lines(without_gpu))
    assert text.startswith("Yes: it is worth it here. ") and "GPU" not in text


def test_what_is_forced_out_costs_more_and_takes_longer(plan: Plan) -> None:
    layers = tuple(LayerPlan(layer=i, remote=(1, 5), memory_mb=128, replicas=1) if i < 20 else layer for i, layer in enumerate(plan.layers))
    forced = plan.model_copy(update={"layers": layers, "cost_usd_per_request": 3 * plan.cost_usd_per_request, "tpot_s": 0.12})
    text = text_of(story.forced_lines(plan, forced))
    usd = price(3 * plan.cost_usd_per_request, plan.workload)
    assert text.startswith(f"40 of the 240 experts, in each layer the least used ones, run in 20 functions. Predicted: {usd}, which is 3.0")
    assert (
        "3.0 times the plan's cost" in text
        and f"120 ms instead of {plan.tpot_s * 1e3:.0f} ms for each token after the first (TPOT)" in text
    )


def test_a_prediction_that_is_off_is_said_to_be() -> None:
    assert story.accuracy_lines(0.1, 0.124) == story.accuracy_lines(0.1, 0.076) == story.accuracy_lines(None, 0.1) == []
    (line, *more) = story.accuracy_lines(0.149, 0.08)
    assert line.startswith("The predicted time per further token is 0.5 times the measured one.") and all(len(x) <= WIDTH for x in more)


def test_the_program_is_called_as_the_users_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(sys.executable).with_name("remoe")
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.defpath}")
    assert story.program() == "remoe"
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(script.parents[2])
    assert story.program() == str(script.relative_to(script.parents[2]))
    monkeypatch.chdir(tmp_path)
    shutil.copy("/bin/true", tmp_path / "remoe")  # another program of that name
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(os.path.expanduser(story.program())) == script


def test_paths_are_short_and_the_shell_understands_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "home" / "here"
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    paths = [here / "plan.json", home / "the cache" / "plan.json", tmp_path / "it's.json"]
    assert [story.shown(path) for path in paths[:2]] == ["plan.json", "~/'the cache/plan.json'"]
    echoed = subprocess.run(["sh", "-c", f"printf '%s\\n' {' '.join(map(story.shown, paths))}"], capture_output=True, text=True, check=True)
    assert [here / line for line in echoed.stdout.splitlines()] == paths


def small_demo(arguments: tuple[str, ...]) -> None:
    """`remoe demo` with 4 prompts and described times, which saves half a minute."""
    from remoe_cli.cli import app, demo
    from remoe_cli.model.checkpoint import find
    from remoe_cli.model.demo import demo_model
    from remoe_cli.model.spec import read_spec
    from remoe_cli.profile import latency
    from remoe_cli.profile.hardware import latency_from

    demo._EVERY = 80
    latency.measure = lambda *_, **__: latency_from("lambda", read_spec(find(str(demo_model("float32")))))
    sys.argv = ["remoe", "demo", *arguments]
    app.main()


@pytest.mark.timeout(300)
def test_the_demo_tells_its_story_on_two_screens_and_its_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(demo_model("float32").parent)
    monkeypatch.setenv("REMOE_CACHE_DIR", str(cache))
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    plan = cache / "demo" / "smolmoe-float32" / "plan-remote.json"
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    run = forked.complete(small_demo, ())
    assert run.returncode == 0, run.stderr
    lines = [*run.stderr.splitlines(), *run.stdout.splitlines()]
    signs_of_life = [line for line in lines if re.search(r": \d+ s so far$| of \d+(, about .* left)?$", line)]
    commands = [line.strip() for line in run.stdout.splitlines()[-3:]]
    page = plan.with_name("report.html")
    assert f"All of this as a page for your browser: {story.shown(page)}" in run.stdout
    assert all(f'<section id="{name}"' in page.read_text(encoding="utf-8") for name in ("costs", "placement", "activation", "measured"))
    # The described times may be far from this machine's, which is then said.
    doubts = story.accuracy_lines(1.0, 2.0) if "The predicted time per further token is" in run.stdout + run.stderr else []
    assert len(lines) - len(signs_of_life) - len(doubts) <= LINES
    answer = run.stdout.splitlines()[0]
    assert answer.startswith("The capital of France is Paris.") and answer.endswith(".")
    assert all(len(line) <= WIDTH for line in lines if line != answer and str(tmp_path) not in line)
    assert [line[:4] for line in run.stderr.splitlines() if re.match(r"\d/5 ", line)] == ["1/5 ", "2/5 ", "3/5 ", "4/5 ", "5/5 "]
    assert "only 4 of the 320 demo prompts were run" in run.stderr and "run in 30 functions" in run.stderr
    assert "predicted" in run.stdout
    assert "layer" not in run.stdout  # the tables of layers are for --verbose
    # Terms stand in brackets, behind words that explain them.
    assert set(re.findall(r".(?:TPOT|TTFT).", run.stderr + run.stdout)) == {"(TPOT)", "(TTFT)"}
    assert commands == [
        f"{story.program()} deploy {story.shown(plan)} --name demo",
        f"{story.program()} infer demo --prompt 'What is the capital of Japan?'",
        f"{story.program()} destroy demo",
    ]
    profiling = re.search(r"(?m)^ +(\S+ profile .*\\\n.*)$", run.stderr)
    assert profiling is not None
    for command in (*commands, profiling[1]):
        # With --help everything is parsed, and nothing is done.
        done = subprocess.run(["sh", "-c", f"{command} --help"], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("Usage: remoe "), f"{command}: {done.stderr}"
    _, _, model, _, _, data, *_ = profiling[1].split()
    for file in (model, data, commands[0].split()[2]):
        assert subprocess.run(["sh", "-c", f"test -e {file}"], check=False).returncode == 0
