"""The command line's contract: JSON, exit codes, one clear error, quick help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.forked import remoe

COMMANDS = (
    *("demo", "profile run", "profile import", "profile measure", "profile merge", "predict", "plan make", "plan show", "package"),
    *("deploy", "infer", "serve", "status", "logs", "destroy", "cost", "calibrate", "drift", "catalog update"),
)


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter that has imported nothing yet."""
    return subprocess.run([sys.executable, "-m", "remoe_cli", *arguments], capture_output=True, text=True, check=False, timeout=60)


def elapsed_s(*command: str) -> float:
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout
    return time.perf_counter() - start


@pytest.mark.alone
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_quick(option: str, measured) -> None:  # type: ignore[no-untyped-def]
    """Under 0.3 s, on a machine where Python with typer alone starts in 0.1 s; a slower machine may be as much slower with both."""
    pairs = [(elapsed_s("-m", "remoe_cli", option), elapsed_s("-c", "import typer.main; print(1)")) for _ in range(7)]
    remoe_s, typer_s = (min(column) for column in zip(*pairs, strict=True))
    measured(f"remoe {option}: {remoe_s:.2f} s, ratio to typer alone {remoe_s / typer_s:.2f}")
    assert remoe_s < max(0.3, 3 * typer_s)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_that_they_do_not_need(option: str) -> None:
    heavy = ("boto3", "httpx", "numpy", "pulp", "pydantic", "rich", "torch", "transformers")
    code = f"import sys; from remoe_cli.cli import app; sys.argv[1:] = [{option!r}]; app.run(); print(sys.modules.keys() & {set(heavy)})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.startswith(("remoe", "Usage")) and run.stdout.splitlines()[-1] == "set()"


@pytest.mark.sweep
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed_and_takes_json_and_quiet(command: str) -> None:
    *group, name = command.split()
    assert f"  {name} " in remoe(*group, "--help").stdout
    text = remoe(*command.split(), "--help").stdout
    assert "--json" in text and "--quiet" in text


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message"),
    [
        (("plan", "nowhere", "-o", "p.json"), 2, "Usage", "There is no folder"),
        (("plan", "DATA", "-o", "p.json"), 2, "Usage", "data.txt is a file."),
        (("plan", ".", "-o", "p.json"), 2, "Usage", "is not a profile: it has no profile.json"),
        (("plan", "p", "-o", "p.toml"), 2, "Usage", "p.toml is not a name for a plan."),
        (("plan", "p", "-o", "p"), 2, "Usage", "p is not a name for a plan."),
        (("deploy", "nowhere.json"), 2, "Usage", "no file nowhere.json"),
        (("deploy", "."), 2, "Usage", ". is a folder, not a plan."),
        (("deploy", "DATA", "--target", "aws", "--dry-run"), 2, "Usage", "data.txt is not a plan (it is not JSON)."),
        (("package", "DATA", "--image"), 2, "Usage", "data.txt is not a plan (it is not JSON)."),
        (("infer", "nobody", "--prompt", "x"), 1, "Deploy", "no deployment named 'nobody'"),
        (("infer", "nobody"), 2, "Usage", "either --prompt TEXT, --messages FILE or --data FILE"),
        (("status", "nobody"), 1, "Deploy", "no deployment named 'nobody'"),
        (("logs", "nobody"), 1, "Deploy", "no deployment named 'nobody'"),
        (("profile", "no-model", "--data", "none.jsonl", "-o", "out"), 2, "Usage", "none.jsonl"),
        (("profile", "-o", "out"), 2, "Usage", "Missing argument 'MODEL'"),
        (("profile", "m", "-o", "out"), 2, "Usage", "Missing option '--data'"),
        (("profile", "measure", "nobody", "-o", "out", "--device-map", "auto"), 2, "Usage", "No such option: --device-map"),
        (("profile", "import", "m", "r.npz", "--shard", "1/2", "-o", "out"), 2, "Usage", "No such option: --shard"),
        (("profile", "measure", "nobody", "-o", "out"), 1, "Deploy", "no deployment named 'nobody'"),
        (("profile", "import", "m", "r.npz", "-o", "out"), 2, "Usage", "Missing option '--latency-from'"),
        (("profile", "m", "--data", "DATA", "--shard", "3/2", "-o", "out"), 2, "Usage", "not a slice such as 1/4"),
        (
            ("profile", "m", "--data", "DATA", "--device", "cpu", "--device-map", "auto", "-o", "out"),
            2,
            "Usage",
            "both say where the model is",
        ),
        (("profile", "no-model", "--data", "DATA", "--latency-from", "paper", "-o", "out"), 2, "Usage", "no folder no-model"),
        (("profile", "merge", "nowhere", "-o", "out"), 2, "Usage", "There is no folder"),
        (("predict", "nowhere", "--prompt", "x"), 2, "Usage", "There is no folder nowhere."),
        (("plan", "p", "-o", "."), 2, "Usage", ". is a directory"),
        (("plan", "make"), 2, "Usage", "'PROFILE'"),
        (("plan", "p", "-o", "x.json", "--remote-share", "2"), 2, "Usage", "remote-share"),
        (("catalog", "update", "mars", "-o", "new.toml"), 2, "Usage", "no catalog named 'mars'"),
        (("serve", "nobody"), 1, "Deploy", "no deployment named 'nobody'"),
        (("serve", "nobody", "--device", "tpu"), 2, "Usage", "'tpu' is not one of"),
        (("package", "nowhere.json"), 2, "Usage", "no file nowhere.json"),
        (("package", "nowhere.json", "--repository", "r"), 2, "Usage", "--repository is for an image"),
        (("wat",), 2, "Usage", "wat"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments: tuple[str, ...], code: int, kind: str, message: str, tmp_path: Path) -> None:
    state = {"REMOE_STATE_DIR": str(tmp_path)}
    (tmp_path / "data.txt").write_text("A prompt.")
    arguments = tuple(str(tmp_path / "data.txt") if argument == "DATA" else argument for argument in arguments)
    run = remoe(*arguments, "--json", **state)
    error = json.loads(run.stdout)["error"]
    assert (run.returncode, error["kind"]) == (code, kind)
    assert message in error["message"] and error["hint"]
    people = remoe(*arguments, **state)
    assert people.returncode == code and people.stdout == ""
    assert people.stderr.startswith("error: ") and message in people.stderr and "Traceback" not in people.stderr


def test_a_traceback_only_in_debug(tmp_path: Path) -> None:
    run = remoe("status", "nobody", REMOE_STATE_DIR=str(tmp_path), REMOE_DEBUG="1")
    assert run.returncode == 1 and "Traceback" in run.stderr


def test_no_deployments_is_an_empty_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path))
    assert json.loads(fresh("status", "--json").stdout) == {"deployments": []}


def test_no_arguments_print_the_help() -> None:
    run = fresh()
    assert run.returncode == 2 and run.stdout.startswith("Usage: remoe ") and "Start with 'remoe demo'" in run.stdout


def test_prompts_are_read_before_the_model(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    run = fresh("profile", "no-model", "--data", str(data), "-o", str(tmp_path / "out"), "--json")
    assert run.returncode == 2
    assert "text" in json.loads(run.stdout)["error"]["message"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["deploy.local.target", "runtime.client", "plan.build", "cli.app"])
def test_what_only_looks_or_plans_does_not_import_torch(module: str) -> None:
    code = f"import sys, remoe_cli.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
