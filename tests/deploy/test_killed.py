"""`remoe deploy` on the twin is killed at points from its first change to its last: destroy leaves nothing, deploy works again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import DeployError
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import LayerPlan, read_plan
from remoe_cli.profile.record import read_profile
from tests.support import forked
from tests.support.by_hand import by_hand

LAYERS = (LayerPlan(layer=0, remote=(1, 2), memory_mb=1769, replicas=1), LayerPlan(layer=1, remote=(), memory_mb=0, replicas=0))
POINTS = 5
# What changes something outside of the process, as Python's audit events tell it.
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.posix_spawn",
    "socket.bind",
    "shutil.rmtree",
)


def deploy(plan: Path, at: int, counted: Path) -> None:
    """Deploy as the command does, and end without any cleaning up before the `at`th change; 0: never, and say how many there were."""
    profile = read_profile(plan.parent / "profile")
    found = (read_plan(plan), profile, read_catalog("local"))
    target.read_inputs = lambda path: found
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    target.LocalTarget(SILENT).deploy(plan, "d", DeployOptions())
    counted.write_text(str(seen))


def processes_of(folder: Path) -> Iterator[str]:
    """Command lines of processes that name the folder."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if str(folder) in command:
                yield command


def destroyed(state: Path) -> None:
    """Destroy what there is; then there is nothing, and no process."""
    try:
        lifecycle.destroy("d")
    except DeployError:  # it had not begun
        assert lifecycle.names() == []
    assert not list(lifecycle.state_root().glob("*")) if lifecycle.state_root().exists() else True
    assert not list(processes_of(state))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_kill_at_any_point_of_a_deploy_leaves_what_destroy_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand(tmp_path, LAYERS)
    state, counted = tmp_path / "state", tmp_path / "counted"
    monkeypatch.setenv("REMOE_STATE_DIR", str(state))
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))
    assert forked.complete(deploy, made.plan_path, 0, counted).returncode == 0
    destroyed(state)
    changes = int(counted.read_text())
    assert changes > 2 * POINTS
    killed = 0
    for point in range(POINTS):
        at = 1 + point * (changes - 2) // (POINTS - 1)
        run = forked.complete(deploy, made.plan_path, at, counted)
        killed += run.returncode == -signal.SIGKILL
        assert run.returncode in (0, -signal.SIGKILL), f"{run.stderr} at change {at} of {changes}"
        if point == 1:  # who deploys again need not destroy first
            again = forked.complete(deploy, made.plan_path, 0, counted)
            assert again.returncode == 0, again.stderr
        destroyed(state)
    assert killed >= POINTS - 1  # a later run may have fewer changes than the first, whose digests are remembered
