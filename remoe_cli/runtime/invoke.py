"""Invoke one expert function through Lambda's Invoke API, on AWS and on the local twin alike.

boto3's own retries are off. A retry costs time and money, so this module decides it (failures.py), and the receipt counts it: whatever was
billed for a call is in its Invocation, also where the call failed in the end (FailedCall).
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
from remoe_cli.runtime.own_user import only_own_user
from remoe_cli.runtime.twin_client import twin_client

# The line that Lambda appends to every invocation's log, here and there.
_REPORT = re.compile(
    r"Duration: (?P<duration>[\d.]+) ms\tBilled Duration: (?P<billed>\d+) ms\tMemory Size: (?P<memory>\d+) MB"
    r"(?:.*Init Duration: (?P<init>[\d.]+) ms)?"
)
# What an expert function logs when it has read from S3 (function/handler.py).
_READS = re.compile(r"^remoe: (\d+) reads of S3$", re.MULTILINE)
# Failures after which nobody knows whether the function ran: its answer, with the REPORT line, is lost.
_UNREPORTED = {"ConnectionClosedError", "ProtocolError", "ResponseStreamingError", "IncompleteReadError", "ReadTimeoutError"}

_HEALTH = b'{"health": true}'
# What a call took: payload bytes on the wire both ways, and seconds waited, in the function, and computing.
Sample = tuple[int, float, float, float]


@dataclass(frozen=True)
class Report:
    """What Lambda's REPORT line says of one try. `init_ms` is None when the instance was warm."""

    duration_ms: float
    billed_ms: int
    memory_mb: int
    init_ms: float | None
    reads: int = 0


def read_report(log: str) -> Report | None:
    """Read the REPORT line at the end of an invocation's log; None without one.

    The log also says how often the function read from S3.
    """
    if (found := _REPORT.search(log)) is None:
        return None
    init = found["init"]
    reads = sum(int(count) for count in _READS.findall(log))
    return Report(float(found["duration"]), int(found["billed"]), int(found["memory"]), None if init is None else float(init), reads)


@dataclass(frozen=True)
class Invocation:
    """One call of a function with all its tries. Its billing comes from Lambda's own REPORT lines.

    elapsed_s       the whole wait, as the caller measured it
    duration_ms     of the last try; init_ms too, None when the instance was warm
    billed_ms       of all tries, billed_tries of them: Lambda also bills tries that failed in the function
    cold_tries      tries that started an instance
    unreported      tries whose answer was lost, so that nobody knows whether they were billed
    reads           of S3, in all tries
    failed          the call has no answer
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
    cold_tries: int = 0
    unreported: int = 0
    reads: int = 0
    failed: bool = False
    compute_s: float = 0.0

    @property
    def sample(self) -> Sample:
        """Return what profiles store of a call (profile/latency_record.py)."""
        return self.request_bytes + self.response_bytes, self.elapsed_s, self.duration_ms / 1000, self.compute_s


class FailedCall(InvokeError):
    """A call of an expert function failed; `invocation` is what was billed for it."""

    def __init__(self, message: str, hint: str, invocation: Invocation) -> None:
        super().__init__(message, hint)
        self.invocation = invocation

    @property
    def kind(self) -> str:
        return "Invoke"


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
    return only_own_user(twin_client(endpoint, config))


def invoke(client: Any, function: str, frame: bytes) -> tuple[bytes, Invocation]:
    """Send a frame to a function and return the frame of its answer.

    Raises: FailedCall for a failure that is final, or when the retries are used up.
    """
    answer, invocation = _try(client, function, to_wire(frame))
    try:
        return from_wire(answer), invocation
    except FrameError as error:
        raise FailedCall(
            f"The expert function {function} did not answer with a frame: {error}.", "Check that remoe deployed it.", invocation
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
    reports: list[Report] = []
    unreported = 0

    def invocation(answer: bytes, attempt: int, failed: bool = False) -> Invocation:
        last = reports[-1] if reports else Report(0.0, 0, 0, None)
        return Invocation(
            function=function,
            request_bytes=len(body),
            response_bytes=len(answer),
            elapsed_s=time.perf_counter() - start,
            duration_ms=last.duration_ms,
            billed_ms=sum(report.billed_ms for report in reports),
            billed_tries=len(reports),
            memory_mb=last.memory_mb,
            init_ms=last.init_ms,
            retries=attempt,
            cold_tries=sum(report.init_ms is not None for report in reports),
            unreported=unreported,
            reads=sum(report.reads for report in reports),
            failed=failed,
        )

    for attempt in range(RETRIES + 1):
        try:
            answer, log = _call(client, function, body)
        except Exception as error:
            kind = error.kind if isinstance(error, _FunctionFailed) else kind_of(error)
            if isinstance(error, _FunctionFailed) and (report := read_report(error.log)):
                reports.append(report)
            unreported += kind in _UNREPORTED
            wait = pause_s(kind, attempt)
            if wait is None:
                tried = f" after {attempt + 1} tries" if attempt else ""
                message = f"The expert function {function} failed{tried}: {error}"
                raise FailedCall(message, failure(kind).hint, invocation(b"", attempt, failed=True)) from error
            time.sleep(wait)
            continue
        report = read_report(log)
        if report is None:
            raise FailedCall(
                f"The expert function {function} answered without Lambda's REPORT line.",
                "Check that it is Lambda or the local twin.",
                invocation(answer, attempt, failed=True),
            )
        reports.append(report)
        return answer, invocation(answer, attempt)
    raise AssertionError("unreachable: the last attempt either returns or raises")


def _call(client: Any, function: str, body: bytes) -> tuple[bytes, str]:
    response = client.invoke(FunctionName=function, InvocationType="RequestResponse", LogType="Tail", Payload=body)
    payload, log = bounded.read_stream(response["Payload"], bounded.RESPONSE), log_of(response)
    if "FunctionError" in response:
        error = json.loads(payload or b"{}")
        raise _FunctionFailed(error.get("errorType", "Unknown"), error.get("errorMessage", "no message"), log)
    return payload, log


def log_of(response: dict[str, Any]) -> str:
    """Return the end of an invocation's log, which a response has that was asked for it."""
    return base64.b64decode(response.get("LogResult", "")).decode("utf-8", "replace")
