"""What remoe made earlier is replaced after a question, or with --yes: by every command that has an output."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer.main

from remoe_cli import recognise
from remoe_cli.artifacts import write_arrays, write_json
from remoe_cli.cli import app
from remoe_cli.plan.export import export
from remoe_cli.profile.record import read_profile
from tests.support.synthetic import plan_by_hand, synthetic_profile
from tests.support.trees import tree

Run = Callable[..., tuple[int, str]]


class Terminal(StringIO):
    """A terminal on which somebody has typed."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def remoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a folder with a profile, a plan and something of each kind, where `typed` is what somebody answers."""
    profile = synthetic_profile(tmp_path / "profile", experts=4)
    synthetic_profile(tmp_path / "made")
    for name in ("plan.json", "made.json"):
        write_json(tmp_path / name, plan_by_hand(()))
    write_arrays(tmp_path / "made.safetensors", {"activation": profile.arrays["prompt_vectors"]}, "prediction")
    export(profile.path, "sglang", tmp_path / "sglang.json")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, typed: str | None = None) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
        monkeypatch.setattr(sys, "stdin", StringIO() if typed is None else Terminal(typed))
        return app.run(), capsys.readouterr().err

    return run


MADE = [
    ("plan", "profile", "-o", "made.json"),
    ("predict", "profile", "--prompt", "x", "-o", "made.safetensors"),
    ("export", "profile", "--to", "sglang", "-o", "sglang.json"),
    ("profile", "merge", "profile", "-o", "made"),
    ("profile", "measure", "nobody", "-o", "made"),
]


@pytest.mark.parametrize("arguments", MADE, ids=" ".join)
def test_what_remoe_made_stays_where_nobody_can_be_asked(remoe: Run, arguments: tuple[str, ...], tmp_path: Path) -> None:
    before = tree(tmp_path)
    for more, typed in (((), None), (("--json",), "y\n")):
        code, said = remoe(*arguments, *more, typed=typed)
        assert code == 2 and tree(tmp_path) == before
    assert "exists already, and nobody can be asked whether to replace it." in remoe(*arguments)[1]
    code, said = remoe(*arguments, typed="n\n")
    assert (
        code == 1 and "Replace made" in said.replace("sglang.json", "made") and "as you did not agree" in said and tree(tmp_path) == before
    )


@pytest.mark.parametrize(("more", "typed"), [(("--yes",), None), ((), "y\n")])
def test_it_is_replaced_by_who_agrees(remoe: Run, more: tuple[str, ...], typed: str | None, tmp_path: Path) -> None:
    before = (tmp_path / "made.json").read_bytes()
    assert remoe("plan", "profile", "-o", "made.json", *more, typed=typed)[0] == 0
    assert (tmp_path / "made.json").read_bytes() != before
    read_profile(tmp_path / "made")


def test_what_is_new_or_empty_needs_no_answer(remoe: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "new.json"):
        assert remoe("plan", "profile", "-o", name)[0] == 0


def test_a_report_of_nothing_asks_nothing(remoe: Run, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(recognise._REPORT)
    code, said = remoe("report", "my-remote", typed="n\n")
    assert code == 2 and "There is no file or folder my-remote." in said and "Replace" not in said
    code, said = remoe("report", "plan.json", typed="n\n")
    assert code == 1 and "Replace report.html?" in said


def test_every_command_with_an_output_asks() -> None:
    """A command with --output has --yes, and its module asks."""

    def walk(command: Any, name: str) -> None:
        for key, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {key}".strip())
        options = {option for parameter in command.params for option in parameter.opts}
        if "--output" in options:
            module = sys.modules[inspect.unwrap(command.callback).__module__]
            assert "--yes" in options and "agree_to_replace(" in inspect.getsource(module), name

    walk(typer.main.get_command(app.app), "")
