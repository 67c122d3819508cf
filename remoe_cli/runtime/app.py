"""The application of a main server: which path does what, and who waits for whom.

GET /ping, /health, /ready   503 while the model loads, then 200 and the device of everything but the experts
GET /metrics                 for Prometheus (metrics.py)
GET /main                    what the process holds in memory
GET /openapi.json            the paths and the bodies that they take (api/document.py)
GET /v1/models               the model that is served
POST /invocations            a request of any API that the payload shows; remoe's own is {"prompt", "messages" or "prompt_token_ids",
                             "max_new_tokens", "stream", ..}
POST /v1/...                 the APIs of OpenAI and Anthropic (api/routes.py); /openai/v1/... too, as SageMaker's paths are

One thread does all of torch's work, step by step for all requests that are answered at once (scheduler.py). One is faster: OpenMP gives
every thread that computes its own team, and the threads of a second team sleep between operations (measured: 45 ms a token in the first
thread that computes, 88 ms in any other).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from remoe_cli.errors import DeployError, RemoeError
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.plan.mains import places
from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.api import routes
from remoe_cli.runtime.api.common import Api, Asked, BusyError, Event, Refusal, fault_of
from remoe_cli.runtime.api.document import document
from remoe_cli.runtime.api.messages import count_tokens
from remoe_cli.runtime.api.native import NATIVE
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.main_function import Answer, MainFunction, until
from remoe_cli.runtime.metrics import Metrics
from remoe_cli.runtime.receipt import attach, receipt_of
from remoe_cli.runtime.scheduler import Job, Scheduler

# A larger body is not even read to its end, so that its sender may see the connection close instead of the error.
_READ_LIMIT_BYTES = 4 * PAYLOAD_LIMIT_BYTES
_LOOK_S = 0.5  # between two looks whether a client that waits for its turn is still there
KEEP_ALIVE_S = 15.0  # as browsers and proxies expect it of event streams
PROBES = ("/ping", "/health", "/ready")
_PREFIXES = ("", "/openai")


def make_app(loading: Future[MainFunction], model_thread: Executor, ending: threading.Event, limits: Limits) -> FastAPI:
    """Make the application: `model_thread` does all of torch's work; `ending` ends all answers."""
    app = FastAPI(title="remoe", docs_url=None, redoc_url=None, openapi_url=None)
    queue = _Queue(limits.requests)
    counting, counters = ThreadPoolExecutor(1, "counting"), dict[int, Any]()

    def ready() -> bool:
        return loading.done() and loading.exception() is None

    def loaded() -> MainFunction:
        if not ready():
            raise DeployError("The main function is still loading its model.", "Wait until GET /ping answers 200.")
        return loading.result()

    scheduler = Scheduler(model_thread, loaded)

    def metrics() -> Metrics:
        if queue.metrics is None:
            queue.metrics = Metrics(loaded().name, lambda: scheduler.running, lambda: scheduler.waiting)
        return queue.metrics

    async def events(main: MainFunction, asked: Asked, client: str, arrived_s: float, gone: threading.Event) -> AsyncGenerator[Event]:
        """Yield what happens to a request; when `gone` is set, generation stops at the next token or does not begin."""
        loop, count = asyncio.get_running_loop(), metrics()
        happened: asyncio.Queue[Event] = asyncio.Queue()
        limit_s = arrived_s + (limits.streamed_s if asked.request.stream else limits.whole_s)

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(happened.put_nowait, event)

        def on_piece(piece: Piece) -> None:
            if asked.request.stream:
                put(piece)

        def ended(result: Answer | Exception) -> None:
            if isinstance(result, Answer):
                count.answered(result, arrived_s, job.begun_s)
            else:
                count.failed(receipt_of(result))
            put(result)

        job = Job(lambda: main.answering(asked.request, on_piece, until(limit_s, gone, ending)), ended, client)
        with queue.place(count, main.concurrency):
            scheduler.submit(job)

            async def next_event() -> Event:
                """Wait for what happens next; the place of a client that goes before its turn is free at once."""
                while True:
                    with suppress(TimeoutError):
                        return await asyncio.wait_for(happened.get(), _LOOK_S)
                    if gone.is_set() and scheduler.withdraw(job):
                        return DeployError("The client has gone before its request had its turn.", "")

            try:
                while isinstance(event := await next_event(), Piece):
                    yield event
                yield event
            finally:
                gone.set()
                scheduler.withdraw(job)

    @app.get("/ping")
    @app.get("/health")
    @app.get("/ready")
    async def ping() -> Response:
        if not ready():
            return JSONResponse({"status": "loading"}, status_code=503)
        return JSONResponse({"status": "ready", "device": loading.result().engine.device.model_dump(mode="json")})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics().text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    async def described_paths() -> Response:
        return JSONResponse(document())

    @app.get("/main")
    async def state() -> Response:
        return JSONResponse(loaded().state().model_dump(mode="json"))

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(loaded())]})

    async def model(name: str) -> Response:
        if name != loaded().name:
            raise Refusal(
                f"The model {name!r:.200} does not exist.", "See GET /v1/models.", status=404, param="model", code="model_not_found"
            )
        return JSONResponse(_model(loaded()))

    async def answer(http: HttpRequest) -> Response:
        arrived_s = time.monotonic()
        body = await _body(http)
        path = http.url.path
        api = routes.of_payload(body) if path == routes.INVOCATIONS else routes.of_path(path)
        try:
            return await answer_of(http, api, body, arrived_s)
        except Exception as error:
            return _failed(api, error)

    async def answer_of(http: HttpRequest, api: Api, body: bytes, arrived_s: float) -> Response:
        main = loaded()
        # In a thread of its own: a model's first grammar takes a second, for a large vocabulary.
        asked = await asyncio.to_thread(_taken, api, body, main)
        gone = threading.Event()
        watching = asyncio.create_task(_watch(http, gone))
        client = f"{http.client.host if http.client else ''} {asked.request.user or ''}"
        rest = _of_api(api, events(main, asked, client, arrived_s, gone))
        coming = asyncio.ensure_future(anext(rest))
        try:
            # What is wrong with a request is known before its first token, and has a status of its own also where it is streamed; but a
            # stream begins before its first token where that takes long.
            await asyncio.wait([coming], timeout=KEEP_ALIVE_S if asked.request.stream else None)
            first = coming.result() if coming.done() else None
        except BaseException:
            coming.cancel()
            watching.cancel()
            raise
        if asked.request.stream and not isinstance(first, Exception):
            return StreamingResponse(_lines(api, asked, coming, rest, watching), media_type=api.media_type)
        watching.cancel()
        await rest.aclose()
        if isinstance(first, Exception):
            raise first
        assert isinstance(first, Answer), "pieces of text are events of streamed requests only"
        return JSONResponse(api.whole(asked, first))

    async def count(http: HttpRequest) -> Response:
        body, main = await _body(http), loaded()
        # In a thread of its own, so that it waits for no answer. A tokenizer serves one thread at a time: this one has its own.
        counted = await asyncio.get_running_loop().run_in_executor(counting, lambda: count_tokens(body, main, counters))
        return JSONResponse({"input_tokens": counted})

    async def no_responses(name: str) -> Response:
        raise Refusal("This server keeps no responses: there is none to get, cancel or delete.", "Keep the answer.", code="not_stored")

    app.post(routes.INVOCATIONS)(answer)
    for prefix in _PREFIXES:
        app.get(f"{prefix}/v1/models")(models)
        app.get(f"{prefix}/v1/models/{{name:path}}")(model)
        app.post(f"{prefix}/v1/messages/count_tokens")(count)
        for path in routes.PATHS:
            app.post(f"{prefix}{path}")(answer)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            app.api_route(f"{prefix}/v1/responses/{{name}}{path}", methods=[method])(no_responses)

    @app.exception_handler(HTTPException)
    async def unknown(http: HttpRequest, error: HTTPException) -> Response:
        what = Refusal(
            f"This server has no {http.method} {http.url.path}.",
            f"It has GET /ping, /metrics, /main and /v1/models, and POST /invocations, {', '.join(routes.PATHS)}.",
            status=error.status_code,
        )
        return _failed(routes.of_path(http.url.path), what, error.headers)

    @app.exception_handler(Exception)
    @app.exception_handler(RemoeError)
    async def failed(http: HttpRequest, error: Exception) -> Response:
        return _failed(routes.of_path(http.url.path), error)

    return app


