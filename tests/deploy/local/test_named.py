"""Stopped processes, a main server that loads again, an odd folder and a full disk are named by status, infer and destroy."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import cages
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import lifecycle, main_server, processes
from remoe_cli.deploy.local.config import MainConfig, TwinConfig
from remoe_cli.deploy.local.target import LocalTarget
from remoe_cli.errors import DeployError
from remoe_cli.runtime.invoke import make_client
from tests.deploy.local.test_lifecycle import MAIN, assert_gone, call, config, everything, invoke, root, start, until, with_main
from tests.support import forked, other_user
from tests.support.handlers import report, server

__all__ = ["root"]  # a fixture


@pytest.fixture
def serve(tmp_path: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    (tmp_path / "twin").mkdir()
    return server(tmp_path / "twin", probed, monkeypatch)


def test_a_stopped_worker_is_replaced_before_it_costs_an_answer(serve: Any) -> None:
    with serve("app.sleep") as twin:
        pid = twin.call(0)
        until(lambda: twin.twin.pools["f"].instances[0]._events._getters)  # it waits for its next event, and would get it
        os.kill(pid, signal.SIGSTOP)
        until(lambda: processes.is_stopped(pid))
        assert twin.call(0) != pid
        (function,) = twin.status()["functions"]
        assert (function["cold_starts"], function["errors"], function["invocations"]) == (2, 0, 2)
        assert processes.start_time(pid) is None


def test_a_worker_that_stops_in_mid_request_is_found(serve: Any) -> None:
    with serve("app.sleep") as twin, ThreadPoolExecutor(1) as pool:
        pid = twin.call(0)
        slow = pool.submit(twin.fault, 15)  # a stop that is not found ends with the function's time, 20 s, and says so
        until(lambda: twin.status()["functions"][0]["instances"][0]["state"] == "BUSY")
        os.kill(pid, signal.SIGSTOP)
        fault = slow.result(60)
        assert fault["errorType"] == "Runtime.ExitError" and fault["errorMessage"].endswith("signal: stopped")
        assert twin.call(0) != pid


def test_a_stopped_supervisor_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SHUTDOWN_WAIT_S", 120.0)  # which is not waited
    started = start(with_main(root))
    found = everything(lifecycle.state_dir("t"))
    os.kill(started["pid"], signal.SIGSTOP)
    until(lambda: processes.is_stopped(started["pid"]))
    status = lifecycle.status("t")
    assert status["state"] == "stopped" and f"kill -CONT {started['pid']}" in status["hint"]
    with pytest.raises(DeployError, match="it is stopped") as raised:
        LocalTarget(SILENT).main_address("t")
    assert f"kill -CONT {started['pid']}" in raised.value.hint
    os.kill(started["pid"], signal.SIGCONT)
    until(lambda: lifecycle.status("t")["state"] == "running")
    os.kill(started["pid"], signal.SIGSTOP)
    begun = time.monotonic()
    lifecycle.destroy("t")
    assert time.monotonic() - begun < lifecycle.SHUTDOWN_WAIT_S
    assert_gone(found)


def test_a_main_server_that_loads_or_is_stopped_is_named(root: Path) -> None:
    loads = MAIN.replace("body = ", f"code = 200 if os.path.exists({str(root / 'loaded')!r}) else 503\n        body = ")
    (root / "loads.py").write_text(loads.replace("self.send_response(200)", "self.send_response(code)"))
    (root / "loaded").touch()
    started = start(config(root, [sys.executable, str(root / "loads.py")]))
    (root / "loaded").unlink()

    def refused() -> str:
        with pytest.raises(DeployError) as raised:
            LocalTarget(SILENT).main_address("t")
        return f"{raised.value.message} {raised.value.hint}"

    os.kill(started["main"]["pid"], signal.SIGKILL)
    until(lambda: lifecycle.status("t")["main"]["state"] == "loading" and lifecycle.status("t")["main"]["restarts"])
    assert refused() == "The main server of 't' is loading its model. Ask again when 'remoe status t' says that it is running."
    (root / "loaded").touch()
    until(lambda: lifecycle.status("t")["main"]["state"] == "running")
    pid = lifecycle.status("t")["main"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    until(lambda: lifecycle.status("t")["main"]["state"] == "stopped")
    assert refused() == f"The main server of 't' is stopped (process {pid}). Run 'kill -CONT {pid}' to let it go on."
    os.kill(pid, signal.SIGCONT)
    until(lambda: lifecycle.status("t")["main"]["state"] == "running")


def test_a_main_server_that_has_ended_too_often_is_answered_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_server, "BACKOFF_S", 0.001)
    listener = socket.create_server(("127.0.0.1", 0))
    argv = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    main = main_server.MainServer(MainConfig(argv=argv), tmp_path / "main.log", listener, dict(os.environ), lambda process: None)

    async def run() -> tuple[int, bytes]:
        keeper = asyncio.create_task(main_server.keep(main))
        while main.state != "failed":
            await asyncio.sleep(0.02)
        answered = await asyncio.to_thread(call, f"http://127.0.0.1:{main.port}", "GET", "/ping")
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        return answered

    status, body = asyncio.run(run())
    assert status == 503 and "ended too often" in json.loads(body)["error"]["message"] and main.restarts == 5
    listener.close()


def test_one_odd_folder_hides_no_other_deployment(root: Path) -> None:
    start(config(root))
    deployments = lifecycle.state_root()
    odd = {"damaged", "folders", "foreign", "alien"}
    for name in odd:
        (deployments / name).mkdir()
        (deployments / name / ".remoe").write_text('{"schema_version": "remoe.folder/1", "kind": "deployment", "files": null}')
    (deployments / "damaged" / "twin.json").write_text('{"schema_version": "remoe.twin/1", "na')
    (deployments / "damaged" / "supervisor.json").write_bytes(b"\xff\x00")
    (deployments / "folders" / "supervisor.json").mkdir()
    (deployments / "foreign" / "host.json").symlink_to("/dev/null")
    (deployments / "No Name!").mkdir()
    (deployments / "a-file").write_text("")
    (deployments / "a-loop").symlink_to("a-loop")
    if os.geteuid() == 0:
        os.chown(deployments / "alien", other_user.NOBODY, -1)
    documents = {document["name"]: document for document in forked.document("status")["deployments"]}
    assert set(documents) == odd | {"t"} and documents["t"]["state"] == "running"
    assert all(documents[name]["state"] in ("dead", "unreadable") and documents[name]["hint"] for name in odd)
    run = forked.remoe("status")
    assert run.returncode == 0 and "t (local): running" in run.stdout and "Traceback" not in run.stderr
    for name in odd:
        shutil.rmtree(deployments / name)


@pytest.fixture
def small_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State on a file system of one megabyte, as far as this machine lets tests make one."""
    disk = root / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no small file system can be made here: {made.stderr.decode().strip()}")
    monkeypatch.setenv("REMOE_STATE_DIR", str(disk / "state"))
    try:
        yield disk
        for name in lifecycle.names():
            lifecycle.destroy(name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_deployment_that_does_not_fit_leaves_nothing(small_disk: Path, root: Path) -> None:
    def prepare(folder: Path) -> TwinConfig:
        with (small_disk / "full").open("wb", buffering=0) as full, suppress(OSError):
            full.writelines(itertools.repeat(bytes(4096)))
        return config(root)

    with pytest.raises(OSError, match="No space left on device"):
        lifecycle.start("t", prepare)
    assert list(lifecycle.state_root().iterdir()) == []


def test_on_a_full_disk_answers_go_on_and_what_cannot_be_done_is_named(small_disk: Path, root: Path) -> None:
    started = start(with_main(root))
    invoke(started["endpoint"], 1)
    found = everything(lifecycle.state_dir("t"))
    with (small_disk / "full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        full.writelines(itertools.repeat(bytes(4096)))
    boto = make_client(started["endpoint"], 2, 30)
    for _ in range(60):  # the log's last page has room for some
        answer = boto.invoke(FunctionName="f", Payload=b'"quiet"', LogType="Tail")
        answer["body"] = answer["Payload"].read()
        assert report(answer)["billed"] >= 1  # the bill is in the answer, if not in the log
        if (status := lifecycle.status("t"))["trouble"]:
            break
    assert status["state"] == "running" and "No space left on device" in status["trouble"][0]
    assert "No space left on device" in "\n".join(LocalTarget(SILENT).overview(status).above)
    # A second worker cannot be recorded, so it is not started.
    slow = threading.Thread(target=lambda: boto.invoke(FunctionName="f", Payload=b'"hold"'))
    slow.start()
    until(lambda: lifecycle.status("t")["functions"][0]["instances"][0]["state"] == "BUSY")
    status_code, body = call(started["endpoint"], "POST", "/2015-03-31/functions/f/invocations", b"1")
    assert "No space left on device" in json.loads(body).get("errorMessage", "") + json.loads(body).get("message", ""), (status_code, body)
    slow.join()
    boto.close()
    lifecycle.destroy("t")
    assert_gone(found)
