"""The main model server: one process that holds the main share of a model and answers over HTTP.

    python -m remoe_cli.runtime.server CONFIG.json

`GET /ping` answers 200 once the model is loaded; `POST /invocations` takes {"prompt" or "prompt_token_ids",
"max_new_tokens", "stream"} and answers one JSON document, or with "stream" one JSON object a line: {"text": ..} for each
piece, then {"answer": ..} or {"error": ..}. `GET /main` tells what the process holds. Port and contract are those of a
SageMaker container. The server listens on loopback, and ends when its standard input is closed, so that it never
outlives what started it.

All of torch's work is done by one thread. It keeps answers apart, and it is what makes them fast: OpenMP gives every
thread that computes a team of its own, and from the second team on its threads sleep between operations (measured:
45 ms a token in the first thread that computes, 88 ms in any other).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from remoe_cli import artifacts
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime.prediction import Predict, predictor
from remoe_cli.runtime.receipt import Prices, Receipt, make_receipt

if TYPE_CHECKING:
    from remoe_cli.runtime.engine import Engine


class ServedFunction(BaseModel):
    """A function of hidden layer `layer` (runtime/dispatch.py, RemoteFunction); a layer may have several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    function: str
    experts: tuple[int, ...]
    replicas: int
    expert_rows: float


class ServerConfig(artifacts.Document):
    """What the server is told. The functions' endpoint comes from REMOE_ENDPOINT, set by what starts it."""

    schema_version: str = "remoe.server/1"
    model: ModelRef
    spec: MoeSpec
    functions: tuple[ServedFunction, ...]
    port: int
    plan: str
    prices: Prices


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    stream: bool = False
    calls: bool = False


class Answer(BaseModel):
    """`calls`, for calibration: of every warm invocation the bytes both ways, and the seconds waited, in the function and computing."""

    model_config = ConfigDict(frozen=True)

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    receipt: Receipt
    calls: tuple[tuple[int, float, float, float], ...] | None = None


class MainState(BaseModel):
    """Bytes by the tensors themselves, and what the kernel says is resident (all of it, and its anonymous part)."""

    model_config = ConfigDict(frozen=True)

    expert_bytes_held: int
    expert_bytes_of_model: int
    local_experts: int
    experts_of_model: int
    resident_bytes: int
    anonymous_bytes: int


def load_engine(config: ServerConfig) -> Engine:
    from remoe_cli.model.checkpoint import find
    from remoe_cli.runtime.dispatch import RemoteFunction
    from remoe_cli.runtime.engine import start_engine

    checkpoint = find(config.model.path, config.model.revision)
    if checkpoint.revision != config.model.revision:
        raise RemoeError(f"The model {config.model.path} has changed since it was profiled.", "Profile, plan and deploy again.")
    functions: dict[int, list[RemoteFunction]] = {}
    for f in config.functions:
        functions.setdefault(f.layer, []).append(RemoteFunction(f.function, f.experts, f.replicas, f.expert_rows))
    engine = start_engine(checkpoint, config.spec, functions, os.environ.get("REMOE_ENDPOINT"))
    # One token through every layer: proves the hook, and pages the weights in, before anybody waits for an answer.
    engine.generate([0], 1)
    engine.attachment.check_fired(1)
    return engine


def main_state(engine: Engine, spec: MoeSpec) -> MainState:
    from remoe_cli.model.loader import expert_bytes_held

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return MainState(
        expert_bytes_held=expert_bytes_held(engine.model),
        expert_bytes_of_model=spec.routed_bytes,
        local_experts=sum(map(len, engine.dispatcher.local.values())),
        experts_of_model=spec.experts_per_layer * len(spec.moe_layers),
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
        anonymous_bytes=int(status["RssAnon"].split()[0]) * 1024,
    )


def make_app(engine: Engine, config: ServerConfig, predict: Predict, model_thread: Executor) -> Any:
    """The HTTP application. One answer at a time, in `model_thread`; further requests wait."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    app = FastAPI(title="remoe", docs_url=None, redoc_url=None, openapi_url=None)

    def run(request: Request, on_text: Any, cancelled: Any) -> Answer:
        if (request.prompt is None) == (request.prompt_token_ids is None):
            raise UsageError("A request has either 'prompt' or 'prompt_token_ids'.", "Give one of the two.")
        ids = request.prompt_token_ids if request.prompt is None else engine.prompt_ids(request.prompt)
        generated = engine.generate(ids or (), request.max_new_tokens, on_text, cancelled)
        return Answer(
            text=generated.text,
            prompt_token_ids=generated.prompt_token_ids,
            token_ids=generated.token_ids,
            finish_reason=generated.finish_reason,
            receipt=make_receipt(generated, config.prices, predict(len(generated.prompt_token_ids), len(generated.token_ids) - 1)),
            calls=tuple(i.sample for i in generated.invocations if i.init_ms is None and not i.retries) if request.calls else None,
        )

    async def stream(request: Request) -> AsyncIterator[str]:
        """Lines as they come; when the client goes away, this generator is cancelled and generation stops at the next token."""
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()

        def put(line: str | None) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                answer = run(request, lambda token, text: put(_line({"text": text, "token_id": token})), gone.is_set)
                put(_line({"answer": answer.model_dump(mode="json")}))
            except Exception as error:
                put(_line({"error": _error(error)}))
            put(None)

        model_thread.submit(work)
        try:
            while (line := await lines.get()) is not None:
                yield line
        finally:
            gone.set()

    @app.get("/ping")
    def ping() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/main")
    def state() -> MainState:
        return main_state(engine, config.spec)

    @app.post("/invocations")
    def invocations(request: Request) -> Any:
        if request.stream:
            return StreamingResponse(stream(request), media_type="application/x-ndjson")
        try:
            return model_thread.submit(run, request, lambda token, text: None, lambda: False).result()
        except RemoeError as error:
            return JSONResponse({"error": _error(error)}, status_code=400 if isinstance(error, UsageError) else 502)

    return app


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _error(error: Exception) -> dict[str, str]:
    if isinstance(error, RemoeError):
        return {"kind": error.kind, "message": error.message, "hint": error.hint}
    return {
        "kind": "Internal",
        "message": f"{type(error).__name__}: {error}",
        "hint": "See 'remoe logs NAME --function main'; please report it.",
    }


def _end_with_parent() -> None:
    """Exit as soon as standard input is closed: whoever started the server is gone."""
    while os.read(0, 4096):  # not sys.stdin: its lock would trouble the interpreter's own end
        pass
    os._exit(0)


def main(path: str) -> None:
    import uvicorn

    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = artifacts.read_json(Path(path), ServerConfig)
    with ThreadPoolExecutor(1, "model") as model_thread:
        try:
            engine = model_thread.submit(load_engine, config).result()
        except RemoeError as error:
            sys.exit(f"error: {error.message}\n  hint: {error.hint}")
        app = make_app(engine, config, predictor(Path(config.plan)), model_thread)
        uvicorn.run(app, host="127.0.0.1", port=config.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1])
