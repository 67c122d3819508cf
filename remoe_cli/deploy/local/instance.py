"""One execution environment: a process that runs awslambdaric, and the Runtime API that feeds it.

    COLD --launch--> INIT --first GET next--> IDLE <--> BUSY;  every state --the process ends--> DEAD

Every failure is a named error. What the runtime reports is passed on. When the process ends, `_watch` alone decides why.

Source: Lambda developer guide, "Using the Lambda runtime API" (2018-06-01).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from aiohttp import web

from remoe_cli import cages, lambda_limits
from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import FunctionConfig, ProcessRef
from remoe_cli.deploy.local.guard import guard
from remoe_cli.deploy.local.logs import LogStream
from remoe_cli.deploy.local.worker import ACCOUNT, OUT_OF_MEMORY, REGION, STOPPED, TOO_LARGE, Fault, describe, environment
from remoe_cli.runtime import peers

POLL_S = 0.02
# Takes each part of a streamed response, and its content type.
Sink = Callable[[bytes, str], Awaitable[None]]
_MODE = "Lambda-Runtime-Function-Response-Mode"
STOP_POLL_S = 0.1


class InstanceState(Enum):
    COLD = "COLD"
    INIT = "INIT"
    IDLE = "IDLE"
    BUSY = "BUSY"
    DEAD = "DEAD"


class Undelivered(Exception):
    """The worker ended before it took the event, so nothing ran, and another worker may take it."""


@dataclass(frozen=True)
class Host:
    """What all execution environments of a deployment have in common.

    python        interpreter of the workers
    log_dir       an existing folder, for logs
    scratch_dir   an existing folder, in which each worker has its /tmp
    started       called with every worker process that is started
    label         environment variables by which workers are found when nothing else tells of them
    starting      lets as many workers start at once as there are cores. On Lambda each starts on hardware of its own; here many at once
                  would make each other slow, and be billed for that, or pass the init limit
    """

    python: str
    mechanism: cages.Mechanism
    log_dir: Path
    scratch_dir: Path
    started: Callable[[ProcessRef], None]
    init_limit_s: float = lambda_limits.INIT_LIMIT_S
    label: Mapping[str, str] = field(default_factory=dict)
    starting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(os.cpu_count() or 1))


@dataclass(frozen=True)
class CallResult:
    """The result of one invocation.

    failed    it is a function error, whose payload is {errorMessage, errorType, ...}
    init_ms   None when the instance was warm
    """

    payload: bytes
    failed: bool
    duration_ms: float
    init_ms: float | None
    billed_ms: int
    log_tail: bytes


@dataclass(frozen=True)
class _Reply:
    payload: bytes
    failed: bool
    fault: Fault | None = None


class Instance:
    """One execution environment, in one event loop. `invoke` runs one request at a time; `stop` ends it."""

    def __init__(self, function: FunctionConfig, host: Host) -> None:
        self.function, self.host = function, host
        self.state, self.port, self.pid = InstanceState.COLD, 0, 0
        self._id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:12]}"
        self._cage = cages.Cage(host.mechanism, f"{function.name}-{self._id}", function.memory_mb)
        self._scratch = host.scratch_dir / self._id
        self._log = LogStream(host.log_dir / function.name / f"{self._id}.log")
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[bytes] = asyncio.Queue()
        self._ready: asyncio.Future[_Reply | None] = self._loop.create_future()  # None: init went well
        self._reply: asyncio.Future[_Reply] | None = None
        self._request_id, self._deadline_ms, self._delivered = "", 0, True
        self._sink: Sink | None = None
        self._cause: Fault | None = None
        self._peak_bytes, self._reaped = 0, False
        self._ended: asyncio.Task[None] | None = None

    async def invoke(self, request_id: str, event: bytes, sink: Sink | None = None) -> CallResult:
        """Run one request; start the worker first if the instance is COLD.

        `sink` takes a streamed response, of which the result then has nothing.

        Raises: Undelivered when the worker ended before it took the event.
        """
        self._request_id, self._sink = request_id, sink
        watching = self._loop.create_task(self._end_if_stopped())
        try:
            return await self._invoke(request_id, event)
        finally:
            watching.cancel()

    async def _invoke(self, request_id: str, event: bytes) -> CallResult:
        log_start, init_ms, reply = self._log.begin(), None, None
        if self.state is InstanceState.COLD:
            self.state = InstanceState.INIT
            async with self.host.starting:
                if self._cause:  # it was ended while it waited for its turn
                    self.state = InstanceState.DEAD
                    raise Undelivered
                reply, init_ms = await self._init()
        self._log.write(f"START RequestId: {request_id} Version: $LATEST\n")
        duration_ms = 0.0
        if reply is None:
            reply, duration_ms = await self._run(event)
        return self._finish(reply, duration_ms, init_ms, log_start)

    async def _init(self) -> tuple[_Reply | None, float]:
        """Start the worker; return why it failed, if it did, and how long that took in ms."""
        begun, limit_s = time.perf_counter(), self.host.init_limit_s
        expiry = self._loop.call_later(limit_s, self.end, Fault("Runtime.InitError", f"Init timed out after {limit_s:.2f} seconds"))
        await self._launch()
        reply = await self._ready
        expiry.cancel()
        return reply, (time.perf_counter() - begun) * 1e3

    @property
    def trouble(self) -> str | None:
        """What went wrong besides the requests, in a sentence."""
        return self._log.trouble

    async def stop(self) -> None:
        """End the worker and wait until nothing is left of it."""
        self.end(Fault("Runtime.ExitError", "The execution environment was stopped"))
        if self._ended:
            await self._ended
        self.state = InstanceState.DEAD
        self._log.close()

    def end(self, cause: Fault) -> None:
        """Kill the worker; its current request, if any, fails with `cause`."""
        self._cause = self._cause or cause
        if self.pid and not self._reaped:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def _run(self, event: bytes) -> tuple[_Reply, float]:
        if self.state is InstanceState.DEAD:
            raise Undelivered
        timeout_s = self.function.timeout_s
        self.state, self._reply, self._delivered = InstanceState.BUSY, self._loop.create_future(), False
        self._deadline_ms, begun = int((time.time() + timeout_s) * 1e3), time.perf_counter()
        expiry = self._loop.call_later(timeout_s, self.end, Fault("Sandbox.Timedout", f"Task timed out after {timeout_s:.2f} seconds"))
        self._events.put_nowait(event)
        reply = await self._reply
        expiry.cancel()
        if not self._delivered and reply.fault and reply.fault.error_type != "Sandbox.Timedout":
            raise Undelivered
        if self.state is InstanceState.BUSY:
            self.state = InstanceState.IDLE
        return reply, (time.perf_counter() - begun) * 1e3

    def _finish(self, reply: _Reply, duration_ms: float, init_ms: float | None, log_start: int) -> CallResult:
        if not self._reaped:
            self._peak_bytes = max(self._peak_bytes, processes.memory(self.pid).peak_bytes)
        limit_mb = self.function.memory_mb
        # Mapped weights are page cache that the kernel takes back, so residence may pass the limit; the report says at most the limit.
        used_mb = limit_mb if reply.fault is OUT_OF_MEMORY else min(limit_mb, math.ceil(self._peak_bytes / (1 << 20)))
        billed_ms = math.ceil(duration_ms + (init_ms or 0.0))
        error = f"RequestId: {self._request_id} Error: {reply.fault.message}\n{reply.fault.error_type}\n" if reply.fault else ""
        init = "" if init_ms is None else f"Init Duration: {init_ms:.2f} ms\t"
        log = (
            f"{error}END RequestId: {self._request_id}\nREPORT RequestId: {self._request_id}\tDuration: {duration_ms:.2f} ms\t"
            f"Billed Duration: {billed_ms} ms\tMemory Size: {limit_mb} MB\tMax Memory Used: {used_mb} MB\t{init}\n"
        )
        self._log.write(log)
        return CallResult(reply.payload, reply.failed, duration_ms, init_ms, billed_ms, self._log.tail(log_start))

    async def _launch(self) -> None:
        door = guard(None, lambda peer, name: peers.is_process(peer, name, self.pid), _refuse)
        app = web.Application(client_max_size=lambda_limits.PAYLOAD_LIMIT_BYTES + 1, middlewares=[door])
        runtime = "/2018-06-01/runtime"
        app.router.add_get(f"{runtime}/invocation/next", self._serve_next)
        app.router.add_post(f"{runtime}/invocation/{{id}}/response", self._take_response)
        app.router.add_post(f"{runtime}/invocation/{{id}}/error", self._take_error)
        app.router.add_post(f"{runtime}/init/error", self._take_init_error)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            with ExitStack() as unused:
                listener = unused.enter_context(socket.create_server(("127.0.0.1", 0)))
                self.port = listener.getsockname()[1]
                process = await self._start_worker()
                # Served only now, when it is known who may ask; what the worker asks meanwhile waits in the socket.
                await web.SockSite(runner, listener).start()
                unused.pop_all()
        except OSError as error:
            if self.pid:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._reaped = True  # its number may be another process's from now on
            await runner.cleanup()
            await asyncio.to_thread(self._remove_traces)
            self.state = InstanceState.DEAD
            self._ready.set_result(self._failure(Fault("Runtime.LaunchError", f"The worker could not be started: {error}")))
            return
        self._ended = asyncio.create_task(self._watch(process, runner))
        if self._cause:  # the init limit passed while the worker was being started
            self.end(self._cause)

    async def _start_worker(self) -> asyncio.subprocess.Process:
        """Start the worker and record it. Raises: OSError when either cannot be done."""
        self._scratch.mkdir(mode=0o700)
        await asyncio.to_thread(cages.make, self._cage)
        interpreter = self.function.interpreter or (self.host.python,)
        process = await asyncio.create_subprocess_exec(
            *cages.launcher(self._cage, [*interpreter, "-m", self.function.runtime, self.function.handler]),
            cwd=self.function.code_dir,
            env=environment(self.function, self.port, self._id, self._scratch) | dict(self.host.label),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log.descriptor,
            stderr=self._log.descriptor,
            start_new_session=True,
        )
        self.pid = process.pid
        if (started := processes.reference(self.pid)) is not None:
            self.host.started(started)
        return process

    async def _watch(self, process: asyncio.subprocess.Process, runner: web.AppRunner) -> None:
        poll = asyncio.create_task(self._poll_memory()) if self.host.mechanism.memory == "rlimit" else None
        status = await process.wait()
        self.state, self._reaped = InstanceState.DEAD, True
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the worker started does not outlive it
        if poll:
            poll.cancel()
        self._peak_bytes = max(self._peak_bytes, cages.peak_bytes(self._cage))
        if cages.was_oom_killed(self._cage):
            self._cause = self._cause or OUT_OF_MEMORY
        reply = self._failure(self._cause or Fault("Runtime.ExitError", f"Runtime exited with error: {describe(status)}"))
        for waiting in (self._ready, self._reply):
            if waiting and not waiting.done():
                waiting.set_result(reply)
        await runner.cleanup()
        await asyncio.to_thread(self._remove_traces)

    def _remove_traces(self) -> None:
        for group in self._cage.groups:
            cages.remove(group)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _failure(self, fault: Fault) -> _Reply:
        message = fault.message if fault is TOO_LARGE else f"RequestId: {self._request_id} Error: {fault.message}"
        return _Reply(json.dumps({"errorMessage": message, "errorType": fault.error_type}).encode(), True, fault)

    async def _end_if_stopped(self) -> None:
        """End the worker if a signal has stopped it while somebody waits for it; another can take the request."""
        looked = 0  # twice, so that a short stop costs nothing
        while looked < 2:
            await asyncio.sleep(STOP_POLL_S)
            looked = looked + 1 if processes.is_stopped(self.pid) else 0
        self.end(STOPPED)

    async def _poll_memory(self) -> None:
        """Kill the worker when its anonymous memory passes the limit; an idle one does not run, as on Lambda."""
        while True:
            used = processes.memory(self.pid) if self.state in (InstanceState.INIT, InstanceState.BUSY) else processes.ProcessMemory()
            if used.anonymous_bytes > self.function.memory_mb << 20:
                self.end(OUT_OF_MEMORY)
            self._peak_bytes = max(self._peak_bytes, used.peak_bytes)
            await asyncio.sleep(POLL_S)

    async def _serve_next(self, request: web.Request) -> web.Response:
        if not self._ready.done():
            cages.limit_cpu(self._cage)
            self._ready.set_result(None)
        event = await self._events.get()
        self._delivered = request.transport is not None and not request.transport.is_closing()
        headers = {
            "Lambda-Runtime-Aws-Request-Id": self._request_id,
            "Lambda-Runtime-Deadline-Ms": str(self._deadline_ms),
            "Lambda-Runtime-Invoked-Function-Arn": f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{self.function.name}",
        }
        return web.Response(body=event, content_type="application/json", headers=headers)

    async def _take_response(self, request: web.Request) -> web.Response:
        if request.headers.get(_MODE) == "streaming":
            return await self._take_stream(request)
        if (request.content_length or 0) > lambda_limits.PAYLOAD_LIMIT_BYTES:
            return self._too_large(request)
        try:
            payload = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return self._too_large(request)
        return self._settle(request, _Reply(payload, False))

    async def _take_stream(self, request: web.Request) -> web.Response:
        """Pass a response on as it comes; who has not asked for a stream gets all of it at once."""
        if request.match_info["id"] != self._request_id:
            return self._settle(request, _Reply(b"", False))
        sink, kept, taken = self._sink, bytearray(), 0
        limit = lambda_limits.PAYLOAD_LIMIT_BYTES if sink is None else lambda_limits.STREAM_LIMIT_BYTES
        async for part in request.content.iter_any():
            taken += len(part)
            if taken > limit:
                return self._too_large(request)
            if sink is None:
                kept += part
            else:
                await sink(part, request.content_type)
        return self._settle(request, _Reply(bytes(kept), False))

    def _too_large(self, request: web.Request) -> web.Response:
        """Answer 413 to the runtime, upon which awslambdaric ends; so the next call is a cold start."""
        self.state = InstanceState.DEAD
        self._settle(request, self._failure(TOO_LARGE))
        self.end(TOO_LARGE)
        return web.json_response({"errorMessage": TOO_LARGE.message, "errorType": "RequestEntityTooLarge"}, status=413)

    async def _take_error(self, request: web.Request) -> web.Response:
        payload = await request.read()
        return self._accepted() if self._ended_by_rlimit(payload) else self._settle(request, _Reply(payload, True))

    async def _take_init_error(self, request: web.Request) -> web.Response:
        payload = await request.read()
        if not self._ended_by_rlimit(payload) and not self._ready.done():
            self.state = InstanceState.DEAD
            self._ready.set_result(_Reply(payload, True))
            self.end(Fault("Runtime.InitError", "Init failed"))
        return self._accepted()

    def _ended_by_rlimit(self, payload: bytes) -> bool:
        """End a worker that reports MemoryError under rlimit, as Lambda would have killed it.

        Under rlimit the kernel refuses memory instead of killing, and Python reports that as MemoryError.
        """
        if self.host.mechanism.memory != "rlimit" or json.loads(payload).get("errorType") != "MemoryError":
            return False
        self.end(OUT_OF_MEMORY)
        return True

    def _settle(self, request: web.Request, reply: _Reply) -> web.Response:
        if self._reply is None or self._reply.done() or request.match_info["id"] != self._request_id:
            return web.json_response({"errorMessage": "No such invocation", "errorType": "InvalidRequestID"}, status=400)
        self._reply.set_result(reply)
        return self._accepted()

    @staticmethod
    def _accepted() -> web.Response:
        return web.json_response({"status": "OK"}, status=202)


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response({"errorMessage": message, "errorType": "AccessDenied"}, status=status)
