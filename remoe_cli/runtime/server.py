"""Serve the main function over HTTP: on this machine, and in a SageMaker container.

    REMOE_LISTENER=DESCRIPTOR python -m remoe_cli.runtime.server SERVER.json

GET /ping           503 while the model loads, then 200 and the device of everything but the experts
POST /invocations   {"prompt", "messages" or "prompt_token_ids", "max_new_tokens", "stream"} -> one JSON document; with "stream" one JSON
                    object a line: {"text": ..} for each piece, then {"answer": ..} or {"error": ..}
GET /main           what the process holds in memory

Started as above it is the main server of a local deployment: it serves a socket that its parent has opened and keeps open, so that nobody
else gets the port between two runs. It ends when its standard input is closed, so it never outlives its parent.

access.py says which requests are taken. POST takes application/json only.

One thread does all of torch's work. It keeps answers apart, and it is faster: OpenMP gives every thread that computes its own team, and the
threads of a second team sleep between operations (measured: 45 ms a token in the first thread that computes, 88 ms in any other).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.runtime import address
from remoe_cli.runtime.access import Door, Guarded, door_of
from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.invoke import make_client
from remoe_cli.runtime.main_function import Answer, MainFunction, Request, described, load_here, parse, until

# A larger body is not even read to its end, so that its sender may see the connection close instead of the error.
_READ_LIMIT_BYTES = 4 * PAYLOAD_LIMIT_BYTES
_END_S = 20  # for answers under way when the server ends
_STATUS: tuple[tuple[type[Exception], int], ...] = ((UsageError, 400), (DeployError, 503), (RemoeError, 502), (Exception, 500))


# What happens to a request: pieces of text, then the answer or why there is none.
_Event = Piece | Answer | Exception


@dataclass(frozen=True)
class TimeLimits:
    """Seconds after its arrival at which a request's answer ends with the next token."""

    whole_s: float = math.inf
    streamed_s: float = math.inf


