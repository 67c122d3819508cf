"""Deployments of the twin as the command line uses them: a detached supervisor, a main server, and nothing left behind."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import cages
from remoe_cli.artifacts import read_json
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, overview, processes
from remoe_cli.deploy.local.config import ChildrenRecord, FunctionConfig, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.deploy.local.place import label
from remoe_cli.errors import DeployError, HeldError, UsageError
from remoe_cli.progress import Report

HANDLER = """
import os, time
def f(event, context):
    if event != "quiet" and event != "hold": print("got", event)
    if event == "sleep": time.sleep(60)
    if event == "hold": time.sleep(2)
    return os.getpid()
"""

MAIN = """
import http.server, os, socket, sys, threading, time
def watch():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == "/die": os._exit(9)
        body = os.environ["REMOE_ENDPOINT"].encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
print("main is up", flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=int(os.environ["REMOE_LISTENER"]))
server.serve_forever()
"""


def call(endpoint: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def invoke(endpoint: str, event: object) -> Any:
    status, body = call(endpoint, "POST", "/2015-03-31/functions/f/invocations", json.dumps(event).encode())
    assert status == 200, body
    return json.loads(body)


def suppressed(function: Callable[..., object], *arguments: object) -> None:
    with suppress(OSError, http.client.HTTPException):
        function(*arguments)


def until(condition: Callable[[], object], wait_s: float = 30.0) -> None:
    give_up = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "app.py").write_text(HANDLER)
    (tmp_path / "main.py").write_text(MAIN)
    yield tmp_path
    for name in lifecycle.names():
        lifecycle.destroy(name)


def config(folder: Path, main: list[str] | None = None, name: str = "t") -> TwinConfig:
    function = FunctionConfig(
        name="f", handler="app.f", code_dir=str(folder / "code"), memory_mb=1769, timeout_s=30, reserved_concurrency=3
    )
    served = MainConfig(argv=main) if main else None
    return TwinConfig(name=name, functions=(function,), main=served, python=sys.executable)


def start(config: TwinConfig, files: dict[str, bytes] | None = None, **more: Any) -> dict[str, Any]:
    def prepare(folder: Path) -> TwinConfig:
        for path, content in (files or {}).items():
            (folder / path).write_bytes(content)
        return config

    return lifecycle.start(config.name, prepare, **more)


def with_main(folder: Path) -> TwinConfig:
    return config(folder, [sys.executable, str(folder / "main.py")])


def everything(folder: Path) -> tuple[list[ProcessRef], list[Path]]:
    """All processes and control groups that a deployment has now."""
    record = read_json(folder / "supervisor.json", SupervisorRecord)
    children = read_json(folder / "children.json", ChildrenRecord).children
    return [record.process, *children], [Path(group) for group in record.groups]


def assert_gone(found: tuple[list[ProcessRef], list[Path]]) -> None:
    assert [process for process in found[0] if processes.is_alive(process)] == []
    assert [group for group in found[1] if group.exists()] == []
    assert lifecycle.names() == [] and list(lifecycle.state_root().iterdir()) == []


def test_start_use_and_destroy(root: Path) -> None:
    steps: list[str] = []

    def progress(title: str, *, of_bytes: bool = False) -> AbstractContextManager[Report]:
        steps.append(title)
        return SILENT.progress(title)

    started = start(with_main(root), {"plan.json": b"{}"}, console=replace(SILENT, progress=progress))
    assert steps == ["Starting the supervisor", "Loading the main server"]
    folder = lifecycle.state_dir("t")
    assert (folder / "plan.json").read_bytes() == b"{}" and folder.stat().st_mode & 0o077 == 0
    pid = invoke(started["endpoint"], "hello")
    status = lifecycle.status("t")
    assert (status["name"], status["target"], status["state"]) == ("t", "local", "running")
    assert status["limits"]["memory"] in ("cgroup-v2", "cgroup-v1", "rlimit") and status["limits"]["cpu"] in ("cfs-quota", "threads-only")
    assert status["functions"][0]["instances"][0]["pid"] == pid and status["functions"][0]["invocations"] == 1
    assert status["main"]["state"] == "running" and status["main"]["restarts"] == 0 and status["main"]["resident_bytes"] > 1e6
    assert call(f"http://127.0.0.1:{status['main']['port']}", "GET", "/ping") == (200, started["endpoint"].encode())
    assert f"main server http://127.0.0.1:{status['main']['port']}, pid " in "\n".join(overview.overview(status).above)
    logs = lifecycle.logs("t")
    assert logs["main"] == ["main is up"] and "got hello" in logs["f"]
    assert lifecycle.logs("t", "f", 1) == {"f": [logs["f"][-1]]} and logs["f"][-1].startswith("REPORT RequestId: ")
    with pytest.raises(DeployError, match=r"no log of 'g'; there are: .*main"):
        lifecycle.logs("t", "g")
    found = everything(folder)
    assert len(found[0]) == 4 and all(map(processes.is_alive, found[0]))  # the supervisor twice, the main server, one worker
    lifecycle.destroy("t")
    assert_gone(found)


def test_a_living_name_is_held_and_left_alone(root: Path) -> None:
    started = start(config(root))
    pid = invoke(started["endpoint"], 1)
    with pytest.raises(HeldError, match="is running"):
        start(config(root))
    assert invoke(started["endpoint"], 1) == pid


def test_a_locked_name_is_held(root: Path) -> None:
    folder = lifecycle.state_dir("t")
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for action in (lambda: start(config(root)), lambda: lifecycle.destroy("t")):
        with pytest.raises(HeldError, match="Another process"):
            action()
    assert lifecycle.status("t")["state"] == "deploying"
    os.close(descriptor)
    assert lifecycle.status("t")["state"] == "dead"


def test_unknown_names(root: Path) -> None:
    with pytest.raises(DeployError, match=r"no deployment named 't'; no deployment runs here\."):
        lifecycle.status("t")
    lifecycle.state_dir("other").mkdir(parents=True)
    for action in (lifecycle.status, lifecycle.destroy, lifecycle.logs):
        if action is lifecycle.destroy:
            assert action("t") is None  # there is nothing, which is what was wanted
        else:
            with pytest.raises(DeployError, match="no deployment named 't'; there are: other"):
                action("t")
        with pytest.raises(UsageError, match="cannot be the name"):
            action("../t")


def test_main_that_dies_before_it_is_ready(root: Path) -> None:
    dying = config(root, [sys.executable, "-c", "import sys; print('no weights at /x', flush=True); sys.exit(2)"])
    with pytest.raises(DeployError, match="no weights at /x"):
        start(dying)
    assert lifecycle.names() == []
    with pytest.raises(DeployError, match="could not be started"):
        start(config(root, ["/no/such/program"]))
    assert lifecycle.names() == []


def test_main_that_is_never_ready(root: Path) -> None:
    pid_file = root / "pid"
    stuck = config(root, [sys.executable, "-c", f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"])
    with pytest.raises(DeployError, match="not ready within 1 s"):
        start(stuck, main_wait_s=1.0)
    assert processes.start_time(int(pid_file.read_text())) is None and lifecycle.names() == []


def test_main_is_restarted(root: Path) -> None:
    started = start(with_main(root))
    main = f"http://127.0.0.1:{started['main']['port']}"
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        call(main, "GET", "/die")
    until(lambda: lifecycle.status("t")["main"]["restarts"] == 1 and lifecycle.status("t")["main"]["state"] == "running")
    assert lifecycle.status("t")["main"]["pid"] != started["main"]["pid"]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in mid-request"])
def test_nothing_survives_a_killed_supervisor(root: Path, busy: bool) -> None:
    started = start(with_main(root))
    endpoint = started["endpoint"]
    invoke(endpoint, 1)
    caller = threading.Thread(target=suppressed, args=(invoke, endpoint, "sleep"))
    if busy:
        caller.start()
        until(lambda: lifecycle.status("t")["functions"][0]["instances"][0]["state"] == "BUSY")
    found = everything(lifecycle.state_dir("t"))
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: not [process for process in found[0] if processes.is_alive(process)])
    if busy:
        caller.join(5)
    dead = lifecycle.status("t")
    assert dead["state"] == "dead" and "remoe destroy t" in dead["hint"]
    lifecycle.destroy("t")
    assert_gone(found)
    again = start(config(root))
    assert invoke(again["endpoint"], 1)


def test_destroy_ends_what_would_survive(root: Path) -> None:
    """A main server that ignores the end of its stdin, and SIGTERM, after kill -9 of its supervisor."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + MAIN.replace("os._exit(0)", "pass")
    (root / "stubborn.py").write_text(stubborn)
    started = start(config(root, [sys.executable, str(root / "stubborn.py")]))
    found = everything(lifecycle.state_dir("t"))
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: processes.start_time(started["pid"]) is None)
    assert processes.start_time(started["main"]["pid"])
    lifecycle.destroy("t")
    assert_gone(found)


