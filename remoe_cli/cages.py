"""Limit the memory and the CPU of one worker process, by the best mechanism that this machine allows.

    cgroup-v2, cgroup-v1   the kernel counts and kills; it reclaims page cache (mapped weights) first
    rlimit                 `ulimit -d` limits private writable memory, and the caller polls anonymous memory and kills

RLIMIT_AS would refuse to map weights, and Linux ignores RLIMIT_RSS, so neither is used. A small shell moves a worker into its groups before
exec, so that nothing of the interpreter escapes the count.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from remoe_cli.lambda_limits import vcpus

PERIOD_US = 20_000
SMALLEST_QUOTA_US = 1_000  # the kernel refuses less
_REMOVE_S = 2.0  # for what was killed to be gone

_JOIN_GROUPS = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'
_SET_RLIMIT = 'ulimit -d "$1" || exit 125; shift; exec "$@"'


@dataclass(frozen=True)
class Mechanism:
    """How workers are limited. Each root holds one group per worker; under v2 both roots are the same.

    parent_death   an argv prefix that makes the kernel kill a worker when the supervisor dies, where the machine has one
    """

    memory: Literal["cgroup-v2", "cgroup-v1", "rlimit"]
    cpu: Literal["cfs-quota", "threads-only"]
    memory_root: Path | None = None
    cpu_root: Path | None = None
    parent_death: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(root for root in (self.memory_root, self.cpu_root) if root))


@dataclass(frozen=True)
class Cage:
    """The limits of one worker, named `label` in the mechanism's groups."""

    mechanism: Mechanism
    label: str
    memory_mb: int

    @property
    def groups(self) -> tuple[Path, ...]:
        return tuple(root / self.label for root in self.mechanism.groups)


def rlimit_only() -> Mechanism:
    return Mechanism("rlimit", "threads-only", parent_death=_parent_death())


def probe(label: str) -> Mechanism:
    """Try each mechanism for real, best first; return the first that works, with groups named `label`."""
    for memory_root in _made("cgroup-v2", "memory", label):
        cpu = _write(memory_root / "cgroup.subtree_control", "+cpu")
        return Mechanism("cgroup-v2", "cfs-quota" if cpu else "threads-only", memory_root, memory_root if cpu else None, _parent_death())
    for memory_root in _made("cgroup-v1", "memory", label):
        cpu_root = next(_made("cgroup-v1", "cpu", label), None)
        return Mechanism("cgroup-v1", "cfs-quota" if cpu_root else "threads-only", memory_root, cpu_root, _parent_death())
    return rlimit_only()


def make(cage: Cage) -> None:
    """Make the worker's groups and set its memory limit. Raises: OSError when the kernel refuses."""
    for group in cage.groups:
        group.mkdir(exist_ok=True)
    limit = str(cage.memory_mb << 20)
    match cage.mechanism.memory, cage.groups:
        case "cgroup-v2", (group, *_):
            (group / "memory.max").write_text(limit)
            _write(group / "memory.swap.max", "0")
            _write(group / "memory.oom.group", "1")
        case "cgroup-v1", (group, *_):
            (group / "memory.limit_in_bytes").write_text(limit)
            _write(group / "memory.memsw.limit_in_bytes", limit)


def launcher(cage: Cage, argv: Sequence[str]) -> list[str]:
    """Return the argv that starts `argv` in the cage; it ends with status 125 when a limit cannot be set."""
    argv = [*cage.mechanism.parent_death, *argv]
    if cage.mechanism.memory == "rlimit":
        return ["/bin/sh", "-c", _SET_RLIMIT, "sh", str(cage.memory_mb << 10), *argv]
    return inside(cage.groups, argv)


def inside(groups: Sequence[Path], argv: Sequence[str]) -> list[str]:
    """Return the argv that starts `argv` in `groups`; it ends with status 125 when it cannot join them."""
    return ["/bin/sh", "-c", _JOIN_GROUPS, "sh", *map(str, groups), "--", *argv]


def limit_cpu(cage: Cage) -> None:
    """Set the CPU quota, where there is one, after init, which Lambda runs on full CPU."""
    share = vcpus(cage.memory_mb)
    if cage.mechanism.cpu_root is not None and share < (os.cpu_count() or 1):
        set_cpu_share(cage.mechanism, cage.mechanism.cpu_root / cage.label, share)


