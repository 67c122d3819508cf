"""Talking to a main server that runs: one prompt in, streamed text and the answer document out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from remoe_cli.errors import DeployError, InvokeError, RemoeError, UsageError

# Errors keep their kind across the wire, so that the exit code is the same as in one process.
_KINDS: dict[str, type[RemoeError]] = {kind.__name__.removesuffix("Error"): kind for kind in (UsageError, InvokeError, DeployError)}


def answer(
    name: str, port: int, prompt: str, max_new_tokens: int, on_text: Callable[[str], None], *, calls: bool = False
) -> dict[str, Any]:
    """The answer document for one prompt, with the times of its invocations if `calls`.

    Raises DeployError when the server is gone or ends in mid-answer."""
    request = {"prompt": prompt, "max_new_tokens": max_new_tokens, "stream": True, "calls": calls}
    timeout = httpx.Timeout(10, read=600)
    try:
        with (
            httpx.Client(timeout=timeout, trust_env=False) as client,
            client.stream("POST", f"http://127.0.0.1:{port}/invocations", json=request) as response,
        ):
            if response.status_code != 200:
                raise UsageError(f"The main server refused the request: {response.read().decode()}", "Check the options.")
            for line in response.iter_lines():
                event = json.loads(line)
                if "answer" in event:
                    return dict(event["answer"])
                if "error" in event:
                    error = event["error"]
                    raise _KINDS.get(error["kind"], RemoeError)(error["message"], error["hint"])
                on_text(event["text"])
    except httpx.HTTPError as error:
        raise _gone(name, f"{type(error).__name__}: {error}") from None
    raise _gone(name, "it closed the stream without an answer")


def _gone(name: str, how: str) -> DeployError:
    return DeployError(
        f"The main server of '{name}' ended before the answer was complete ({how}).",
        f"The supervisor starts it again: repeat the command, or see 'remoe status {name}' and 'remoe logs {name} --function main'.",
    )