def test_start_takes_over_a_dead_name(root: Path) -> None:
    started = start(config(root), {"old": b""})
    found = everything(lifecycle.state_dir("t"))
    os.kill(started["pid"], signal.SIGKILL)
    until(lambda: processes.start_time(started["pid"]) is None)
    start(config(root))
    assert not (lifecycle.state_dir("t") / "old").exists()
    assert not [process for process in found[0] if processes.is_alive(process)]


def test_half_made_deployments_are_destroyed(root: Path) -> None:
    """The command line was killed right after it had spawned the supervisor, or before."""
    lifecycle.state_dir("before").mkdir(parents=True)
    lifecycle.destroy("before")
    folder = lifecycle.state_dir("t")
    (folder / "logs").mkdir(parents=True)
    (folder / "twin.json").write_text(config(root).model_dump_json())
    supervisor = lifecycle._spawn_supervisor(folder)
    lifecycle.destroy("t")
    assert_gone(([supervisor], []))


def test_a_reused_pid_is_not_killed(root: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        folder = lifecycle.state_dir("t")
        folder.mkdir(parents=True)
        children = ChildrenRecord(children=(ProcessRef(pid=bystander.pid, start_time="1"),))
        (folder / "children.json").write_text(children.model_dump_json())
        lifecycle.destroy("t")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_sigterm_is_an_orderly_shutdown(root: Path) -> None:
    started = start(with_main(root))
    invoke(started["endpoint"], 1)
    found = everything(lifecycle.state_dir("t"))
    os.kill(started["pid"], signal.SIGTERM)
    until(lambda: not [process for process in found[0] if processes.is_alive(process)])
    assert [group for group in found[1] if group.exists()] == []
    assert lifecycle.logs("t", "supervisor") == {"supervisor": []}


def test_a_deployments_group_is_its_own(tmp_path: Path) -> None:
    assert label(tmp_path / "a" / "t") != label(tmp_path / "b" / "t")


def test_a_group_that_cannot_be_made_is_no_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cages, "_candidates", lambda version, controller: iter([Path("/proc/self")]))
    assert (cages.probe("remoe-x").memory, cages.probe("remoe-x").cpu) == ("rlimit", "threads-only")


def test_what_prepare_raises_leaves_nothing(root: Path) -> None:
    def prepare(folder: Path) -> TwinConfig:
        (folder / "server.json").write_bytes(b"x")
        assert lifecycle.names() == ["t"]
        raise ValueError("no such plan")

    with pytest.raises(ValueError, match="no such plan"):
        lifecycle.start("t", prepare)
    assert lifecycle.names() == [] and list(lifecycle.state_root().iterdir()) == []
