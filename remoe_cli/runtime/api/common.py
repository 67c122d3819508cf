"""What all APIs share: a body, the request that is made of it, and what went wrong."""

from __future__ import annotations

import json
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from remoe_cli.artifacts import escaped
from remoe_cli.errors import DeployError, LongRequestError, RemoeError, UsageError
from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.main_function import Answer, MainFunction, Request, described
from remoe_cli.runtime.receipt import receipt_of

_log = logging.getLogger(__name__)  # without a handler, its lines go to stderr: the log of a main function
# What happens to a request: pieces of text, then the answer or why there is none.
Event = Piece | Answer | Exception


class Body(BaseModel):
    """A request's body, or a part of it: unknown parameters and values of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Refusal(UsageError):
    """A request that is refused with a status of its own.

    param   the parameter that is wrong
    code    a word for programs
    """

    def __init__(self, message: str, hint: str = "", *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(escaped(message, 1000), hint)  # names and values of a client's may be of any length, and hold any character
        self.status, self.code = status, code
        self.param = None if param is None else escaped(param, 100)

    @property
    def kind(self) -> str:
        return "Usage"


class BusyError(DeployError):
    """A server has as many requests as it takes; `retry_s` says when to ask again."""

    retry_s = 1

    @property
    def kind(self) -> str:
        return "Deploy"


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BusyError, 429),
    (UsageError, 400),
    (DeployError, 503),
    (RemoeError, 502),
    (Exception, 500),
)


@dataclass(frozen=True)
class Fault:
    """Why a request has no answer.

    document   remoe's own description: kind, message, hint, and the receipt of what was billed
    """

    status: int
    document: Mapping[str, Any]
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        return " ".join(filter(None, (self.document["message"], self.document["hint"])))

    @property
    def receipt(self) -> dict[str, Any]:
        return {"remoe": self.document["receipt"]} if self.document.get("receipt") else {}


def log_fault(error: Exception) -> None:
    """Log where a fault of our own code came from, without its message, which may hold a prompt."""
    _log.error("%s at\n%s", type(error).__name__, "".join(traceback.format_list(traceback.extract_tb(error.__traceback__))))


def fault_of(error: Exception, prompt: str | None = None) -> Fault:
    """Describe an error for a client, and log what is no error of remoe.

    `prompt` is the parameter that holds the prompt: it is the wrong one where a request is too long.
    A client must not repeat what has failed after it was billed.
    """
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    if not isinstance(error, RemoeError):
        log_fault(error)
    headers = {"x-should-retry": "false"} if status in (500, 502) or receipt_of(error) is not None else {}
    match error:
        case Refusal():
            return Fault(error.status, described(error), error.param, error.code, headers)
        case BusyError():
            return Fault(status, described(error), headers={"retry-after": str(error.retry_s)})
        case LongRequestError():
            return Fault(status, described(error), prompt, headers=headers)
    return Fault(status, described(error), headers=headers)


@dataclass(frozen=True)
class Asked:
    """A request as it came, and what is made of it.

    body      by the model of its API
    id        of its answer, without the prefix of the API
    """

    request: Request
    body: Any
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Api:
    """One API.

    parse    body -> what is asked. Raises: UsageError for what is wrong or not supported
    whole    the document of an answer
    stream   what happens -> lines as they are sent
    error    the document of an error
    prompt   the parameter that holds the prompt; None where errors name no parameter
    comment  a line that clients of a stream read over
    """

    media_type: str
    parse: Callable[[bytes, MainFunction], Asked]
    whole: Callable[[Asked, Answer], dict[str, Any]]
    stream: Callable[[Asked, AsyncIterator[Event]], AsyncIterator[str]]
    error: Callable[[Fault], dict[str, Any]]
    prompt: str | None = None
    comment: str = ": still here\n\n"


Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], body: bytes) -> Model:
    """Read a body; raises Refusal that names the parameter which is wrong or not supported."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def request(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Request:
    """Make a request of what an API's body says, without the parameters that it leaves out.

    `names` are the API's names of our fields, for errors.
    """
    try:
        made = Request.model_validate(fields)
        made.asked()  # messages that are none are refused before the request waits for its turn
        return made
    except ValidationError as error:
        raise _refusal(error, names or {}) from None
    except UsageError as error:
        param = (names or {}).get("messages", "messages")
        raise Refusal(f"The parameter '{param}' is wrong. {error.message}", param=param) from None


