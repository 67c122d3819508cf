"""A full disk and a cut off file at every place where state is written: the old content stays, and the next command goes on.

The kernel limits how large a file may become, so that a write fails after so many bytes wherever it is made, in Python or in a library.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli import artifacts, digests, owned
from remoe_cli.deploy.local.config import ProcessRef, SupervisorRecord
from remoe_cli.errors import RemoeError
from remoe_cli.model.checkpoint import find
from remoe_cli.package import partial_checkpoint
from remoe_cli.package.partial_checkpoint import MainManifest
from remoe_cli.plan.document import read_plan
from remoe_cli.profile.record import read_profile, write_profile
from tests.support.families import save
from tests.support.synthetic import plan_by_hand, synthetic_profile


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file may have more than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class State:
    """A kind of state: how one of two contents is written to a path, how it is read, and which files it has."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]
    files: tuple[str, ...] = ("",)


def write_supervisor(path: Path, number: int) -> None:
    artifacts.write_json(path, SupervisorRecord(process=ProcessRef(pid=number, start_time="1"), endpoint="http://x:1", groups=()))


def write_share(path: Path, number: int) -> None:
    model = path.with_name("model")
    if not model.exists():
        save("mixtral", torch.bfloat16, model, fused=False)
    with owned.new_folder(path, "package") as folder:
        partial_checkpoint.write_partial_checkpoint(find(str(model)), {0: (number,)}, folder)
        partial_checkpoint.seal(folder)


def read_share(path: Path) -> object:
    manifest = artifacts.read_json(path / "main.json", MainManifest)
    for file in manifest.files:
        if artifacts.sha256_file(path / file.name) != file.sha256:
            raise artifacts.ArtifactError(f"{file.name} differs.")
    return find(str(path)).held()


def write_a_profile(path: Path, number: int) -> None:
    made = synthetic_profile(path.with_name(f"made-{number}"), prompts=2 + number, hidden_size=8)
    write_profile(path, made.record, made.arrays)


STATES: dict[str, State] = {
    "plan": State(lambda path, number: artifacts.write_json(path, plan_by_hand((), ttft_s=float(number))), read_plan),
    "arrays": State(
        lambda path, number: artifacts.write_arrays(path, {"a": np.full(5000, number)}, "prediction"),
        lambda path: artifacts.read_arrays(path)["a"].tolist(),
    ),
    "profile": State(
        write_a_profile, lambda path: read_profile(path).arrays["prompt_tokens"].tolist(), ("profile.json", "arrays.safetensors")
    ),
    "state of a deployment": State(write_supervisor, lambda path: artifacts.read_json(path, SupervisorRecord)),
    "main function's files": State(write_share, read_share, ("main.json", "config.json", "share.json", "weights-0000.safetensors")),
    "mark of a folder": State(
        lambda path, number: (path.mkdir(exist_ok=True), owned.write_mark(path, f"kind {number}")), owned.read_mark, (".remoe",)
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", STATES)
def test_a_full_disk_leaves_the_old_content(name: str, tmp_path: Path) -> None:
    state, path = STATES[name], tmp_path / "state"
    for number in (1, 2):
        state.write(tmp_path / f"{number}", number)  # what both need beside it
    state.write(path, 1)
    old = state.read(path)
    there = sorted(tmp_path.iterdir())
    largest = max((path / file).stat().st_size for file in state.files)
    for size in (0, 1, largest // 2, largest - 1):
        with full_after(size), pytest.raises((OSError, RemoeError)) as raised:
            state.write(path, 2)
        assert "\n" not in str(raised.value)
        assert state.read(path) == old and sorted(tmp_path.iterdir()) == there
    state.write(path, 2)
    assert state.read(path) != old and sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("name", STATES)
def test_a_file_that_is_cut_off_is_noticed_and_written_again(name: str, tmp_path: Path) -> None:
    state, path = STATES[name], tmp_path / "state"
    state.write(path, 1)
    for file in state.files:
        whole = (path / file).read_bytes()
        for length in sorted({0, 1, len(whole) // 2, len(whole) - 2}):
            (path / file).write_bytes(whole[:length])
            if name == "mark of a folder":
                assert state.read(path) is None
                continue
            with pytest.raises(RemoeError) as raised:
                state.read(path)
            assert "\n" not in raised.value.message
        if name not in ("main function's files", "mark of a folder"):
            state.write(path, 2)
            assert state.read(path)
        (path / file).write_bytes(whole)
    if name == "profile":
        state.write(path, 1)
    assert state.read(path)


def test_a_full_disk_costs_the_cache_of_digests_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    (tmp_path / "a").write_bytes(b"content")
    expected = digests.sha256_of([tmp_path / "a"])
    (tmp_path / "b").write_bytes(b"other")
    with full_after(0):
        assert digests.sha256_of([tmp_path / "a", tmp_path / "b"])[0] == expected[0]
    assert digests._read()


def test_the_command_line_says_that_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from remoe_cli.cli import app

    synthetic_profile(tmp_path / "profile")
    monkeypatch.setattr("sys.argv", ["remoe", "plan", str(tmp_path / "profile"), "-o", str(tmp_path / "plan.json"), "--quiet"])
    with full_after(100):
        assert app.run() == 1
    said = capsys.readouterr().err
    assert "The system refused" in said and "please report" not in said and not (tmp_path / "plan.json").exists()