def set_cpu_share(mechanism: Mechanism, group: Path, share: float) -> None:
    """Let a group's processes run for `share` of each period; each period starts anew."""
    quota_us = max(SMALLEST_QUOTA_US, round(share * PERIOD_US))
    if mechanism.memory == "cgroup-v2":
        _write(group / "cpu.max", f"{quota_us} {PERIOD_US}")
    else:
        _write(group / "cpu.cfs_period_us", str(PERIOD_US))
        _write(group / "cpu.cfs_quota_us", str(quota_us))


def was_oom_killed(cage: Cage) -> bool:
    """Return whether the kernel killed something in the cage for lack of memory; False under rlimit."""
    if cage.mechanism.memory_root is None:
        return False
    file = cage.mechanism.memory_root / cage.label / ("memory.events" if cage.mechanism.memory == "cgroup-v2" else "memory.oom_control")
    with suppress(OSError):
        return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in file.read_text().splitlines())
    return False


def peak_bytes(cage: Cage) -> int:
    """Return the most memory that the cage held, page cache included; 0 where nobody counts."""
    if cage.mechanism.memory_root is None:
        return 0
    file = "memory.peak" if cage.mechanism.memory == "cgroup-v2" else "memory.max_usage_in_bytes"
    with suppress(OSError, ValueError):
        return int((cage.mechanism.memory_root / cage.label / file).read_text())
    return 0


def named(label: str) -> list[Path]:
    """Find every group named `label` on this machine, wherever it was made."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return []
    roots = dict.fromkeys(mount for _, mount, kind, *_ in mounts if kind in ("cgroup", "cgroup2"))
    return [Path(folder) / label for root in roots for folder, inner, _ in os.walk(root) if label in inner]


def remove(group: Path) -> bool:
    """Kill everything in `group` and below it, and remove the group; return whether it is gone."""
    give_up = time.monotonic() + _REMOVE_S
    while group.is_dir():
        for folder, _, _ in os.walk(group, topdown=False):
            _kill_members(Path(folder))
            with suppress(OSError):
                os.rmdir(folder)
        if group.is_dir():
            if time.monotonic() > give_up:
                return False
            time.sleep(0.005)
    return True


def _kill_members(group: Path) -> None:
    with suppress(OSError):
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)


def _made(version: str, controller: str, label: str) -> Iterator[Path]:
    """Make `label` in each possible parent, and yield where a child group takes a limit and a process.

    This process's own group comes first, which keeps any limit that is on it.
    """
    for parent in _candidates(version, controller):
        group = parent / label
        remove(group)
        if _try(group, version, controller):
            yield group
        else:
            remove(group)


def _try(group: Path, version: str, controller: str) -> bool:
    file, value = {
        ("cgroup-v2", "memory"): ("memory.max", str(1 << 30)),
        ("cgroup-v1", "memory"): ("memory.limit_in_bytes", str(1 << 30)),
        ("cgroup-v1", "cpu"): ("cpu.cfs_quota_us", str(PERIOD_US)),
    }[version, controller]
    child = group / "probe"
    try:
        group.mkdir()
        if version == "cgroup-v2":
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        child.mkdir()
        if not (child / file).exists():
            return False
        (child / file).write_text(value)
    except OSError:
        return False
    entered = subprocess.run(["/bin/sh", "-c", _JOIN_GROUPS, "sh", str(child), "--", "true"], capture_output=True, check=False)
    return remove(child) and entered.returncode == 0


def _candidates(version: str, controller: str) -> Iterator[Path]:
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    kind = {"cgroup-v2": "cgroup2", "cgroup-v1": "cgroup"}[version]
    for _, mount, found, options, *_ in mounts:
        if found != kind or (kind == "cgroup" and controller not in options.split(",")):
            continue
        for _, controllers, path in own:
            if (controller in controllers.split(",")) if kind == "cgroup" else not controllers:
                here = Path(mount) / path.lstrip("/")
                yield from (folder for folder in (here, *here.parents) if folder.is_dir() and folder.is_relative_to(mount))


def _parent_death() -> tuple[str, ...]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ()
    prefix = (setpriv, "--pdeathsig", "KILL")
    return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else ()


def _write(file: Path, value: str) -> bool:
    try:
        file.write_text(value)
    except OSError:
        return False
    return True
