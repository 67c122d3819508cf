"""The detached process that holds one deployment together.

    python -m remoe_cli.deploy.local.supervisor STATE_DIR

It reads twin.json, serves the front and keeps the main server running. It records every process and control group before anybody can depend
on it, so that `destroy` leaves nothing even when this process was killed. It ends, with all of them, on SIGTERM and SIGINT, and when its
folder is gone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from remoe_cli import cages, recognise
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.deploy.local import front, main_server, place, processes
from remoe_cli.deploy.local.config import ChildrenRecord, MainConfig, ProcessRef, SupervisorRecord, TwinConfig
from remoe_cli.deploy.local.instance import Host
from remoe_cli.deploy.local.main_server import MainServer
from remoe_cli.errors import ArtifactError, DeployError

_LOOK_S = 0.5  # how often the folder is looked for
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@dataclass
class Children:
    """children.json: written again, without processes that are gone, whenever one is added."""

    path: Path
    known: tuple[ProcessRef, ...] = ()

    def add(self, process: ProcessRef) -> None:
        """Record a process. Raises: OSError when the file cannot be written."""
        known = (*filter(processes.is_alive, self.known), process)
        write_json(self.path, ChildrenRecord(children=known), recognise.ANY)
        self.known = known


async def supervise(state_dir: Path) -> None:
    """Run the deployment in `state_dir` until a signal, or until the folder is gone.

    Raises: DeployError when it cannot start.
    """
    config = read_json(state_dir / "twin.json", TwinConfig)
    own = processes.reference(os.getpid())
    if own is None:
        raise DeployError("This system does not say when a process started.", "Run on Linux, or install ps.")
    place.hold(state_dir)
    children = Children(state_dir / "children.json", (own,))
    logs, scratch = state_dir / "logs" / "functions", state_dir / "scratch"
    logs.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(mode=0o700, exist_ok=True)
    label = {place.LABEL: os.environ[place.LABEL]} if place.LABEL in os.environ else {}
    host = Host(config.python, cages.probe(place.label(state_dir)), logs, scratch, children.add, label=label)
    main = None
    if isinstance(config.main, MainConfig):
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        main = MainServer(config.main, state_dir / "logs" / "main.log", listener, dict(os.environ), children.add)
    twin = front.twin(config, host, main.status if main else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, twin.stop.set)
    runner = await _open_front(twin, state_dir / "supervisor.json")
    endpoint = front.endpoint(runner)
    groups = tuple(str(group) for group in host.mechanism.groups)
    write_json(state_dir / "supervisor.json", SupervisorRecord(process=own, endpoint=endpoint, groups=groups), recognise.ANY)
    tasks = [asyncio.create_task(_watch(state_dir, twin.stop))]
    if main:
        main.environment = {**main.environment, "REMOE_ENDPOINT": endpoint}
        tasks.append(asyncio.create_task(main_server.keep(main)))
    await twin.stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await front.close(twin, runner)
    for group in host.mechanism.groups:
        cages.remove(group)


async def _open_front(twin: front.Twin, record: Path) -> web.AppRunner:
    """Serve on the port of an earlier supervisor of this deployment if it is free, else on any port."""
    with suppress(ArtifactError, OSError):
        return await front.serve(twin, int(read_json(record, SupervisorRecord).endpoint.rpartition(":")[2]))
    return await front.serve(twin)


async def _watch(folder: Path, stop: asyncio.Event) -> None:
    """Set `stop` when the deployment's folder is gone, or is another one."""
    first = folder.stat()
    while True:
        try:
            now = folder.stat()
        except OSError as error:
            if error.errno in _GONE:
                break
        else:
            if (now.st_dev, now.st_ino) != (first.st_dev, first.st_ino):
                break
        await asyncio.sleep(_LOOK_S)
    stop.set()


if __name__ == "__main__":
    asyncio.run(supervise(Path(sys.argv[1])))
