"""Ask a main function that runs: send one prompt, pass its text on, return the answer document.

Http         a main server of remoe; text is streamed
LambdaMain   a Lambda function, on AWS or on the local twin; text is streamed, but by one that scales to zero, whose text comes whole
SageMaker    a SageMaker endpoint; text is streamed
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from remoe_cli import bounded, interrupts
from remoe_cli.artifacts import escaped
from remoe_cli.errors import ArtifactError, DeployError, InvokeError, ModelError, RemoeError, UsageError
from remoe_cli.model.chat import Prompt
from remoe_cli.runtime import peers
from remoe_cli.runtime.failures import failure, kind_of
from remoe_cli.runtime.invoke import Report, log_of, read_report
from remoe_cli.runtime.kept import Book, Ended
from remoe_cli.runtime.observed import Observed
from remoe_cli.runtime.receipt import Receipt, attach, receipt_of, unpriced_receipt, with_report
from remoe_cli.runtime.sampling import GREEDY, Sampling

# Errors keep their kind across the wire, so that the exit code is the same as in one process.
_KINDS: dict[str, type[RemoeError]] = {
    kind.__name__.removesuffix("Error"): kind for kind in (UsageError, ModelError, ArtifactError, InvokeError, DeployError)
}

# AWS does not say how it refuses a request to a function that scales to zero while it wakes: these are Lambda's codes that pass.
_WAKING = ("TooManyRequestsException", "ResourceNotReadyException", "ResourceConflictException", "ServiceException", "ServiceUnavailable")


@dataclass(frozen=True)
class Http:
    """A main server at `url` (runtime/server.py); with `own_user` it has to be a process of this user."""

    url: str
    own_user: bool = False


@dataclass(frozen=True)
class LambdaMain:
    """A main function on Lambda. `client` is a Lambda client whose timeout is longer than any answer.

    One that `scales_to_zero` runs on an instance of its own. Lambda refuses to give the end of its log, and it may have to be woken.
    Receipts are kept in `book`.
    """

    function: str
    client: Any
    scales_to_zero: bool = False
    book: Book | None = None


@dataclass(frozen=True)
class SageMaker:
    """A SageMaker endpoint. `client` is a client of sagemaker-runtime. Receipts are kept in `book`."""

    endpoint: str
    client: Any
    book: Book | None = None


_log = logging.getLogger(__name__)  # without a handler, its lines go to stderr

MainAddress = Http | LambdaMain | SageMaker


def answer(
    endpoint: MainAddress,
    prompt: Prompt,
    max_new_tokens: int,
    on_text: Callable[[str], None],
    *,
    sampling: Sampling = GREEDY,
    calls: bool = False,
) -> dict[str, Any]:
    """Ask one prompt; call `on_text` with each piece of text; return the answer document.

    `sampling` says how its tokens are chosen. With `calls` the document has the times of every invocation. The receipt is kept here,
    unless a main server keeps it itself.

    Raises: UsageError for a request that is refused, InvokeError when an expert function fails, DeployError when the main function is not
    reached or ends before the answer is complete. The error carries the receipt of what was billed (receipt.receipt_of).
    """
    asked = {"prompt": prompt} if isinstance(prompt, str) else prompt.to_json()
    request = asked | sampling.model_dump(mode="json", exclude_defaults=True)
    request |= {"max_new_tokens": max_new_tokens, "stream": True, "calls": calls}
    book = None if isinstance(endpoint, Http) else endpoint.book
    if book is not None:
        request["observed"] = True
    try:
        document = _answered(endpoint, request, on_text)
    except RemoeError as error:
        if book is not None and (receipt := receipt_of(error)) is not None:
            book.keep(Ended("failed", receipt))
        raise
    observed = document.pop("observed", None)
    if book is not None:
        _keep(book, endpoint, document["receipt"], observed)
    return document


def _keep(book: Book, endpoint: MainAddress, receipt_document: dict[str, Any], observed_document: object) -> None:
    """Keep what an answer's document says.

    What cannot be read is not kept, and the answer is not lost for it: a warning says so.
    """
    try:
        receipt, observed = Receipt.model_validate(receipt_document), None
    except ValidationError:
        _log.warning("%s sent a receipt of another version of remoe, which is not kept: deploy the plan again.", _named(endpoint))
        return
    try:
        observed = Observed.model_validate(observed_document) if observed_document else None
    except ValidationError:
        _log.warning("%s sent observations of another version of remoe, which are not kept: deploy the plan again.", _named(endpoint))
    book.keep(Ended("answered", receipt, observed=observed))


def _answered(endpoint: MainAddress, request: dict[str, Any], on_text: Callable[[str], None]) -> dict[str, Any]:
    document: dict[str, Any] | None = None
    for event in _events(endpoint, request):
        interrupts.check()
        match event:
            case {"error": {"kind": str(), "message": str(message), "hint": str()} as error} if message.strip():
                raise _error(error)
            case {"answer": {"receipt": {"prompt_tokens": int(), "generated_tokens": int()}} as document}:
                break
            case {"text": str(text)}:
                on_text(text)
            case _:
                raise _gone(endpoint, "it sent what is neither text, answer nor error")
    if document is None:
        raise _gone(endpoint, "it closed the stream without an answer")
    return document


def _error(document: dict[str, Any]) -> RemoeError:
    """Make the error that a main function describes, with its receipt if it has one."""
    message, hint = (escaped(document[name], 1000) for name in ("message", "hint"))
    error = _KINDS.get(document["kind"], RemoeError)(message, hint)
    if document.get("receipt"):
        with suppress(ValidationError):  # of another version of remoe
            attach(error, Receipt.model_validate(document["receipt"]))
    return error


def _events(endpoint: MainAddress, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the main function sends: {"text": ..} for each piece, then {"answer"} or {"error"}."""
    match endpoint:
        case Http(url):
            yield from _http(endpoint, url, request)
        case LambdaMain(scales_to_zero=True):
            yield from _lambda(endpoint, request | {"stream": False})
        case LambdaMain():
            yield from _lambda_stream(endpoint, request)
        case SageMaker(name, client):
            yield from _sagemaker(endpoint, name, client, request)


