"""The detached process that holds one deployment together.

    python -m remoe_cli.deploy.local.supervisor STATE_DIR

It reads twin.json, serves the front and keeps the main server running. It records every process and control group before anybody can depend
on it, so that `destroy` leaves nothing even when this process was killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from remoe_cli import cages, recognise
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy.local import front, processes
from remoe_cli.deploy.local.config import ChildrenRecord, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.deploy.local.instance import Host
from remoe_cli.errors import ArtifactError, DeployError

RESTARTS_IN_A_ROW = 5
SETTLED_S = 30.0  # a main server that lived this long is taken to have been well
BACKOFF_S = 0.2  # before the first restart; doubles with each
STOP_S = 5.0


@dataclass
class MainServer:
    """The main server. Its `state` is starting, running, restarting, failed or stopped."""

    config: MainConfig
    log: Path
    state: str = "starting"
    pid: int = 0
    restarts: int = 0

    def status(self) -> dict[str, Any]:
        resident = processes.memory(self.pid).resident_bytes if self.state == "running" else 0
        return {
            "kind": "server",
            "pid": self.pid,
            "port": self.config.port,
            "state": self.state,
            "restarts": self.restarts,
            "resident_bytes": resident,
        }


@dataclass
class Children:
    """children.json: written again, without processes that are gone, whenever one is added."""

    path: Path
    known: tuple[ProcessRef, ...] = ()

    def add(self, process: ProcessRef) -> None:
        self.known = (*filter(processes.is_alive, self.known), process)
        write_json(self.path, ChildrenRecord(children=self.known), recognise.ANY)


def label(state_dir: Path) -> str:
    """Name the control group of a deployment; no other deployment has it, in whatever state directory."""
    return f"remoe-{state_dir.name}-{hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]}"


async def supervise(state_dir: Path) -> None:
    """Run the deployment in `state_dir` until SIGTERM, SIGINT or POST /remoe/shutdown.

    Raises: DeployError when it cannot start.
    """
    config = read_json(state_dir / "twin.json", TwinConfig)
    own = processes.reference(os.getpid())
    if own is None:
        raise DeployError("This system does not say when a process started.", "Run on Linux, or install ps.")
    children = Children(state_dir / "children.json", (own,))
    host = Host(config.python, cages.probe(label(state_dir)), state_dir / "logs" / "functions", children.add)
    main = MainServer(config.main, state_dir / "logs" / "main.log") if isinstance(config.main, MainConfig) else None
    twin = front.twin(config, host, main.status if main else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, twin.stop.set)
    runner = await _open_front(twin, state_dir / "supervisor.json")
    endpoint = front.endpoint(runner)
    groups = tuple(str(group) for group in host.mechanism.groups)
    write_json(state_dir / "supervisor.json", SupervisorRecord(process=own, endpoint=endpoint, groups=groups), recognise.ANY)
    keeper = asyncio.create_task(_keep_main(main, children, endpoint)) if main else None
    await twin.stop.wait()
    if keeper:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
    await front.close(twin, runner)
    for group in host.mechanism.groups:
        cages.remove(group)


async def _open_front(twin: front.Twin, record: Path) -> web.AppRunner:
    """Serve on the port of an earlier supervisor of this deployment if it is free, else on any port."""
    with suppress(ArtifactError, OSError):
        return await front.serve(twin, int(read_json(record, SupervisorRecord).endpoint.rpartition(":")[2]))
    return await front.serve(twin)


async def _keep_main(main: MainServer, children: Children, endpoint: str) -> None:
    """Start the main server again when it ends, after growing pauses; give up after five ends in a row."""
    loop, in_a_row = asyncio.get_running_loop(), 0
    while True:
        begun = loop.time()
        await _run_main(main, children, endpoint)
        in_a_row = 1 if loop.time() - begun > SETTLED_S else in_a_row + 1
        if in_a_row > RESTARTS_IN_A_ROW:
            main.state = "failed"
            return
        main.state, main.restarts = "restarting", main.restarts + 1
        await asyncio.sleep(BACKOFF_S * 2 ** (in_a_row - 1))


async def _run_main(main: MainServer, children: Children, endpoint: str) -> None:
    """Run the main server once. The end of its stdin, a pipe, tells it that this process is gone."""
    log = os.open(main.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *main.config.argv,
            env={**os.environ, "REMOE_ENDPOINT": endpoint},
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        os.write(log, f"The main server could not be started: {error}\n".encode())
        return
    finally:
        os.close(log)
    main.pid, main.state = process.pid, "running"
    if (started := processes.reference(process.pid)) is not None:
        children.add(started)
    try:
        await process.wait()
    except asyncio.CancelledError:
        main.state = "stopped"
        with suppress(ProcessLookupError):
            process.terminate()
        if process.stdin:
            process.stdin.close()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(supervise(Path(sys.argv[1])))
