"""Arguments and options that cannot be taken: the sentence is remoe's own, not a library's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.cli import app, output
from tests.support.forked import remoe
from tests.support.synthetic import plan_by_hand, synthetic_profile

MISTAKES = {
    ("plan", "p", "-o", "x.json", "--budget", "low"): "--budget is 'low', not a number.",
    ("plan", "p", "-o", "x.json", "--tpot", "-1"): "--tpot is -1; it must be 0 or more.",
    ("plan", "p", "-o", "x.json", "--cold-share=3"): "--cold-share is 3; it must be 1 or less.",
    ("plan", "p", "-o", "x.json", "--n-in", "1.5"): "--n-in is '1.5', not a whole number.",
    ("deploy", "p", "--monthly-alert", "0"): "--monthly-alert is 0; it must be 0.01 or more.",
    ("simulate", "p", "--requests-per-hour", "0"): "--requests-per-hour is 0; it must be 0.000001 or more.",
    ("serve", "demo", "--port", "70000"): "--port is 70000; it must be 65535 or less.",
    ("plan", "p", "-o", "x.json", "--requests-per-hour", "inf"): "--requests-per-hour is inf, not a finite number.",
    ("plan", "p", "-o", "x.json", "--ttft=1e999"): "--ttft is inf, not a finite number.",
    ("plan", "p", "-o", "x.json", "--n-in", str(2**31)): "--n-in is 2147483648; it must be less than 2,147,483,648.",
    ("infer", "demo", "--prompt", "a", "--max-new-tokens", str(10**20)): (
        "--max-new-tokens is 100000000000000000000; it must be less than 2,147,483,648."
    ),
    ("plan", "p", "-o", "x.json", "--minimize", "price"): "--minimize: 'price' is not one of 'cost', 'tpot', 'ttft'.",
    ("plan", "p", "q", "-o", "x.json"): "q is one argument too many.",
    ("plan", "p", "q", "r", "-o", "x.json"): "These arguments are too many: q r.",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_wrong_value_is_named_in_a_sentence(arguments: tuple[str, ...]) -> None:
    run = remoe(*arguments, "--json")
    assert run.returncode == 2
    error = json.loads(run.stdout)["error"]
    command = {"plan": "plan make"}.get(arguments[0], arguments[0])
    assert error == {"kind": "Usage", "message": MISTAKES[arguments], "hint": f"See 'remoe {command} --help'."}


@pytest.mark.parametrize(
    ("option", "value", "message", "instead"),
    [
        ("--tpot", "fast", "is 'fast', not a time.", "Write it as 200ms or 0.2s. "),
        ("--tpot", "0.2m", "is '0.2m', not a time.", "Write it as 200ms or 0.2s. "),
        ("--tpot", "200", "is 200, which without a unit is in seconds.", "Write 200ms, or 200s if you mean seconds. "),
        ("--ttft", "4000", "is 4000, which without a unit is in seconds.", "Write 4000ms, or 4000s if you mean seconds. "),
        ("--time-limit", "900ms", "is 900ms; it must be 1 s or more.", ""),
    ],
)
def test_a_time_that_cannot_be_meant_is_refused_with_what_to_write(option: str, value: str, message: str, instead: str) -> None:
    run = remoe("plan", "p", "-o", "x.json", option, value, "--json")
    expected = {"kind": "Usage", "message": f"{option} {message}", "hint": f"{instead}See 'remoe plan make --help'."}
    assert run.returncode == 2 and json.loads(run.stdout)["error"] == expected


@pytest.mark.parametrize("options", [("--tpot", "200ms"), ("--tpot=75s",), ("--ttft", "2"), ("--ttft", "90min"), ("--time-limit", "1 min")])
def test_times_are_taken_with_and_without_units(options: tuple[str, ...]) -> None:
    run = remoe("plan", "p", "-o", "x.json", *options, "--json")
    assert json.loads(run.stdout)["error"]["message"].startswith("There is no folder")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("profile", "run"), "Missing argument 'MODEL'.", "Give MODEL: folder of a transformers checkpoint, or a Hugging Face id."),
        (("plan", "p"), "Missing option '-o' / '--output'.", "Give --output: the plan to write, such as plans/NAME.json. See 'remoe plan"),
        (("profile", "merge", "-o", "x"), "Missing argument 'SLICE'.", "Give SLICE: all profiles made with --shard 1/N to N/N"),
    ],
)
def test_what_is_missing_is_explained(arguments: tuple[str, ...], message: str, hint: str) -> None:
    run = remoe(*arguments, "--json")
    error = json.loads(run.stdout)["error"]
    assert run.returncode == 2 and error["message"] == message and error["hint"].startswith(hint)


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (("plan", "p", "--json", "--tpot"), "Option '--tpot' requires an argument.", "remoe plan make"),
        (("infer", "demo", "--json", "--prompt"), "Option '--prompt' requires an argument.", "remoe infer"),
        (("profile", "m", "--json", "--data"), "Option '--data' requires an argument.", "remoe profile run"),
        (("profile", "merge", "--json", "-o"), "Option '-o' requires an argument.", "remoe profile merge"),
        (("catalog", "update", "--json", "--output"), "Option '--output' requires an argument.", "remoe catalog update"),
        (("deploy", "p", "--json", "--yes=1"), "Option '--yes' does not take a value.", "remoe deploy"),
    ],
)
def test_an_option_without_its_value_points_to_the_commands_own_help(arguments: tuple[str, ...], message: str, command: str) -> None:
    run = remoe(*arguments)
    assert run.returncode == 2
    assert json.loads(run.stdout)["error"] == {"kind": "Usage", "message": message, "hint": f"See '{command} --help'."}


PLAN, PROFILE, MODEL = (f"a {what}, and 'remoe {{}}' takes a {{}}." for what in ("plan", "profile", "model"))


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("infer", "made.json", "--prompt", "x"), PLAN.format("infer", "NAME"), "'remoe deploy made.json', then give its NAME: made."),
        (("status", "made.json"), PLAN.format("status", "NAME"), "'remoe deploy made.json'"),
        (("plan", "made.json"), PLAN.format("plan make", "PROFILE"), "'remoe plan show made.json' shows it"),
        (("predict", "made.json", "--prompt", "x"), PLAN.format("predict", "PROFILE"), "'remoe deploy made.json' deploys it"),
        (("chat", "profile"), PROFILE.format("chat", "NAME"), "'remoe plan profile -o plans/profile.json', and deploy that."),
        (("deploy", "profile"), PROFILE.format("deploy", "PLAN"), "'remoe plan profile -o plans/profile.json'."),
        (("logs", "profile/profile.json"), PROFILE.format("logs", "NAME"), "'remoe plan profile -o plans/profile.json', and deploy that."),
        (("simulate", "profile/profile.json"), PROFILE.format("simulate", "PLAN"), "'remoe plan profile -o plans/profile.json'."),
        (("doctor", "profile"), PROFILE.format("doctor", "MODEL, PLAN or NAME"), "'remoe plan profile -o plans/profile.json'."),
        (("destroy", "made.json"), PLAN.format("destroy", "NAME"), "A plan is a file, and yours to delete."),
        (("plan", "model"), MODEL.format("plan make", "PROFILE"), "'remoe profile model --data PROMPTS -o profiles/model'."),
        (("deploy", "model"), MODEL.format("deploy", "PLAN"), "Profile it first"),
        (("status", "model"), MODEL.format("status", "NAME"), "Profile it first"),
        (("simulate", "olmoe"), "olmoe is a deployment, and 'remoe simulate' takes a PLAN.", "state/deployments/olmoe/plan.json."),
        (
            ("plan", "olmoe"),
            "olmoe is a deployment, and 'remoe plan make' takes a PROFILE.",
            "state/deployments/olmoe/plan.json' names it.",
        ),
        (("cost", "--csv", "f.csv"), "f.csv is a table, and 'remoe cost' takes a NAME.", "--csv > f.csv' writes such a file."),
        (("cost", "demo", "--csv", "f.csv"), "f.csv is one argument too many.", "'remoe cost NAME --by day --csv > FILE'"),
        (("infer", "demo", "hi"), "hi is one argument too many.", "'remoe infer NAME --prompt TEXT'"),
        (("version",), "No such command 'version'.", "'remoe --version' prints it."),
        (("help",), "No such command 'help'.", "'remoe --help' lists the commands"),
        (("export", "x", "--to", "vllm", "-o", "y"), "--to: 'vllm' is not one of", "--enable-eplb"),
    ],
)
def test_who_takes_another_command_is_told_the_right_one(
    arguments: tuple[str, ...], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "made.json", plan_by_hand(()))
    synthetic_profile(tmp_path / "profile")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "state" / "deployments" / "olmoe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOE_STATE_DIR", "state")
    monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
    monkeypatch.setattr(output, "_mode", output._Mode())  # without what an earlier command of this process has asked for
    assert app.run() == 2
    error, advice = capsys.readouterr().err.splitlines()
    assert message in error and hint in advice


def test_who_destroys_a_profile_is_told_what_it_is_and_nothing_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_profile(tmp_path / "olmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["remoe", "destroy", "olmoe"])
    assert app.run() == 0
    absent, hint = capsys.readouterr().out.splitlines()
    assert absent.startswith("There is no deployment named 'olmoe' here")
    assert hint.startswith("olmoe is a profile, and 'remoe destroy' takes a NAME. A profile is a folder, and yours to delete.")


def test_a_deployment_is_reached_where_a_profile_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["remoe", "status", "olmoe"])
        return app.run(), capsys.readouterr().err

    synthetic_profile(tmp_path / "olmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    code, message = status()
    assert code == 2 and PROFILE.format("status", "NAME") in message
    (tmp_path / "state" / "deployments" / "olmoe").mkdir(parents=True)  # one that was killed at its start
    code, message = status()
    assert code == 0, message


@pytest.mark.parametrize("command", [(), ("plan",), ("plan", "show"), ("infer",)])
def test_h_is_help(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for option in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["remoe", *command, option])
        assert app.run() == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "Usage: " in shown[0]
