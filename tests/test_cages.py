"""What the twin holds functions to, as AWS does: memory, processor share, payloads, idle time, and what a worker leaves behind."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import cages
from remoe_cli.deploy.local import processes
from tests.support.handlers import report, server


@pytest.fixture
def serve(tmp_path: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return server(tmp_path, probed, monkeypatch)


def test_log_tail_is_at_most_4_kb(serve: Any) -> None:
    with serve("app.chatter") as twin:
        answer = twin.raw(b"1000000", LogType="Tail")
        assert len(base64.b64decode(answer["LogResult"])) == 4096
        assert "init" in report(answer)


@pytest.mark.parametrize("forced", [None, cages.rlimit_only()], ids=["probed", "rlimit"])
def test_memory_limit_is_enforced_and_named(serve: Any, forced: cages.Mechanism | None, tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    with weights.open("wb") as file:
        file.truncate(300 << 20)
    with serve("app.hog", memory_mb=128, mechanism=forced) as twin:
        assert twin.call(60) == 60  # what fits is let be
        answer = twin.raw(b"400", LogType="Tail")
        fault = json.loads(answer["body"])
        assert fault["errorType"] == "Runtime.OutOfMemory" and "signal: killed" in fault["errorMessage"]
        assert report(answer)["used"] == 128
        assert twin.call(1) == 1
    with serve("app.map_file", memory_mb=128, mechanism=forced) as twin:
        assert twin.call(str(weights)) == 0  # mapped files larger than the limit are not the worker's own memory


def test_rlimit_is_set_before_the_worker_starts(serve: Any, tmp_path: Path) -> None:
    source = "import resource\nLIMIT = resource.getrlimit(resource.RLIMIT_DATA)\ndef f(event, context): return LIMIT\n"
    (tmp_path / "code" / "bound.py").write_text(source)
    with serve("bound.f", memory_mb=200, mechanism=cages.rlimit_only()) as twin:
        assert twin.call() == [200 << 20, 200 << 20]


def test_memory_poll_kills_what_the_rlimit_does_not_count(serve: Any, tmp_path: Path) -> None:
    """Pages that were written and then made read-only are no longer the rlimit's business, but they are still memory."""
    (tmp_path / "code" / "frozen.py").write_text(
        "import ctypes, mmap, time\n"
        "def f(event, context):\n"
        "    libc, kept = ctypes.CDLL(None), []\n"
        "    for _ in range(6):\n"
        "        block = mmap.mmap(-1, 50 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "        for offset in range(0, len(block), 4096): block[offset] = 1\n"
        "        start = ctypes.addressof(ctypes.c_char.from_buffer(block))\n"
        "        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(len(block)), mmap.PROT_READ) == 0\n"
        "        kept.append(block)\n"
        "    time.sleep(5)\n"
    )
    with serve("frozen.f", memory_mb=128, mechanism=cages.rlimit_only()) as twin:
        assert twin.fault()["errorType"] == "Runtime.OutOfMemory"


@pytest.mark.alone
def test_cpu_quota(serve: Any, probed: cages.Mechanism) -> None:
    if probed.cpu != "cfs-quota":
        pytest.skip("this machine has no CPU quota to set")
    with serve("app.spin", memory_mb=512) as twin:
        twin.call(0.1)
        assert twin.call(1.0) == pytest.approx(512 / 1769, abs=0.08)


def test_6_mb_both_ways_and_not_a_byte_more(serve: Any) -> None:
    limit = 6_291_456
    full = b'"' + b"A" * (limit - 2) + b'"'
    with serve("app.echo") as twin:
        assert twin.raw(full)["body"] == full
        with pytest.raises(twin.client.exceptions.RequestTooLargeException):
            twin.raw(full[:-1] + b'A"')
        with pytest.raises(twin.client.exceptions.RequestTooLargeException):
            twin.raw(b'"' + b"A" * 40_000_000 + b'"')
    with serve("app.grow") as twin:
        assert len(twin.raw(str(limit - 2).encode())["body"]) == limit
        for size in (limit - 1, 20_000_000):
            fault = twin.fault(size)
            assert fault["errorType"] == "Function.ResponseSizeTooLarge"
        assert twin.call(3) == "xxx"


@pytest.mark.alone
def test_idle_environments_are_reclaimed(serve: Any) -> None:
    with serve("app.sleep", idle_ttl_s=0.3) as twin:
        pid = twin.call(0)
        time.sleep(0.15)
        assert twin.call(0) == pid  # a call starts the wait anew
        time.sleep(0.2)
        assert processes.start_time(pid)
        time.sleep(0.5)
        assert not processes.start_time(pid) and twin.status()["functions"][0]["instances"] == []
        assert twin.call(0) != pid


def test_what_a_worker_starts_ends_with_it(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "code" / "nest.py").write_text(
        "import subprocess, os\ndef f(event, context):\n    child = subprocess.Popen(['sleep', '60'])\n"
        "    if event: print(child.pid, flush=True); os._exit(1)\n    return child.pid\n"
    )
    with serve("nest.f", mechanism=cages.rlimit_only()) as twin:
        pids = [twin.call(False)]
        log = base64.b64decode(twin.raw(b"true", LogType="Tail")["LogResult"]).decode()
        pids.append(int(log.splitlines()[1]))
    give_up = time.monotonic() + 2  # SIGKILL is sent by now, but a busy machine takes its time to deliver it
    while any(map(processes.start_time, pids)) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert [processes.start_time(pid) for pid in pids] == [None, None]