def _taken(api: Api, body: bytes, main: MainFunction) -> Asked:
    """Read a request. Raises: what is wrong with it, of which its grammar takes time to tell."""
    asked = api.parse(body, main)
    main.refuse(asked.request)
    return asked


class _Queue:
    """The places for requests that are answered or wait, and what is counted of them."""

    def __init__(self, places: int) -> None:
        self._places, self._taken = places, 0
        self.metrics: Metrics | None = None

    @contextmanager
    def place(self, count: Metrics, at_once: int) -> Iterator[None]:
        """Hold a place; raises BusyError where there is none."""
        if self._taken >= (most := places(at_once, self._places)):
            count.refused()
            raise BusyError(f"This server has {most} requests, which is all it takes.", "Ask again in a moment.")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


def _model(main: MainFunction) -> dict[str, Any]:
    positions = main.engine.positions
    return {"id": main.name, "object": "model", "created": main.created, "owned_by": "remoe", "max_model_len": positions}


def _failed(api: Api, error: Exception, headers: Any = None) -> Response:
    fault = fault_of(error, api.prompt)
    return JSONResponse(api.error(fault), status_code=fault.status, headers={**(headers or {}), **fault.headers})


async def _of_api(api: Api, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Yield what happens; for all APIs but remoe's own, an answer that the server's end has cut is an error."""
    try:
        async for event in events:
            if isinstance(event, Answer) and api is not NATIVE and any(c.finish_reason == "cancelled" for c in event.choices):
                error = DeployError("The server is ending, so the answer is not complete.", "Ask again.")
                attach(error, event.receipt)
                yield error
            else:
                yield event
    finally:
        await events.aclose()


async def _body(http: HttpRequest) -> bytes:
    """Read the request's body; raises Refusal when it is too large."""
    body, read = bytearray(), 0
    async for chunk in http.stream():
        read += len(chunk)
        if read <= PAYLOAD_LIMIT_BYTES:
            body += chunk
        elif read > _READ_LIMIT_BYTES:
            break
    if read > PAYLOAD_LIMIT_BYTES:
        raise Refusal(f"The request has more than {PAYLOAD_LIMIT_BYTES} bytes.", "Shorten the prompt.", status=413)
    return bytes(body)


async def _watch(http: HttpRequest, gone: threading.Event) -> None:
    """Set `gone` when the client goes away, whose request has been read to its end."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _lines(
    api: Api, asked: Asked, first: asyncio.Future[Event], rest: AsyncGenerator[Event], watching: asyncio.Task[None]
) -> AsyncGenerator[str]:
    """Write what happens to a streamed request, and a comment where nothing happens for a while, so that no proxy closes the connection."""

    async def every() -> AsyncIterator[Event]:
        try:
            yield await first
        except Exception as error:
            yield error
        async for event in rest:
            yield event

    lines = aiter(api.stream(asked, every()))
    line = asyncio.ensure_future(anext(lines, None))
    try:
        while True:
            done, _ = await asyncio.wait([line], timeout=KEEP_ALIVE_S)
            if not done:
                yield api.comment
            elif (text := line.result()) is None:
                return
            else:
                yield text
                line = asyncio.ensure_future(anext(lines, None))
    finally:
        line.cancel()
        watching.cancel()
        await asyncio.wait([line])
        await rest.aclose()
