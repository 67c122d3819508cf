"""The twin's Invoke API on loopback, whole and streamed, and its status, for this user's programs.

Who may ask is in guard.py.

No request ends a deployment; a signal does.

Source: Lambda API reference, version 2015-03-31, Invoke, and 2021-11-15, InvokeWithResponseStream.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from remoe_cli.deploy.local import event_stream, processes
from remoe_cli.deploy.local.config import FunctionConfig, TwinConfig
from remoe_cli.deploy.local.guard import guard
from remoe_cli.deploy.local.instance import CallResult, Host, Sink
from remoe_cli.deploy.local.pool import Pool, Throttled
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.runtime import peers
from remoe_cli.runtime.access import Door

# A larger body is not even read to its end, so that its sender may see the connection close instead of the error.
READ_LIMIT_BYTES = 4 * PAYLOAD_LIMIT_BYTES
_ACCESS_ERRORS = {403: "AccessDeniedException", 404: "ResourceNotFoundException", 415: "UnsupportedMediaTypeException"}
_NAME = re.compile(r"(?:arn:aws[\w-]*:lambda:[\w-]+:\d{12}:function:|\d{12}:function:)?([A-Za-z0-9_-]{1,64})(?::[$\w-]+)?")


_Run = Callable[["Twin", Pool, web.Request, str, bytes], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Twin:
    """A running deployment.

    main_status   describes the main server, if there is one
    stop          ends the deployment when it is set
    """

    config: TwinConfig
    host: Host
    pools: Mapping[str, Pool]
    main_status: Callable[[], dict[str, Any]] | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)


def twin(config: TwinConfig, host: Host, main_status: Callable[[], dict[str, Any]] | None = None) -> Twin:
    functions = [*config.functions, *([config.main] if isinstance(config.main, FunctionConfig) else [])]
    pools = {function.name: Pool(function, host, config.idle_ttl_s) for function in functions}
    return Twin(config, host, pools, main_status)


async def serve(twin: Twin, port: int = 0) -> web.AppRunner:
    """Serve on loopback `port` (0: any free one) until the caller calls `close`.

    Raises: OSError when the port is taken.
    """
    door = guard(Door("127.0.0.1", signed=True), peers.is_own_user, _refuse_access)
    app = web.Application(client_max_size=READ_LIMIT_BYTES, middlewares=[door])
    app.router.add_post("/2015-03-31/functions/{name}/invocations", functools.partial(_invoke, twin, _run))
    app.router.add_post("/2021-11-15/functions/{name}/response-streaming-invocations", functools.partial(_invoke, twin, _stream))
    app.router.add_get("/remoe/status", functools.partial(_answer_status, twin))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError:
        await runner.cleanup()
        raise
    if isinstance(main := twin.config.main, FunctionConfig):
        environment = {**main.environment, "REMOE_ENDPOINT": endpoint(runner)}
        twin.pools[main.name].function = main.model_copy(update={"environment": environment})
    return runner


def endpoint(runner: web.AppRunner) -> str:
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


async def close(twin: Twin, runner: web.AppRunner) -> None:
    """End all workers, which fails their calls, then stop serving."""
    await asyncio.gather(*(pool.close() for pool in twin.pools.values()))
    await runner.cleanup()


def status(twin: Twin) -> dict[str, Any]:
    """Make the status document: what runs, what it has done, and how it is limited."""
    mechanism = twin.host.mechanism
    return {
        "name": twin.config.name,
        "target": "local",
        "state": "running",
        "pid": os.getpid(),
        "limits": {"memory": mechanism.memory, "cpu": mechanism.cpu},
        "rtt_ms": twin.config.rtt_ms,
        "main": _main_status(twin),
        "functions": [_function_status(twin.pools[function.name]) for function in twin.config.functions],
        "trouble": sorted({trouble for pool in twin.pools.values() for each in pool.instances if (trouble := each.trouble)}),
    }


def _main_status(twin: Twin) -> dict[str, Any] | None:
    if isinstance(main := twin.config.main, FunctionConfig):
        of = _function_status(twin.pools[main.name])
        resident = sum(instance["resident_bytes"] for instance in of["instances"])
        return {"kind": "lambda", **of, "state": "running" if of["instances"] else "at rest", "resident_bytes": resident}
    return twin.main_status() if twin.main_status else None


def _function_status(pool: Pool) -> dict[str, Any]:
    return {
        "name": pool.function.name,
        "memory_mb": pool.function.memory_mb,
        **asdict(pool.counters),
        "instances": [
            {
                "pid": instance.pid,
                "state": instance.state.name,
                "resident_bytes": processes.memory(instance.pid).resident_bytes,
                "port": instance.port,
            }
            for instance in pool.instances
        ],
    }


def is_json(body: bytes) -> bool:
    """Return whether `body` is one JSON document.

    A plain ASCII string, such as a base64 payload, is recognised at memory speed: a quote at either end only, no backslash, no control
    character.

    >>> is_json(b'"QUJD"'), is_json(b'"QUJD')
    (True, False)
    """
    if len(body) >= 2 and body[0] == body[-1] == 0x22 and body.find(b'"', 1) == len(body) - 1 and b"\\" not in body and body.isascii():
        return int(np.frombuffer(body, np.uint8).min()) >= 0x20
    with suppress(ValueError, RecursionError):
        json.loads(body)
        return True
    return False


async def _invoke(twin: Twin, run: _Run, request: web.Request) -> web.StreamResponse:
    """Check a request, and let `run` do it."""
    request_id = str(uuid.uuid4())
    named = _NAME.fullmatch(request.match_info["name"])
    pool = twin.pools.get(named[1]) if named else None
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        body = bytes(PAYLOAD_LIMIT_BYTES + 1)
    kind = request.headers.get("X-Amz-Invocation-Type", "RequestResponse")
    if pool is None:
        return _refuse(request_id, 404, "ResourceNotFoundException", f"Function not found: {request.match_info['name']}")
    if len(body) > PAYLOAD_LIMIT_BYTES:
        message = f"Request must be smaller than {PAYLOAD_LIMIT_BYTES} bytes for the InvokeFunction operation"
        return _refuse(request_id, 413, "RequestTooLargeException", message)
    if body and not is_json(body):
        return _refuse(request_id, 400, "InvalidRequestContentException", "Could not parse request body into json")
    match kind:
        case "RequestResponse":
            return await run(twin, pool, request, request_id, body or b"{}")
        case "DryRun":
            return web.Response(status=204, headers={"x-amzn-RequestId": request_id})
        case _:
            message = f"The local twin serves the invocation types RequestResponse and DryRun, not {kind}"
            return _refuse(request_id, 400, "InvalidParameterValueException", message)


async def _run(twin: Twin, pool: Pool, request: web.Request, request_id: str, event: bytes) -> web.StreamResponse:
    done = await _call(twin, pool, request_id, event)
    if not isinstance(done, CallResult):
        return done
    headers = _headers(request_id)
    if done.failed:
        headers["X-Amz-Function-Error"] = "Unhandled"
    if (log := _log(request, done)) is not None:
        headers["X-Amz-Log-Result"] = log
    return web.Response(body=done.payload, content_type="application/json", headers=headers)


async def _stream(twin: Twin, pool: Pool, request: web.Request, request_id: str, event: bytes) -> web.StreamResponse:
    """Pass the response on as an event stream, which begins with its first part."""
    response = web.StreamResponse(headers={**_headers(request_id), "Content-Type": event_stream.CONTENT_TYPE})

    async def send(message: bytes) -> None:
        with suppress(ConnectionError):  # the function goes on when its client has gone, as on AWS
            if not response.prepared:
                await response.prepare(request)
            await response.write(message)

    async def take(part: bytes, content_type: str) -> None:
        await send(event_stream.chunk(part))

    done = await _call(twin, pool, request_id, event, take)
    if not isinstance(done, CallResult):
        return done
    if done.payload and not done.failed:  # of a function that does not stream
        await send(event_stream.chunk(done.payload))
    await send(event_stream.complete(done.payload if done.failed else None, _log(request, done)))
    return response


async def _call(twin: Twin, pool: Pool, request_id: str, event: bytes, sink: Sink | None = None) -> CallResult | web.Response:
    """Run a function; what cannot be run is an error of the API."""
    if twin.config.rtt_ms:
        await asyncio.sleep(twin.config.rtt_ms / 1e3)
    try:
        return await pool.invoke(request_id, event, sink)
    except Throttled:
        reason = {"Reason": "ReservedFunctionConcurrentInvocationLimitExceeded", "Type": "User"}
        return _refuse(request_id, 429, "TooManyRequestsException", "Rate Exceeded.", reason)
    except OSError as error:  # a full disk, or a folder that is gone
        return _refuse(request_id, 500, "ServiceException", f"The function could not be started: {error}")


def _headers(request_id: str) -> dict[str, str]:
    return {"x-amzn-RequestId": request_id, "X-Amz-Executed-Version": "$LATEST"}


def _log(request: web.Request, done: CallResult) -> str | None:
    """Return the end of the log in base64, where the request asks for it."""
    return base64.b64encode(done.log_tail).decode() if request.headers.get("X-Amz-Log-Type") == "Tail" else None


def _refuse(request_id: str, status: int, error: str, message: str, more: Mapping[str, str] | None = None) -> web.Response:
    """Answer with an error of the Invoke API; botocore raises the exception that x-amzn-errortype names."""
    headers = {"x-amzn-RequestId": request_id, "x-amzn-errortype": error}
    return web.json_response({"Type": "User", **(more or {}), "message": message}, status=status, headers=headers)


def _refuse_access(status: int, message: str) -> web.Response:
    return _refuse(str(uuid.uuid4()), status, _ACCESS_ERRORS.get(status, "InvalidRequestContentException"), message)


async def _answer_status(twin: Twin, _: web.Request) -> web.Response:
    return web.json_response(status(twin))
