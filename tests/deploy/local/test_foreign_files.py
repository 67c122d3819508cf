"""Directories of deployments with files that remoe did not make."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe_cli import owned
from remoe_cli.deploy.local import lifecycle, processes
from remoe_cli.deploy.local.config import TwinConfig
from remoe_cli.errors import HeldError, UsageError
from tests.deploy.local.test_lifecycle import config, invoke, root, start, until
from tests.support import forked
from tests.support.trees import tree

__all__ = ["root"]  # a fixture


def thesis(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")


def dead(root: Path) -> Path:
    """The directory of a deployment whose supervisor was killed."""
    started = start(config(root), {"plan.json": b"{}"})
    invoke(started["endpoint"], 1)
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: processes.start_time(started["pid"]) is None)
    return lifecycle.state_dir("t")


def refused(folder: Path) -> TwinConfig:
    pytest.fail(f"{folder} is written to")


@pytest.mark.parametrize("place", ["thesis.tex", "logs/thesis.tex", "logs/functions/f/thesis.tex", "bundle/thesis.tex", "main/thesis.tex"])
def test_a_dead_deployment_with_a_foreign_file(root: Path, place: str) -> None:
    folder = dead(root)
    thesis(folder / place)
    before = tree(folder)
    with pytest.raises(UsageError, match=rf"t holds files that remoe did not make, such as {place}\."):
        lifecycle.start("t", refused)
    assert tree(folder) == before
    assert lifecycle.destroy("t") == [folder / place]
    assert tree(folder) == {place: b"years of work"} and lifecycle.names() == []
    for action in (lifecycle.status, lifecycle.destroy, lifecycle.logs):
        with pytest.raises(UsageError, match="holds files that remoe did not make"):
            action("t")
    (folder / place).unlink()
    start(config(root))
    lifecycle.destroy("t")
    assert list(lifecycle.state_root().iterdir()) == []


def test_a_foreign_link_is_neither_followed_nor_deleted(root: Path) -> None:
    folder = dead(root)
    thesis(root / "mine" / "thesis.tex")
    (folder / "bundle").symlink_to(root / "mine")
    with pytest.raises(UsageError, match="such as bundle"):
        lifecycle.start("t", refused)
    assert lifecycle.destroy("t") == [folder / "bundle"]
    assert tree(folder) == {"bundle": f"-> {root / 'mine'}"} and tree(root / "mine") == {"thesis.tex": b"years of work"}
    (folder / "bundle").unlink()


def put_link(folder: Path) -> None:
    thesis(folder.parents[2] / "mine" / "thesis.tex")
    folder.symlink_to(folder.parents[2] / "mine")


def put_link_to_deployment(folder: Path) -> None:
    (folder.parents[2] / "mine").mkdir()
    owned.write_mark(folder.parents[2] / "mine", "deployment")
    folder.symlink_to(folder.parents[2] / "mine")


@pytest.mark.parametrize(
    "put",
    [
        lambda folder: thesis(folder / "thesis.tex"),
        lambda folder: thesis(folder / "logs" / "thesis.tex"),
        lambda folder: thesis(folder / "twin.json"),  # by another program
        thesis,
        put_link,
        put_link_to_deployment,
        lambda folder: folder.symlink_to("nowhere"),
    ],
)
def test_what_is_no_deployment_is_left_alone(root: Path, put: Callable[[Path], None]) -> None:
    folder = lifecycle.state_dir("t")
    folder.parent.mkdir(parents=True)
    put(folder)
    before = tree(root)
    for action in (lambda: lifecycle.start("t", refused), lambda: lifecycle.destroy("t")):
        with pytest.raises(UsageError):
            action()
    assert tree(root) == before and lifecycle.names() == []
    folder.unlink() if folder.is_symlink() or folder.is_file() else None


def test_a_running_deployment_is_held_whatever_else_is_in_its_directory(root: Path) -> None:
    start(config(root))
    thesis(lifecycle.state_dir("t") / "thesis.tex")
    with pytest.raises(HeldError, match="is running"):
        start(config(root))
    assert lifecycle.destroy("t") == [lifecycle.state_dir("t") / "thesis.tex"]
    (lifecycle.state_dir("t") / "thesis.tex").unlink()


def test_the_command_says_what_it_kept(root: Path) -> None:
    for arguments in ((), ("--json",)):
        start(config(root))
        notes = lifecycle.state_dir("t") / "thesis.tex"
        thesis(notes)
        run = forked.remoe("destroy", "t", *arguments)
        assert run.returncode == 0, run.stderr
        if arguments:
            assert json.loads(run.stdout)["kept"] == [str(notes)]
        else:
            assert run.stdout == f"t is gone.\n  kept, because remoe did not make it: {notes}\n"
        notes.unlink()


def test_a_deployment_of_a_version_without_marks_is_taken_over(root: Path) -> None:
    folder = dead(root)
    (folder / owned.MARK).unlink()
    thesis(folder / "notes.txt")
    with pytest.raises(UsageError, match=r"such as notes\.txt"):
        lifecycle.start("t", refused)
    (folder / "notes.txt").unlink()
    assert lifecycle.names() == ["t"]
    start(config(root))
    assert owned.read_mark(folder)
