"""Interrupted at any point, remoe leaves the old content or the new one, and its next call leaves nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import owned, recognise
from remoe_cli.artifacts import write_json
from tests.test_owned import Note, build, texts

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "open")


@contextmanager
def dying(at: int) -> Iterator[None]:
    """End this process without any cleaning up at the `at`th change of the file system."""
    left = at

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    for name in CHANGES:
        setattr(os, name, before(getattr(os, name)))
    owned._exchanged = before(owned._exchanged)
    yield


def in_child(at: int, work: Callable[[], None]) -> int:
    """Do the work in a process of its own that dies at the `at`th change; return its exit status."""
    pid = os.fork()
    if not pid:
        try:
            with dying(at):
                work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("swap", [True, False], ids=["swapped at once", "one after the other"])
def test_a_kill_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(owned, "_exchanged", lambda one, other: False)
    old = {"inner/a.txt": b"old", "b.txt": b"old"}
    for at in range(1, 200):
        folder = tmp_path / str(at)
        out = folder / "out"
        build(out, "old")
        status = in_child(at, lambda out=out: build(out, "new"))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL)
        if not swap:
            owned.clean(out)  # as the next command does first: between the two renames there is neither
        assert texts(out) in (old, {name: b"new" for name in old}), f"at change {at}"
        build(out, "next")
        assert texts(out) == {name: b"next" for name in old} and os.listdir(folder) == ["out"], f"at change {at}"
        if status == 0:
            assert at > 15
            return
    raise AssertionError("it never ends")


def test_a_kill_at_any_point_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    for at in range(1, 50):
        path = tmp_path / str(at) / "note.json"
        write_json(path, Note(text="old"))
        status = in_child(at, lambda path=path: write_json(path, Note(text="new")))  # type: ignore[misc]
        assert any(f'"text": "{text}"' in path.read_text() for text in ("old", "new"))
        write_json(path, Note(text="next"))
        assert '"text": "next"' in path.read_text() and os.listdir(path.parent) == ["note.json"]
        if status == 0:
            assert at > 2
            return
    raise AssertionError("it never ends")


def test_what_is_under_way_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    with owned.new_folder(tmp_path / "out", "package") as slow:
        build(tmp_path / "out", "fast")
        assert slow.is_dir()
        (slow / "b.txt").write_text("slow")
    assert texts(tmp_path / "out") == {"b.txt": b"slow"}
    with owned.writing(tmp_path / "note.json", recognise.ANY) as slow:
        write_json(tmp_path / "note.json", Note(text="fast"))
        slow.write_text("slow")
    assert (tmp_path / "note.json").read_text() == "slow"
    assert sorted(os.listdir(tmp_path)) == ["note.json", "out"]


def test_files_with_names_like_what_is_left_behind_stay(tmp_path: Path) -> None:
    kept = (".note.json.bak", ".note.json.remoe-notes", ".note.json.remoe-12345678.txt")
    kept += ("note.json.remoe-12345678", ".other.json.remoe-12345678")
    for name in kept:
        (tmp_path / name).write_text("mine")
    write_json(tmp_path / "note.json", Note(text="new"))
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "note.json"])