def _refusal(error: ValidationError, names: Mapping[str, str] | None = None) -> Refusal:
    def place(found: Any) -> list[str]:
        last = len(found["loc"]) - 1 if found["type"] == "extra_forbidden" else 0  # the first part is a field's name, and so is this one
        return [str(part) for at, part in enumerate(found["loc"]) if at in (0, last) or not _is_variant(part)]

    # Of a value that may be of several types, the one that fits best is wrong at its deepest place.
    first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(place(found)))
    where = place(first)
    where[:1] = [(names or {}).get(where[0], where[0])] if where else []
    param = ".".join(where)[:100] or None
    if param is None:
        return Refusal(f"The request is wrong: {first['msg']}.", "It is a JSON object.")
    if first["type"] == "too_short" and not first["input"]:
        return Refusal(f"The parameter '{param}' is empty.", "Give at least one item.", param=param)
    if first["type"] == "extra_forbidden":
        return Refusal(f"The parameter '{param}' is not supported.", "Leave it out.", param=param, code="unsupported_parameter")
    if first["type"] in ("literal_error", "none_required", "too_long") and "Input should be" in first["msg"]:
        return Refusal(f"The parameter '{param}' is supported with one value only: {first['msg']}.", param=param, code="unsupported_value")
    return Refusal(f"The parameter '{param}' is wrong: {first['msg']}.", param=param)


def _is_variant(part: str | int) -> bool:
    """Tell whether a part of a location is the name of a union's variant, such as 'list[str]', and no name of a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool") or part[:1].isupper())


def check_model(asked: str, main: MainFunction) -> None:
    """Raise Refusal for another model than the one that is served.

    An empty name is this model: SageMaker's own clients send one, as the endpoint's name is in the URL.
    """
    if asked not in ("", main.name):
        raise Refusal(
            f"The model {asked!r:.200} does not exist.",
            f"This server has '{main.name}'.",
            status=404,
            param="model",
            code="model_not_found",
        )


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]  # one text, or a list of them

# Parameters of OpenAI's APIs, and of vLLM's, that our requests have by the same name.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "n")


class SampledBody(Body):
    """Parameters that OpenAI's and vLLM's chat and completions have."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: Texts | None = None
    n: int | None = None
    stream: bool | None = None
    user: str | None = None


class StreamOptions(Body):
    """Whether a stream ends with its usage."""

    include_usage: bool | None = None


def sampled(body: Any, main: MainFunction) -> dict[str, Any]:
    """Return the sampling parameters of a request: its own, then the model's, then a temperature of 1."""
    given = {name: value for name in SAMPLING if (value := getattr(body, name, None)) is not None}
    if given.get("top_k") == -1:  # vLLM's word for all tokens
        given["top_k"] = 0
    lists = {name: value for name in ("logit_bias", "stop", "user") if (value := getattr(body, name, None))}
    return {"temperature": 1.0, **main.engine.defaults, **given, **lists}


_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: Sequence[Mapping[str, Any]], name: str = "messages") -> None:
    """Raise Refusal for what of messages and of their parts is no text, or would change nothing."""
    for index, message in enumerate(messages):
        where, content = f"{name}.{index}", message.get("content")
        _check_keys(message, ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"), where)
        if not isinstance(content, str | list | None):
            raise Refusal(f"The parameter '{where}.content' is neither text nor parts.", param=f"{where}.content")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            place = f"{where}.content.{at}"
            if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
                raise Refusal(f"The parameter '{place}' is no text, and nothing else is supported.", param=place, code="unsupported_value")
            _check_keys(part, ("type", "text"), place)


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key, value in given.items():
        if key not in known and value not in (None, [], {}):
            param = f"{where}.{key}"[:100]
            raise Refusal(f"The parameter '{param}' is not supported.", "Leave it out.", param=param, code="unsupported_parameter")


def sse(document: Mapping[str, Any], event: str | None = None) -> str:
    """Write one server-sent event."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def usage_receipt(answer: Answer) -> dict[str, Any]:
    """Return the receipt as it rides along with the usage, with the reasons for which the answers ended.

    Of the functions it has how many were called, as a model may have hundreds.
    """
    receipt = answer.receipt.model_dump(mode="json", exclude={"functions"})
    reasons = [choice.finish_reason for choice in answer.choices]
    return receipt | {"functions_called": len(answer.receipt.functions), "finish_reasons": reasons}
