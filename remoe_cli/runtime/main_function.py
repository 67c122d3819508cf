"""The main function: a loaded model that answers requests.

runtime/server.py takes requests over HTTP, runtime/lambda_main.py takes them as Lambda events.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remoe_cli import artifacts
from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.model.chat import Prompt, conversation
from remoe_cli.model.checkpoint import Checkpoint, find_profiled
from remoe_cli.runtime.answer import Stop
from remoe_cli.runtime.invoke import Connect, make_client
from remoe_cli.runtime.receipt import Receipt, make_receipt
from remoe_cli.runtime.server_config import ServerConfig

if TYPE_CHECKING:
    from remoe_cli.runtime.dispatch import RemoteFunction
    from remoe_cli.runtime.engine import Engine


class Request(BaseModel):
    """One request, with exactly one of `prompt`, `messages` and `prompt_token_ids`.

    `messages`, with `tools`, are as in OpenAI's chat API.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    stream: bool = False
    calls: bool = False

    def asked(self) -> Prompt | None:
        """Return the prompt, or the messages as a conversation; raises UsageError for what is no message."""
        return self.prompt if self.messages is None else conversation(self.messages, self.tools, where="The request")


class Answer(BaseModel):
    """What the main function answers to one request.

    calls   for calibration: wire bytes both ways and seconds waited, in the function, and computing, of every warm invocation
    """

    model_config = ConfigDict(frozen=True)

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    receipt: Receipt
    calls: tuple[tuple[int, float, float, float], ...] | None = None


class MainState(BaseModel):
    """What a main function holds.

    expert_bytes_held, expert_bytes_of_model    counted by tensors
    resident_bytes, anonymous_bytes             of the process, as the kernel says
    device                                      where everything but the experts is
    """

    model_config = ConfigDict(frozen=True)

    expert_bytes_held: int
    expert_bytes_of_model: int
    local_experts: int
    experts_of_model: int
    resident_bytes: int
    anonymous_bytes: int
    device: str


def parse(body: bytes | Mapping[str, Any]) -> Request:
    """Read a request from a JSON body, or from a parsed one.

    Raises: UsageError for a body that is no request.
    """
    try:
        request = Request.model_validate_json(body) if isinstance(body, bytes) else Request.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise UsageError(
            f"The request is wrong{f' at {where!r}' if where else ''}: {first['msg']}.",
            "It is a JSON object with 'prompt', 'messages' or 'prompt_token_ids', and may have 'max_new_tokens' and 'stream'.",
        ) from None
    if [request.prompt, request.messages, request.prompt_token_ids].count(None) != 2:
        raise UsageError("A request has either 'prompt' or 'prompt_token_ids', or 'messages'.", "Give one of the three.")
    request.asked()  # so that messages that are none are refused now
    return request


def described(error: Exception) -> dict[str, str]:
    """Describe an error as a document, of which runtime/client.py makes an error of the same kind."""
    if isinstance(error, RemoeError):
        return {"kind": error.kind, "message": error.message, "hint": error.hint}
    return {
        "kind": "Internal",
        "message": f"{type(error).__name__}: {error}",
        "hint": "See 'remoe logs NAME --function main'; please report it.",
    }


def until(limit_s: float, *cancelling: Event) -> Callable[[], Stop | None]:
    """Make the `stopped` of an answer that ends at an event, or when `time.monotonic()` passes `limit_s`."""

    def stopped() -> Stop | None:
        if any(event.is_set() for event in cancelling):
            return "cancelled"
        return "time-limit" if time.monotonic() > limit_s else None

    return stopped


@dataclass(frozen=True)
class MainFunction:
    """A loaded main function. It answers one request at a time."""

    config: ServerConfig
    engine: Engine

    def answer(
        self,
        request: Request,
        on_text: Callable[[int, str], None] = lambda token, text: None,
        stopped: Callable[[], Stop | None] = lambda: None,
        load_s: float = 0.0,
    ) -> Answer:
        """Generate an answer and its receipt.

        `stopped` is asked after every token. `load_s` is the time that loading this function took, if it was loaded for this request.

        Raises: what Engine.generate raises, and DeployError when the answer has to end before it has begun.
        """
        match stopped():
            case "cancelled":
                raise DeployError("The main function is ending.", "Ask again.")
            case "time-limit":
                raise DeployError(
                    "There was no time left to answer when the request's turn came.",
                    "Ask again when fewer requests wait or all is warm.",
                )
        asked = request.asked()
        ids = self.engine.prompt_ids(asked) if asked is not None else request.prompt_token_ids or ()
        generated = self.engine.generate(ids, request.max_new_tokens, on_text, stopped)
        return Answer(
            text=generated.text,
            prompt_token_ids=generated.prompt_token_ids,
            token_ids=generated.token_ids,
            finish_reason=generated.finish_reason,
            receipt=make_receipt(generated, self.config.prices, load_s),
            calls=tuple(i.sample for i in generated.invocations if i.init_ms is None and not i.retries) if request.calls else None,
        )

    def state(self) -> MainState:
        from remoe_cli.model.loader import expert_bytes_held

        spec = self.config.spec
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return MainState(
            expert_bytes_held=expert_bytes_held(self.engine.model),
            expert_bytes_of_model=spec.routed_bytes,
            local_experts=sum(map(len, self.engine.dispatcher.local.values())),
            experts_of_model=spec.experts_per_layer * len(spec.moe_layers),
            resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
            anonymous_bytes=int(status["RssAnon"].split()[0]) * 1024,
            device=str(self.engine.model.device),
        )


def load(config: ServerConfig, checkpoint: Checkpoint, connect: Connect, *, copied: bool = False) -> MainFunction:
    """Load the main function's weights, and start its expert functions, which `connect` reaches.

    With `copied`, all weights are copied into memory, so that it does not matter what becomes of their files.

    Raises: ModelError for a checkpoint that cannot be loaded, InvokeError when an expert function does not start.
    """
    from remoe_cli.runtime.dispatch import RemoteFunction
    from remoe_cli.runtime.engine import start_engine

    functions: dict[int, list[RemoteFunction]] = {}
    for f in config.functions:
        functions.setdefault(f.layer, []).append(RemoteFunction(f.function, f.experts, f.replicas, f.expert_rows))
    engine = start_engine(checkpoint, config.spec, functions, connect, gpu=config.gpu, copied=copied)
    # One token through every layer: proves the hook, and pages the weights in, before anybody waits for an answer.
    engine.generate([0], 1)
    engine.attachment.check_fired(1)
    return MainFunction(config, engine)


def load_here(server_json: Path, connect: Connect) -> MainFunction:
    """Load from the checkpoint that was profiled, on this machine. The checkpoint may change afterwards.

    Raises: ArtifactError when the checkpoint has changed, and what `load` raises.
    """
    config = artifacts.read_json(server_json, ServerConfig)
    model = config.model
    checkpoint = find_profiled(model.path, model.revision)
    main = load(config, checkpoint, connect, copied=True)
    checkpoint.check(model.revision)
    return main


def load_packaged(uri: str) -> MainFunction:
    """Load from the packaged files whose manifest is at `uri` (runtime/fetch.py).

    Expert functions are called on AWS, or on the local twin if $REMOE_ENDPOINT names it.

    Raises: what runtime/fetch.py and `load` raise.
    """
    from remoe_cli.runtime.fetch import fetch, scratch_folder

    folder = fetch(uri, scratch_folder())
    config = artifacts.read_json(folder / "server.json", ServerConfig)
    return load(
        config, Checkpoint(config.model.path, folder, config.model.revision), partial(make_client, os.environ.get("REMOE_ENDPOINT"))
    )
