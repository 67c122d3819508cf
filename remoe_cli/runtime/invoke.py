"""Invoke one expert function through Lambda's Invoke API, on AWS and on the local twin alike.

boto3's own retries are off. A retry costs time and money, so this module decides it (failures.py), and the receipt counts it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remoe_cli import bounded
from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import FrameError, from_wire, to_wire
from remoe_cli.runtime.failures import RETRIES, failure, kind_of, pause_s

# The line that Lambda appends to every invocation's log, here and there.
_REPORT = re.compile(
    r"Duration: (?P<duration>[\d.]+) ms\tBilled Duration: (?P<billed>\d+) ms\tMemory Size: (?P<memory>\d+) MB"
    r"(?:.*Init Duration: (?P<init>[\d.]+) ms)?"
)

_HEALTH = b'{"health": true}'


@dataclass(frozen=True)
class Invocation:
    """One answered invocation. Its billing comes from Lambda's own REPORT lines.

    elapsed_s       the whole wait, as the caller measured it
    duration_ms     of the last try; init_ms too, None when the instance was warm
    billed_ms       of all tries, billed_tries of them: Lambda also bills tries that failed in the function
    compute_s       what computing the experts took, as the answer says
    """

    function: str
    request_bytes: int
    response_bytes: int
    elapsed_s: float
    duration_ms: float
    billed_ms: int
    billed_tries: int
    memory_mb: int
    init_ms: float | None
    retries: int
    compute_s: float = 0.0

    @property
    def sample(self) -> tuple[int, float, float, float]:
        """Return wire bytes both ways, and seconds waited, in the function, and computing.

        Profiles store it (profile/latency_record.py).
        """
        return self.request_bytes + self.response_bytes, self.elapsed_s, self.duration_ms / 1000, self.compute_s


class _FunctionFailed(Exception):
    def __init__(self, kind: str, message: str, log: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.log = kind, log


# (connections at once, timeout in s of one invocation) -> a Lambda client
Connect = Callable[[int, float], Any]


def make_client(endpoint: str | None, connections: int, timeout_s: float, session: Any = None) -> Any:
    """Make a Lambda client for the local twin at `endpoint`, or for AWS if that is None.

    On AWS it uses the credentials of `session`, else those of the environment. The twin needs no account: its credentials are placeholders.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=5,
        read_timeout=timeout_s,
        max_pool_connections=connections,
        tcp_keepalive=True,  # an answer of a main function may take minutes, in which nothing is sent
        # Payloads are built here and always valid; checking them costs as much as sending them.
        parameter_validation=False,
    )
    if session is not None:
        return session.client("lambda", config=config)
    if endpoint is None:
        return boto3.client("lambda", region_name=os.environ.get("AWS_REGION"), config=config)
    # The twin is on loopback: a proxy that the environment names must not come between.
    config = config.merge(Config(proxies={}))
    return boto3.client(
        "lambda", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="local", aws_secret_access_key="local", config=config
    )


def invoke(client: Any, function: str, frame: bytes) -> tuple[bytes, Invocation]:
    """Send a frame to a function and return the frame of its answer.

    Raises: InvokeError for a failure that is final, or when the retries are used up.
    """
    answer, invocation = _try(client, function, to_wire(frame))
    try:
        return from_wire(answer), invocation
    except FrameError as error:
        raise InvokeError(
            f"The expert function {function} did not answer with a frame: {error}.", "Check that remoe deployed it."
        ) from None


def ping(client: Any, function: str) -> Invocation:
    """Start an instance of the function if none is warm. Raises: what `invoke` raises."""
    return _try(client, function, _HEALTH)[1]


def health(client: Any, function: str) -> dict[str, Any]:
    """Return what the function says about itself (function/handler.py). Raises: what `invoke` raises."""
    try:
        return dict(bounded.parse_json(_try(client, function, _HEALTH)[0]))
    except (ValueError, TypeError):
        raise InvokeError(f"The expert function {function} does not say what it is.", "Check that remoe deployed it.") from None


def _try(client: Any, function: str, body: bytes) -> tuple[bytes, Invocation]:
    start = time.perf_counter()
    failed: list[int] = []  # billed ms of tries that failed in the function
    for attempt in range(RETRIES + 1):
        try:
            answer, log = _call(client, function, body)
        except Exception as error:
            kind = error.kind if isinstance(error, _FunctionFailed) else kind_of(error)
            if isinstance(error, _FunctionFailed) and (report := _REPORT.search(error.log)):
                failed.append(int(report["billed"]))
            wait = pause_s(kind, attempt)
            if wait is None:
                tried = f" after {attempt + 1} tries" if attempt else ""
                raise InvokeError(f"The expert function {function} failed{tried}: {error}", failure(kind).hint) from error
            time.sleep(wait)
            continue
        report = _REPORT.search(log)
        if report is None:
            raise InvokeError(
                f"The expert function {function} answered without Lambda's REPORT line.",
                "Check that it is Lambda or the local twin.",
            )
        init = report["init"]
        return answer, Invocation(
            function=function,
            request_bytes=len(body),
            response_bytes=len(answer),
            elapsed_s=time.perf_counter() - start,
            duration_ms=float(report["duration"]),
            billed_ms=int(report["billed"]) + sum(failed),
            billed_tries=1 + len(failed),
            memory_mb=int(report["memory"]),
            init_ms=None if init is None else float(init),
            retries=attempt,
        )
    raise AssertionError("unreachable: the last attempt either returns or raises")


def _call(client: Any, function: str, body: bytes) -> tuple[bytes, str]:
    response = client.invoke(FunctionName=function, InvocationType="RequestResponse", LogType="Tail", Payload=body)
    payload = bounded.read_stream(response["Payload"], bounded.RESPONSE)
    log = base64.b64decode(response.get("LogResult", "")).decode("utf-8", "replace")
    if "FunctionError" in response:
        error = json.loads(payload or b"{}")
        raise _FunctionFailed(error.get("errorType", "Unknown"), error.get("errorMessage", "no message"), log)
    return payload, log
