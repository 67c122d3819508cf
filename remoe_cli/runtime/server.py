"""The main function over HTTP: one application, for the local server, for a SageMaker container and for one's own machine.

    python -m remoe_cli.runtime.server SERVER.json PORT

`GET /ping` answers 503 while the model loads, then 200; `POST /invocations` takes {"prompt", "messages" or "prompt_token_ids",
"max_new_tokens", "stream"} and answers one JSON document, or with "stream" one JSON object a line: {"text": ..} for each
piece, then {"answer": ..} or {"error": ..}. `GET /main` tells what the process holds.
Run as above, the server is a deployment's own: it listens on loopback, and ends when its standard input is closed, so that it never
outlives what started it.

All of torch's work is done by one thread. It keeps answers apart, and it is what makes them fast: OpenMP gives every
thread that computes a team of its own, and from the second team on its threads sleep between operations (measured:
45 ms a token in the first thread that computes, 88 ms in any other).
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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.runtime.answer import Stop
from remoe_cli.runtime.main_function import MainFunction, Request, described, load_here, parse, until

# A larger body is not even read to its end, so that its sender may see the connection close instead of the error.
_READ_LIMIT_BYTES = 4 * PAYLOAD_LIMIT_BYTES
_END_S = 20  # for answers under way when the server ends
_STATUS: tuple[tuple[type[Exception], int], ...] = ((UsageError, 400), (DeployError, 503), (RemoeError, 502), (Exception, 500))


@dataclass(frozen=True)
class Limits:
    """Seconds from a request's arrival after which its answer ends with the next token, whole and streamed."""

    whole_s: float = math.inf
    streamed_s: float = math.inf


def make_app(loading: Future[MainFunction], model_thread: Executor, ending: threading.Event, limits: Limits) -> FastAPI:
    """The application. One answer at a time, in `model_thread`; further requests wait. `ending` ends answers with their next token."""
    app = FastAPI(title="remoe", docs_url=None, redoc_url=None, openapi_url=None)

    def ready() -> bool:
        return loading.done() and loading.exception() is None

    def loaded() -> MainFunction:
        if not ready():
            raise DeployError("The main function is still loading its model.", "Wait until GET /ping answers 200.")
        return loading.result()

    async def stream(main: MainFunction, request: Request, limit_s: float) -> AsyncIterator[str]:
        """Lines as they come; when the client goes away, this generator is cancelled and generation stops at the next token."""
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()

        def put(content: dict[str, Any] | None) -> None:
            line = None if content is None else json.dumps(content, ensure_ascii=False) + "\n"
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                stopped = until(limit_s, gone, ending)
                answer = main.answer(request, lambda token, text: put({"text": text, "token_id": token}), stopped)
                put({"answer": answer.model_dump(mode="json")})
            except Exception as error:
                put({"error": described(error)})
            put(None)

        model_thread.submit(work)
        try:
            while (line := await lines.get()) is not None:
                yield line
        finally:
            gone.set()

    @app.get("/ping")
    async def ping() -> Response:
        return PlainTextResponse("ok") if ready() else PlainTextResponse("loading", status_code=503)

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
        if request.stream:
            return StreamingResponse(stream(main, request, arrived_s + limits.streamed_s), media_type="application/x-ndjson")
        stopped: Callable[[], Stop | None] = until(arrived_s + limits.whole_s, ending)
        answer = await asyncio.wrap_future(model_thread.submit(main.answer, request, stopped=stopped))
        return JSONResponse(answer.model_dump(mode="json"))

    @app.exception_handler(Exception)
    @app.exception_handler(RemoeError)
    async def failed(http: HttpRequest, error: Exception) -> Response:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        return JSONResponse({"error": described(error)}, status_code=status)

    return app


async def _body(http: HttpRequest) -> bytes | None:
    """The request's body; None where it is too large."""
    body, read = bytearray(), 0
    async for chunk in http.stream():
        read += len(chunk)
        if read <= PAYLOAD_LIMIT_BYTES:
            body += chunk
        elif read > _READ_LIMIT_BYTES:
            break
    return bytes(body) if read <= PAYLOAD_LIMIT_BYTES else None


class _Server(uvicorn.Server):
    """Ends when told to or by a signal, which it does not raise again as uvicorn's does: process 1 of a container would not die of it."""

    def __init__(self, config: uvicorn.Config, ending: threading.Event) -> None:
        super().__init__(config)
        self._ending = ending

    def end(self) -> None:
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


def serve(load: Callable[[], MainFunction], host: str, port: int, limits: Limits = Limits()) -> None:
    """Answer until SIGTERM or SIGINT, from the start on; the model loads meanwhile. Ends within 20 s of the signal.

    Raises DeployError for a port that cannot be had, and what `load` raises.
    """
    try:
        listener = socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise DeployError(f"The main function cannot listen on {host}:{port}: {error.strerror}.", "Choose another port.") from None
    model_thread, ending = ThreadPoolExecutor(1, "model"), threading.Event()
    loading = model_thread.submit(load)
    app = make_app(loading, model_thread, ending, limits)
    server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_END_S), ending)
    loading.add_done_callback(lambda done: server.end() if done.exception() else None)
    with listener:
        server.run(sockets=[listener])
    model_thread.shutdown(wait=False, cancel_futures=True)
    if loading.done():
        loading.result()


def serve_here(name: str, server_json: Path, endpoint: str | None, host: str, port: int, say: Callable[[str], None]) -> None:
    """`serve` for the deployment `name`, whose main function loads from this machine's checkpoint (main_function.load_here)."""
    say(f"Serving '{name}' on http://{host}:{port}; GET /ping answers 200 once the model is loaded. Ctrl-C ends it.")
    serve(lambda: load_here(server_json, endpoint), host, port)


def run(load: Callable[[], MainFunction], host: str, port: int, limits: Limits = Limits()) -> NoReturn:
    """`serve` as a whole program."""
    try:
        serve(load, host, port, limits)
    except RemoeError as error:
        sys.exit(f"error: {error.message}\n  hint: {error.hint}")
    # Not the interpreter's own end, which would wait for a thread that waits for an expert function.
    os._exit(0)


def _end_with_parent() -> None:
    """Exit as soon as standard input is closed: whoever started the server is gone."""
    while os.read(0, 4096):  # not sys.stdin: its lock would trouble the interpreter's own end
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run(lambda: load_here(Path(sys.argv[1]), os.environ.get("REMOE_ENDPOINT")), "127.0.0.1", int(sys.argv[2]))
