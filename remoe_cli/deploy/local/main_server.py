"""Keep the main server of a deployment running, behind a socket that stays open.

The supervisor opens the socket and hands it to each main server. So no other program can get the port between two of them, and a request
that arrives meanwhile waits for the next one. When there will be none, the supervisor says so itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import MainConfig, ProcessRef
from remoe_cli.deploy.local.guard import guard
from remoe_cli.errors import UsageError
from remoe_cli.runtime import peers
from remoe_cli.runtime.access import Door, described

RESTARTS_IN_A_ROW = 5
SETTLED_S = 30.0  # a main server that lived this long is taken to have been well
BACKOFF_S = 0.2  # before the first restart; doubles with each
STOP_S = 5.0
_ASK_S = 0.05


@dataclass
class MainServer:
    """The main server. Its `state` is starting, loading, running, restarting, failed or ended.

    listener      its socket, which this process keeps open
    environment   of its processes
    started       called with every one of them
    trouble       why the last one could not be started
    """

    config: MainConfig
    log: Path
    listener: socket.socket
    environment: Mapping[str, str]
    started: Callable[[ProcessRef], None]
    state: str = "starting"
    pid: int = 0
    restarts: int = 0
    trouble: str | None = None

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def status(self) -> dict[str, Any]:
        lives = self.state in ("loading", "running")
        return {
            "kind": "server",
            "pid": self.pid,
            "port": self.port,
            "state": "stopped" if lives and processes.is_stopped(self.pid) else self.state,
            "restarts": self.restarts,
            "resident_bytes": processes.memory(self.pid).resident_bytes if lives else 0,
            "trouble": self.trouble,
        }


async def keep(main: MainServer) -> None:
    """Start the main server again when it ends, after growing pauses; give up after five ends in a row."""
    loop, in_a_row = asyncio.get_running_loop(), 0
    while True:
        begun = loop.time()
        try:
            await _run(main)
            main.trouble = None
        except OSError as error:
            main.trouble = f"The main server could not be started: {error}"
            _note(main)
        in_a_row = 1 if loop.time() - begun > SETTLED_S else in_a_row + 1
        if in_a_row > RESTARTS_IN_A_ROW:
            main.state = "failed"
            await _refuse_all(main)
        main.state, main.restarts = "restarting", main.restarts + 1
        await asyncio.sleep(BACKOFF_S * 2 ** (in_a_row - 1))


async def _run(main: MainServer) -> None:
    """Run the main server once. The end of its stdin, a pipe, tells it that this process is gone.

    Raises: OSError when it cannot be started.
    """
    log = os.open(main.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *main.config.argv,
            env={**main.environment, "REMOE_LISTENER": str(main.listener.fileno())},
            pass_fds=[main.listener.fileno()],
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    main.pid, main.state = process.pid, "loading"
    asking = asyncio.create_task(_await_ready(main))
    try:
        if (started := processes.reference(process.pid)) is not None:
            main.started(started)
        await process.wait()
    except asyncio.CancelledError:
        main.state = "ended"
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(asyncio.TimeoutError):  # it ends its answers with the next token, and keeps their receipts
            await asyncio.wait_for(process.wait(), STOP_S)
        raise
    finally:
        asking.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _await_ready(main: MainServer) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            with suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                async with session.get(f"http://127.0.0.1:{main.port}/ping") as answer:
                    if answer.status == 200:
                        main.state = "running"
                        return
            await asyncio.sleep(_ASK_S)


async def _refuse_all(main: MainServer) -> None:
    """Answer every request that there is no main server any more, until this task is cancelled."""

    def answer(status: int, message: str) -> web.Response:
        return web.json_response(described(UsageError(message)), status=status)

    async def refuse(request: web.Request) -> web.Response:
        error = {"kind": "Deploy", "message": "The main server has ended too often.", "hint": "See 'remoe logs NAME', then deploy again."}
        return web.json_response({"error": error}, status=503)

    app = web.Application(middlewares=[guard(Door("127.0.0.1"), peers.is_own_user, answer)])
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, main.listener.dup()).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _note(main: MainServer) -> None:
    with suppress(OSError):
        log = os.open(main.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(log, f"{main.trouble}\n".encode())
        finally:
            os.close(log)