def make_app(loading: Future[MainFunction], model_thread: Executor, ending: threading.Event, limits: TimeLimits) -> FastAPI:
    """Make the application: `model_thread` generates one answer at a time; `ending` ends all answers."""
    app = FastAPI(title="remoe", docs_url=None, redoc_url=None, openapi_url=None)

    def ready() -> bool:
        return loading.done() and loading.exception() is None

    def loaded() -> MainFunction:
        if not ready():
            raise DeployError("The main function is still loading its model.", "Wait until GET /ping answers 200.")
        return loading.result()

    async def events(main: MainFunction, request: Request, limit_s: float, gone: threading.Event) -> AsyncGenerator[_Event]:
        """Yield what happens to a request; when `gone` is set, generation stops at the next token or does not begin."""
        loop = asyncio.get_running_loop()
        happened: asyncio.Queue[_Event] = asyncio.Queue()

        def put(event: _Event) -> None:
            loop.call_soon_threadsafe(happened.put_nowait, event)

        def on_piece(piece: Piece) -> None:
            if request.stream:
                put(piece)

        def work() -> None:
            try:
                put(main.answer(request, on_piece, until(limit_s, gone, ending)))
            except Exception as error:
                put(error)

        waiting = model_thread.submit(work)
        try:
            while isinstance(event := await happened.get(), Piece):
                yield event
            yield event
        finally:
            gone.set()
            waiting.cancel()

    @app.get("/ping")
    async def ping() -> Response:
        if not ready():
            return JSONResponse({"status": "loading"}, status_code=503)
        return JSONResponse({"status": "ready", "device": loading.result().engine.device.model_dump(mode="json")})

    @app.get("/main")
    async def state() -> Response:
        return JSONResponse(loaded().state().model_dump(mode="json"))

    @app.post("/invocations")
    async def invocations(http: HttpRequest) -> Response:
        arrived_s = time.monotonic()
        body = await _body(http)
        if body is None:
            error = UsageError(f"The request has more than {PAYLOAD_LIMIT_BYTES} bytes.", "Shorten the prompt.")
            return JSONResponse({"error": described(error)}, status_code=413)
        main, request = loaded(), parse(body)
        main.refuse(request)
        gone = threading.Event()
        watching = asyncio.create_task(_watch(http, gone))
        limit_s = limits.streamed_s if request.stream else limits.whole_s
        rest = events(main, request, arrived_s + limit_s, gone)
        # Whatever is wrong with a request is known before its first token, and has a status of its own also where it is streamed.
        first = await anext(rest)
        if request.stream and not isinstance(first, Exception):
            return StreamingResponse(_lines(first, rest, watching), media_type="application/x-ndjson")
        watching.cancel()
        await rest.aclose()
        if isinstance(first, Exception):
            raise first
        assert isinstance(first, Answer), "pieces of text are events of streamed requests only"
        return JSONResponse(first.model_dump(mode="json"))

    @app.exception_handler(HTTPException)
    async def unknown(http: HttpRequest, error: HTTPException) -> Response:
        what = UsageError(f"This server has no {http.method} {http.url.path}.", "It has GET /ping, GET /main and POST /invocations.")
        return JSONResponse({"error": described(what)}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    @app.exception_handler(RemoeError)
    async def failed(http: HttpRequest, error: Exception) -> Response:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        return JSONResponse({"error": described(error)}, status_code=status)

    return app


async def _body(http: HttpRequest) -> bytes | None:
    """Read the request's body; None when it is too large."""
    body, read = bytearray(), 0
    async for chunk in http.stream():
        read += len(chunk)
        if read <= PAYLOAD_LIMIT_BYTES:
            body += chunk
        elif read > _READ_LIMIT_BYTES:
            break
    return bytes(body) if read <= PAYLOAD_LIMIT_BYTES else None


async def _watch(http: HttpRequest, gone: threading.Event) -> None:
    """Set `gone` when the client goes away, whose request has been read to its end."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _lines(first: _Event, rest: AsyncGenerator[_Event], watching: asyncio.Task[None]) -> AsyncGenerator[str]:
    """Write what happens to a streamed request, one JSON object a line."""
    try:
        yield _line(first)
        async for event in rest:
            yield _line(event)
    finally:
        watching.cancel()
        await rest.aclose()


def _line(event: _Event) -> str:
    match event:
        case Exception():
            content: dict[str, Any] = {"error": described(event)}
        case Answer():
            content = {"answer": event.model_dump(mode="json")}
        case Piece():
            content = {"text": event.text, "token_id": event.token_id}
            content |= {"choice": event.choice} if event.choice else {}
            content |= {"logprobs": [asdict(each) for each in event.logprobs]} if event.logprobs else {}
    return json.dumps(content, ensure_ascii=False) + "\n"


class _Server(uvicorn.Server):
    """A uvicorn server that ends on SIGINT and SIGTERM without raising the signal again.

    Process 1 of a container does not die of a signal that it raises.
    """

    def __init__(self, config: uvicorn.Config, ending: threading.Event) -> None:
        super().__init__(config)
        self._ending = ending

    def end(self) -> None:
        self.force_exit = self._ending.is_set()  # a second signal ends at once
        self._ending.set()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, lambda *_: self.end()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises: DeployError for one that cannot be opened."""
    try:
        return address.listen(host, port)
    except OSError as error:
        where = address.place(host, port)
        raise DeployError(f"The main function cannot listen on {where}: {error.strerror}.", "Choose another address or port.") from None


def serve(load: Callable[[], MainFunction], listener: socket.socket, door: Door, limits: TimeLimits = TimeLimits()) -> None:
    """Serve until SIGTERM or SIGINT, then end within 20 s; requests are taken while the model loads.

    Raises: what `load` raises.
    """
    model_thread, ending = ThreadPoolExecutor(1, "model"), threading.Event()
    loading = model_thread.submit(load)
    app = Guarded(make_app(loading, model_thread, ending, limits), door)
    # Without proxy_headers: X-Forwarded-For would say who asks.
    config = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False, timeout_graceful_shutdown=_END_S)
    server = _Server(config, ending)
    loading.add_done_callback(lambda done: server.end() if done.exception() else None)
    with listener:
        server.run(sockets=[listener])
    model_thread.shutdown(wait=False, cancel_futures=True)
    if loading.done():
        loading.result()


def run(load: Callable[[], MainFunction], listener: socket.socket, door: Door, limits: TimeLimits = TimeLimits()) -> NoReturn:
    """Run `serve` as a whole program.

    It logs what loading was billed, prints an error and exits with status 1, or exits with status 0.
    """

    def logged() -> MainFunction:
        main = load()
        print(main.loading_billed, file=sys.stderr)
        return main

    try:
        serve(logged, listener, door, limits)
    except RemoeError as error:
        sys.exit(f"error: {error.message}\n  hint: {error.hint}")
    # Not the interpreter's own end, which would wait for a thread that waits for an expert function.
    os._exit(0)


def _end_with_parent() -> None:
    """Exit as soon as standard input is closed: the process that started the server has ended."""
    while os.read(0, 4096):  # not sys.stdin: its lock would trouble the interpreter's own end
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connect = partial(make_client, os.environ.get("REMOE_ENDPOINT"))
    inherited = socket.socket(fileno=int(os.environ["REMOE_LISTENER"]))
    run(lambda: load_here(Path(sys.argv[1]), connect), inherited, door_of(inherited, "127.0.0.1"))
