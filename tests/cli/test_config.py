"""Defaults of options from remoe.toml: which file decides, and what a wrong one is told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import read_json
from remoe_cli.cli import app
from remoe_cli.plan.document import Plan
from tests.support.synthetic import synthetic_profile

Write = Callable[[str, str], Path]
Remoe = Callable[..., tuple[int, Any]]


@pytest.fixture
def remoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Remoe:
    """Runs a command in this process, and returns its code and its document."""

    def run(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments, "--json"])
        code = app.run()
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the test's folder; the user's settings are in `user`, and the current folder is `project/inner`."""
    (tmp_path / "project" / "inner").mkdir(parents=True)
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("REMOE_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path / "project" / "inner")

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return written


def shown(remoe: Remoe) -> dict[str, tuple[Any, str]]:
    code, document = remoe("config", "show")
    assert code == 0, document
    return {f"{each['command']} {each['option']}": (each["value"], each["source"]) for each in document["options"]}


def test_the_projects_file_goes_before_the_users(write: Write, remoe: Remoe) -> None:
    user = write("user/remoe.toml", '[plan]\ncatalog = "local"\nn-in = 7\n')
    project = write("project/remoe.toml", '[plan.make]\ncatalog = "prices/own.toml"\n[deploy]\ntag = ["a=b"]\n')
    assert shown(remoe) == {
        "plan make catalog": (str(project.parent / "prices/own.toml"), str(project)),
        "plan make n-in": (7, str(user)),
        "deploy tag": (["a=b"], str(project)),
    }


def test_a_command_takes_what_the_file_says_and_the_command_line_goes_first(write: Write, tmp_path: Path, remoe: Remoe) -> None:
    profile = synthetic_profile(tmp_path / "profile", experts=4)
    write("project/remoe.toml", '[plan]\nn-in = 17\nn_out = 5\noutput = "made.json"\n')
    assert remoe("plan", str(profile.path))[0] == 0
    made = read_json(tmp_path / "project" / "made.json", Plan)
    assert (made.workload.n_in, made.workload.n_out) == (17, 5)
    assert remoe("plan", str(profile.path), "--n-in", "9", "-o", "other.json")[0] == 0
    other = read_json(Path("other.json"), Plan)
    assert (other.workload.n_in, other.workload.n_out) == (9, 5)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[plann]\nx = 1", "has [plann], which is no command", "Did you mean 'plan'?"),
        ("[plan]\ncatalogue = 'x'", "has 'catalogue' in [plan.make], which is no option of 'remoe plan make'", "Did you mean 'catalog'?"),
        ("[plan.show]\nprofile = 1", "which is no option of 'remoe plan show'", "See"),
        ("plan = 3", "has 'plan' as a value, but it is a command", "Write a table: [plan]."),
        ("x =", "is not TOML", "Correct it"),
        ("[deploy]\nyes = true", "sets 'yes', which is said on the command line only", "Remove it"),
        ("[deploy]\naccept-loss = true", "sets 'accept-loss', which is said on the command line only", "Remove it"),
        ("[serve]\nhost = '0.0.0.0'", "sets 'host', which is said on the command line only", "Remove it"),
        ("[cost]\ncsv = true", "sets 'csv', which is said on the command line only", "Remove it"),
        ("[serve]\ntoken-file = 'token'", "sets 'token-file', which is not taken from a project's file", "Say it on the command line"),
        ("[destroy]\ntarget = 'aws'", "sets 'target', which is not taken from a project's file", "Say it on the command line"),
        ("[deploy]\ntag = 'a=b'", "sets 'tag' to 'a=b', and --tag takes a list", "See 'remoe deploy --help'"),
        ("[deploy]\nregion = ['a']", "sets 'region' to ['a'], and --region takes one value", "See 'remoe deploy --help'"),
        ("[infer.deep]\nx = 1", "'deep' in [infer]", "See"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, hint: str, write: Write, remoe: Remoe) -> None:
    path = write("project/remoe.toml", text)
    code, failed = remoe("config", "show")
    assert code == 2
    assert failed["error"]["message"].startswith(str(path)) and message in failed["error"]["message"]
    assert hint in failed["error"]["hint"]


def test_a_value_of_the_wrong_kind_names_the_option(write: Write, remoe: Remoe) -> None:
    write("project/remoe.toml", "[plan]\nrequests-per-hour = 'many'")
    code, failed = remoe("plan", "p", "-o", "x.json")
    assert code == 2 and "--requests-per-hour is 'many', not a number" in failed["error"]["message"]
    assert failed["error"]["hint"] == "The value is that of a remoe.toml: see 'remoe config show'."


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_another_user_is_left_aside(write: Write, remoe: Remoe) -> None:
    os.chown(write("project/remoe.toml", "[status]\ntarget = 'aws'"), 12345, 12345)
    assert shown(remoe) == {}


def test_folders_say_what_moves_them(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, remoe: Remoe) -> None:
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.delenv("REMOE_STATE_DIR", raising=False)
    folders = {each["name"]: (each["value"], each["source"]) for each in remoe("config", "show")[1]["folders"]}
    assert folders["cache"] == (str(tmp_path / "c"), "REMOE_CACHE_DIR")
    assert folders["config"][1] == "REMOE_CONFIG_DIR" and folders["state"][1] == "default"


def test_the_user_may_set_what_a_project_may_not(write: Write, remoe: Remoe) -> None:
    user = write("user/remoe.toml", "[serve]\ntoken-file = 'token'\n[destroy]\ntarget = 'aws'\n")
    assert shown(remoe) == {"serve token-file": (str(user.parent / "token"), str(user)), "destroy target": ("aws", str(user))}


def test_prompts_are_a_file_of_the_project_where_there_is_one(write: Write, remoe: Remoe) -> None:
    prompts, project = (
        write("project/prompts.jsonl", ""),
        write("project/remoe.toml", "[profile]\ndata = 'prompts.jsonl'\n[infer]\ndata = 'hub/id'\n"),
    )
    assert shown(remoe) == {"profile run data": (str(prompts), str(project)), "infer data": ("hub/id", str(project))}
