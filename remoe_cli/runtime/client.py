"""Asking a main function that runs: one prompt in, text as it comes and the answer document out, wherever the function is.

Http        a server of ours, streamed
LambdaMain  a Lambda function, on AWS or on the local twin: the text comes at once, as Lambda's Python runtime does not stream
SageMaker   an endpoint of AWS, streamed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from remoe_cli.errors import ArtifactError, DeployError, InvokeError, ModelError, RemoeError, UsageError
from remoe_cli.model.chat import Prompt

if TYPE_CHECKING:
    from remoe_cli.runtime.prediction import Predict

# Errors keep their kind across the wire, so that the exit code is the same as in one process.
_KINDS: dict[str, type[RemoeError]] = {
    kind.__name__.removesuffix("Error"): kind for kind in (UsageError, ModelError, ArtifactError, InvokeError, DeployError)
}
_LOGS = "See 'remoe status NAME' and 'remoe logs NAME'."
# By the name of Lambda's, SageMaker's or botocore's error: what it means, and what to do.
_REFUSALS: dict[str, tuple[str, str]] = {
    "TooManyRequestsException": ("is busy: it answers one request at a time", "Ask again later."),
    "ThrottlingException": ("is throttled", "Ask again later."),
    "ServiceUnavailable": ("is not available now", "Ask again later."),
    "ModelNotReadyException": ("is still loading its model", "Ask again in a few minutes."),
    "ResourceNotFoundException": ("does not exist", "See 'remoe status', and deploy again."),
    "ValidationError": ("does not exist or is not yet in service", _LOGS),
    "AccessDeniedException": ("may not be called with these credentials", "Use those of the account that deployed it."),
    "ExpiredTokenException": ("may not be called: the credentials have expired", "Sign in again."),
    "ExpiredToken": ("may not be called: the credentials have expired", "Sign in again."),
    "UnrecognizedClientException": ("may not be called: the credentials are not valid", "Check the AWS profile."),
    "NoCredentialsError": ("may not be called: there are no AWS credentials", "Sign in, or set AWS_PROFILE."),
    "RequestTooLargeException": ("refused the request as too large", "Shorten the prompt."),
    "Sandbox.Timedout": ("ran out of time", "Ask for fewer tokens."),
    "Runtime.OutOfMemory": ("ran out of memory", "Plan with a larger main function and deploy again."),
}


@dataclass(frozen=True)
class Http:
    """`url` is that of a server that runtime/server.py serves."""

    url: str


@dataclass(frozen=True)
class LambdaMain:
    """`client` is a Lambda client that waits as long as an answer may take."""

    function: str
    client: Any


@dataclass(frozen=True)
class SageMaker:
    """`client` is a client of sagemaker-runtime."""

    endpoint: str
    client: Any


Endpoint = Http | LambdaMain | SageMaker


def answer(
    endpoint: Endpoint,
    prompt: Prompt,
    max_new_tokens: int,
    on_text: Callable[[str], None],
    *,
    calls: bool = False,
    predict: Predict | None = None,
) -> dict[str, Any]:
    """The answer document for one prompt, with the times of its invocations if `calls`, and in its receipt what `predict` says.

    Raises UsageError for a request that is refused, InvokeError when an expert function fails, DeployError when the main function cannot
    be reached or ends in mid-answer.
    """
    asked = {"prompt": prompt} if isinstance(prompt, str) else prompt.to_json()
    request = asked | {"max_new_tokens": max_new_tokens, "stream": True, "calls": calls}
    document: dict[str, Any] | None = None
    for event in _events(endpoint, request):
        if "error" in event:
            error = event["error"]
            raise _KINDS.get(error["kind"], RemoeError)(error["message"], error["hint"])
        if "answer" in event:
            document = dict(event["answer"])
            break
        on_text(event["text"])
    if document is None:
        raise _gone(endpoint, "it closed the stream without an answer")
    if predict is not None:
        receipt = document["receipt"]
        receipt["predicted"] = predict(receipt["prompt_tokens"], receipt["generated_tokens"] - 1).model_dump(mode="json")
    return document


def _events(endpoint: Endpoint, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the main function says: {"text": ..} for each piece, then {"answer": ..} or {"error": ..}."""
    match endpoint:
        case Http(url):
            yield from _http(endpoint, url, request)
        case LambdaMain(function, client):
            yield from _lambda(endpoint, function, client, request | {"stream": False})
        case SageMaker(name, client):
            yield from _sagemaker(endpoint, name, client, request)


def _http(endpoint: Http, url: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(10, read=600), trust_env=False) as client,
            client.stream("POST", f"{url}/invocations", json=request) as response,
        ):
            yield from map(json.loads, response.iter_lines())
    except (httpx.HTTPError, ValueError) as error:
        raise _gone(endpoint, f"{type(error).__name__}: {error}") from None


def _lambda(endpoint: LambdaMain, function: str, client: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = client.invoke(FunctionName=function, Payload=json.dumps(request).encode())
        document = json.loads(response["Payload"].read())
    except (ClientError, BotoCoreError, ValueError) as error:
        raise _refused(endpoint, error) from None
    if "FunctionError" in response:
        kind, message = document.get("errorType", "Unknown"), document.get("errorMessage", "no message")
        what, hint = _REFUSALS.get(kind, ("failed", _LOGS))
        raise InvokeError(f"{_named(endpoint)} {what} ({kind}: {message}).", hint)
    if "error" not in document:
        yield {"text": document["text"]}
    yield document if "error" in document else {"answer": document}


def _sagemaker(endpoint: SageMaker, name: str, client: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = client.invoke_endpoint_with_response_stream(
            EndpointName=name, ContentType="application/json", Body=json.dumps(request).encode()
        )
        with closing(response["Body"]) as stream:
            yield from map(json.loads, _lines(part["PayloadPart"]["Bytes"] for part in stream))
    except ClientError as error:
        if (said := _said(error)) is None:
            raise _refused(endpoint, error) from None
        yield said
    except (BotoCoreError, ValueError) as error:
        raise _refused(endpoint, error) from None


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream that comes in parts of any length."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def _said(error: Any) -> dict[str, Any] | None:
    """The error document that the container answered with, which SageMaker passes on inside its own error."""
    try:
        document = json.loads(error.response["OriginalMessage"])
        return document if "error" in document else None
    except (KeyError, TypeError, ValueError):
        return None


def _refused(endpoint: Endpoint, error: Exception) -> RemoeError:
    response: dict[str, Any] = getattr(error, "response", None) or {}  # of some connection errors it is None
    kind = response.get("Error", {}).get("Code") or type(error).__name__
    if kind not in _REFUSALS:
        return _gone(endpoint, f"{kind}: {error}")
    what, hint = _REFUSALS[kind]
    return DeployError(f"{_named(endpoint)} {what}.", hint)


def _named(endpoint: Endpoint) -> str:
    match endpoint:
        case Http(url):
            return f"The main server at {url}"
        case LambdaMain(function):
            return f"The main function {function}"
        case SageMaker(name):
            return f"The SageMaker endpoint {name}"


def _gone(endpoint: Endpoint, how: str) -> DeployError:
    return DeployError(
        f"{_named(endpoint)} ended before the answer was complete ({how}).",
        "It may be starting again: repeat the command, or see 'remoe status NAME' and 'remoe logs NAME'.",
    )