def _http(endpoint: Http, url: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if endpoint.own_user:
        address = httpx.URL(url)
        peers.require_own_listener(address.host, address.port or 80)
    try:
        with (
            # The server lets no answer take longer than it may: one that was given up here would be paid for and lost.
            httpx.Client(timeout=httpx.Timeout(10, read=None), trust_env=False) as client,
            client.stream("POST", f"{url}/invocations", json=request) as response,
        ):
            yield from map(_event, _lines(response.iter_bytes()))  # not iter_lines: it also ends lines inside a JSON string
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise _gone(endpoint, f"{type(error).__name__}: {error}") from None


def _lambda(endpoint: LambdaMain, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = endpoint.client.invoke(FunctionName=endpoint.function, Payload=json.dumps(request).encode())
        document = _event(bounded.read_stream(response["Payload"], bounded.RESPONSE))
    except (ClientError, BotoCoreError, OSError, ValueError) as error:
        if (kind := kind_of(error)) in _WAKING:
            message = f"{_named(endpoint)} is being woken or is busy, or AWS has no such instance now ({kind})."
            raise DeployError(message, "Waking takes minutes: ask again then; 'remoe status NAME' tells its state.") from None
        raise _refused(endpoint, error) from None
    if "FunctionError" in response:
        raise _failed(endpoint, document, None, 0.0)
    if "error" not in document:
        yield {"text": document["text"]}
    yield document if "error" in document else {"answer": document}


def _lambda_stream(endpoint: LambdaMain, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    begun_s, completed = time.perf_counter(), dict[str, Any]()
    last: dict[str, Any] | None = None
    try:
        response = endpoint.client.invoke_with_response_stream(
            FunctionName=endpoint.function, Payload=json.dumps(request).encode(), LogType="Tail"
        )
        with closing(response["EventStream"]) as stream:
            for event in map(_event, _lines(_payloads(stream, completed))):
                if "text" in event and "receipt" not in event:
                    yield event
                else:
                    last = event  # an answer, or an error as a line of a stream or as a whole document
        ended = _event(completed["ErrorDetails"].encode()) if "ErrorCode" in completed else None
    except (ClientError, BotoCoreError, OSError, ValueError) as error:
        raise _refused(endpoint, error) from None
    report, took_s = read_report(log_of(completed)), time.perf_counter() - begun_s
    if ended is not None:
        raise _failed(endpoint, ended, report, took_s)
    # What the function is billed is known only here, when it has ended.
    if last is not None and report is not None and isinstance(of := last.get("answer", last.get("error")), dict):
        made = of.get("receipt")
        with suppress(ValidationError):  # of another version of remoe: it stays as it came, and is not kept
            billed = with_report(Receipt.model_validate(made), report) if made else unpriced_receipt(report, took_s)
            of["receipt"] = billed.model_dump(mode="json")
    if last is not None:
        yield last


def _payloads(stream: Iterable[dict[str, Any]], completed: dict[str, Any]) -> Iterator[bytes]:
    """Yield the parts of a response; `completed` then has how it ended. Raises ValueError where it has no end."""
    for event in stream:
        match event:
            case {"PayloadChunk": {"Payload": bytes(part)}}:
                yield part
            case {"InvokeComplete": dict(end)}:
                completed |= end | {"ended": True}
    if not completed:
        raise ValueError("the stream has no end")


def _failed(endpoint: LambdaMain, document: dict[str, Any], report: Report | None, took_s: float) -> InvokeError:
    """Make the error of a function that has failed, with what it was billed."""
    kind, message = document.get("errorType", "Unknown"), document.get("errorMessage", "no message")
    known = failure(kind)
    failed = InvokeError(f"{_named(endpoint)} {known.meaning or 'failed'} ({kind}: {message}).", known.hint)
    if report is not None:
        attach(failed, unpriced_receipt(report, took_s))
    return failed


def _sagemaker(endpoint: SageMaker, name: str, client: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = client.invoke_endpoint_with_response_stream(
            EndpointName=name, ContentType="application/json", Body=json.dumps(request).encode()
        )
        with closing(response["Body"]) as stream:
            yield from map(_event, _lines(part["PayloadPart"]["Bytes"] for part in stream))
    except ClientError as error:
        if (document := _error_document(error)) is None:
            raise _refused(endpoint, error) from None
        yield document
    except (BotoCoreError, OSError, ValueError) as error:
        raise _refused(endpoint, error) from None


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Split a stream that comes in parts of any length into lines that are not empty.

    Raises: LimitError for a line that is too long.
    """
    pieces: list[bytes] = []
    length = 0
    for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            if line := b"".join([*pieces, end]):
                yield line
            pieces, length = [], 0
        pieces.append(rest)
        length += len(rest)
        bounded.check_bytes(length, bounded.RESPONSE)
    if line := b"".join(pieces):
        yield line


def _event(line: bytes) -> dict[str, Any]:
    """Decode what a main function sends; raises ValueError for what is no JSON object."""
    event = bounded.parse_json(line, bounded.RESPONSE)
    if not isinstance(event, dict):
        raise ValueError("it sent JSON that is no object")
    return event


def _error_document(error: Any) -> dict[str, Any] | None:
    """Read the container's error document out of SageMaker's error."""
    try:
        document = json.loads(error.response["OriginalMessage"])
        return document if "error" in document else None
    except (KeyError, TypeError, ValueError):
        return None


def _refused(endpoint: MainAddress, error: Exception) -> RemoeError:
    known = failure(kind_of(error))
    if known.meaning:
        return DeployError(f"{_named(endpoint)} {known.meaning}.", known.hint)
    return _gone(endpoint, f"{known.kind}: {error}")


def _named(endpoint: MainAddress) -> str:
    match endpoint:
        case Http(url):
            return f"The main server at {url}"
        case LambdaMain(function):
            return f"The main function {function}"
        case SageMaker(name):
            return f"The SageMaker endpoint {name}"


def _gone(endpoint: MainAddress, how: str) -> DeployError:
    return DeployError(
        f"{_named(endpoint)} ended before the answer was complete ({how}).",
        "It may be starting again: repeat the command, or see 'remoe status NAME' and 'remoe logs NAME'.",
    )
