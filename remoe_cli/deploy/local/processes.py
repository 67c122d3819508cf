"""Look at other processes and end them; a new process with an old pid is not mistaken for the old one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.deploy.local.config import ProcessRef


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process in bytes: resident now, its peak, and the anonymous part of it now."""

    resident_bytes: int = 0
    peak_bytes: int = 0
    anonymous_bytes: int = 0


def start_time(pid: int) -> str | None:
    """Return when `pid` started, as the system says it; None when it is gone or a zombie.

    On Linux it is in clock ticks since boot.
    """
    if Path("/proc/self/stat").exists():
        fields = _stat(pid)
        return None if not fields or fields[0] in "ZX" else fields[19]
    run = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    answer = run.stdout.split(maxsplit=1)
    return answer[1].strip() if len(answer) == 2 and not answer[0].startswith("Z") else None


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped `pid`, until SIGCONT; a debugger's stop does not count."""
    return _stat(pid)[:1] == ["T"]


def _stat(pid: int) -> list[str]:
    """Return the fields of Linux's /proc/PID/stat from the state on; none when there is no such process."""
    try:
        # The command name may hold spaces and brackets, so count fields from the last bracket.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def reference(pid: int) -> ProcessRef | None:
    """Return the process that has `pid` now; None if there is none."""
    started = start_time(pid)
    return None if started is None else ProcessRef(pid=pid, start_time=started)


def is_alive(process: ProcessRef) -> bool:
    return start_time(process.pid) == process.start_time


def end(processes: Sequence[ProcessRef]) -> tuple[ProcessRef, ...]:
    """Kill each process with its process group, wait for the ends, and return those that survive."""
    for process in processes:
        if is_alive(process):
            with suppress(ProcessLookupError, PermissionError):
                # Every process of the twin leads its own group; one that does not (yet) is killed alone.
                (os.killpg if os.getpgid(process.pid) == process.pid else os.kill)(process.pid, signal.SIGKILL)
    return await_end(processes, 5.0)


def await_end(processes: Sequence[ProcessRef], wait_s: float, *, unless_stopped: bool = False) -> tuple[ProcessRef, ...]:
    """Wait at most `wait_s` for processes to end; return those that survive. Own children are reaped.

    With `unless_stopped` there is no waiting for processes that a signal has stopped.
    """
    give_up = time.monotonic() + wait_s
    while True:
        for process in processes:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        left = tuple(process for process in processes if is_alive(process))
        if not left or time.monotonic() > give_up or (unless_stopped and all(is_stopped(process.pid) for process in left)):
            return left
        time.sleep(0.01)


def memory(pid: int) -> ProcessMemory:
    """Return the memory of `pid`; zeros when it is gone or the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ProcessMemory()
    size = {key: int(rest.split()[0]) << 10 for key, _, rest in (line.partition(":") for line in lines) if rest.endswith(" kB")}
    return ProcessMemory(size.get("VmRSS", 0), size.get("VmHWM", 0), size.get("RssAnon", 0))
