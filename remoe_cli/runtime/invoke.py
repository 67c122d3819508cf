"""Invoke one expert function through Lambda's Invoke API, on AWS and on the local twin alike.

boto3's own retries are off. A retry costs time and money, so remoe decides it (failures.py), and the receipt counts it: whatever was
billed for a call is in its Invocation, also where the call failed in the end (FailedCall). Calls of a request go through calls.py, which
makes tries of this module; `invoke` is for calls outside a request.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from remoe_cli import bounded
from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import FrameError, from_wire, to_wire
from remoe_cli.runtime.failures import NOT_LAMBDA, failure, kind_of, pause_s
from remoe_cli.runtime.own_user import only_own_user
from remoe_cli.runtime.twin_client import twin_client

# The line that Lambda appends to every invocation's log, here and there.
_REPORT = re.compile(
    r"Duration: (?P<duration>[\d.]+) ms\tBilled Duration: (?P<billed>\d+) ms\tMemory Size: (?P<memory>\d+) MB"
    r"(?:.*Init Duration: (?P<init>[\d.]+) ms)?"
)
# What an expert function logs when it has read from S3 (function/handler.py).
_READS = re.compile(r"^remoe: (\d+) reads of S3$", re.MULTILINE)
# Failures after which nobody knows whether the function ran, where no head of an answer with the REPORT line has come.
_UNREPORTED = {"ConnectionClosedError", "ProtocolError", "ResponseStreamingError", "IncompleteReadError", "ReadTimeoutError"}

_LONGEST_ASKED_S = 60.0
_HEALTH, _END = b'{"health": true}', b'{"end": true}'
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
    unreported      tries without a REPORT line, as the head of the answer was lost: nobody knows whether they were billed
    reads           of S3, in all tries
    failed          the call has no answer of the function
    compute_s       what computing the experts took, as the answer says
    hedges          second calls of the same rows, made because the first took long
    fallbacks       1 where the main function computed the rows itself, as the function did not
    late            a try of a call that had its answer before: it is billed, and tells nothing about calls
    experts, rows   that it was sent
    starts_ahead    1 for a call that only starts an instance (start_ahead.py)
    after_start     the first call of an instance that was started ahead: it makes experts ready, and may have waited
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
    hedges: int = 0
    fallbacks: int = 0
    late: bool = False
    experts: int = 0
    rows: int = 0
    starts_ahead: int = 0
    after_start: bool = False

    @property
    def plain(self) -> bool:
        """Tell whether it was one try of a warm instance, as calls usually are."""
        odd = self.retries or self.hedges or self.fallbacks or self.late or self.starts_ahead or self.after_start
        return self.init_ms is None and not odd

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


class _BilledFailure(Exception):
    """A failure of a try whose log has come: of the function, or of reading its answer."""

    def __init__(self, kind: str, message: str, log: str) -> None:
        super().__init__(message)
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
        # A session of its own, not boto3's only one: a client that is made later has credentials that were read again.
        return boto3.Session(region_name=os.environ.get("AWS_REGION")).client("lambda", config=config)
    return only_own_user(twin_client(endpoint, config))


def make_caller(endpoint: str | None, connections: int, timeout_s: float, session: Any = None) -> Any:
    """Make what calls expert functions while serving: a client with less work for each call.

    It does what the client of `make_client` does (direct.py).
    """
    from remoe_cli.runtime.direct import direct, direct_to_twin

    if session is None and endpoint is not None:
        return direct_to_twin(endpoint, timeout_s)
    import boto3

    session = session or boto3.Session(region_name=os.environ.get("AWS_REGION"))
    return direct(make_client(None, connections, timeout_s, session), session, timeout_s)


@dataclass(frozen=True)
class Attempt:
    """One try of a call. Without an `answer` it failed, and `kind` is the row of failures.py.

    report         what Lambda billed; None where nothing was, or nobody knows
    elapsed_s      as the caller measured it
    retry_after_s  what a refusal asks to wait
    """

    answer: bytes | None
    report: Report | None
    elapsed_s: float
    kind: str = ""
    message: str = ""
    retry_after_s: float = 0.0

    @property
    def unreported(self) -> bool:
        return self.report is None and self.kind in _UNREPORTED


def attempt(client: Any, function: str, body: bytes) -> Attempt:
    """Invoke a function once. Whatever fails is in the result, so that what was billed is never lost."""
    start = time.perf_counter()
    try:
        answer, log = _call(client, function, body)
    except Exception as error:
        kind = error.kind if isinstance(error, _BilledFailure) else kind_of(error)
        report = read_report(error.log) if isinstance(error, _BilledFailure) else None
        return Attempt(None, report, time.perf_counter() - start, kind, str(error), _retry_after_s(error))
    elapsed_s, report = time.perf_counter() - start, read_report(log)
    if report is None:
        return Attempt(None, None, elapsed_s, NOT_LAMBDA, "it answered without Lambda's REPORT line")
    return Attempt(answer, report, elapsed_s)


def end_instance(client: Any, function: str) -> Attempt:
    """End the process of one instance of a function, which then starts anew.

    That it has ended is the failure of this try.
    """
    return attempt(client, function, _END)


def start_instance(client: Any, function: str, experts: Sequence[int]) -> Invocation:
    """Start an instance of a function ahead of its calls, if none is idle, and let it read some experts.

    A failure is in the result: the calls deal with it.
    """
    body = _health_event(experts)
    made = attempt(client, function, body)
    return replace(together(function, body, [made], made.elapsed_s), starts_ahead=1)


def only_reads(function: str, reads: int) -> Invocation:
    """Make what bills reads of S3 that no invocation made."""
    return replace(together(function, b"", (), 0.0, retries=0), reads=reads, late=True)


def _health_event(experts: Sequence[int]) -> bytes:
    return json.dumps({"health": True, "bring": list(experts)}).encode() if experts else _HEALTH


def together(function: str, body: bytes, attempts: Sequence[Attempt], elapsed_s: float, retries: int | None = None) -> Invocation:
    """Add up the tries of one call, of which the last one may have its answer.

    `retries`: how many of them are, where not all others.
    """
    reports = [each.report for each in attempts if each.report]
    last = reports[-1] if reports else Report(0.0, 0, 0, None)
    answer = attempts[-1].answer if attempts else None
    return Invocation(
        function=function,
        request_bytes=len(body),
        response_bytes=len(answer or b""),
        elapsed_s=elapsed_s,
        duration_ms=last.duration_ms,
        billed_ms=sum(report.billed_ms for report in reports),
        billed_tries=len(reports),
        memory_mb=last.memory_mb,
        init_ms=last.init_ms,
        retries=max(0, len(attempts) - 1) if retries is None else retries,
        cold_tries=sum(report.init_ms is not None for report in reports),
        unreported=sum(each.unreported for each in attempts),
        reads=sum(report.reads for report in reports),
        failed=answer is None,
    )


def failed_call(where: str, attempts: Sequence[Attempt], invocation: Invocation, why: str = "") -> FailedCall:
    """Make the error of a call whose tries have all failed.

    `where` names the function, `why` ends the sentence.
    """
    last = attempts[-1]
    tried = f" after {len(attempts)} tries" if len(attempts) > 1 else ""
    return FailedCall(f"The expert function {where} failed{tried}: {last.message}{why}", failure(last.kind).hint, invocation)


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


def ping(client: Any, function: str, experts: Sequence[int] = ()) -> Invocation:
    """Start an instance of the function if none is warm, and let it read some experts.

    Raises: what `invoke` raises.
    """
    return _try(client, function, _health_event(experts))[1]


def health(client: Any, function: str) -> dict[str, Any]:
    """Return what the function says about itself (function/handler.py). Raises: what `invoke` raises."""
    try:
        return dict(bounded.parse_json(_try(client, function, _HEALTH)[0]))
    except (ValueError, TypeError):
        raise InvokeError(f"The expert function {function} does not say what it is.", "Check that remoe deployed it.") from None


def _try(client: Any, function: str, body: bytes) -> tuple[bytes, Invocation]:
    """Call a function alone, outside a request, where only the number of retries limits them."""
    start = time.perf_counter()
    attempts: list[Attempt] = []
    while True:
        attempts.append(attempt(client, function, body))
        last = attempts[-1]
        if last.answer is not None:
            return last.answer, together(function, body, attempts, time.perf_counter() - start)
        wait_s = pause_s(last.kind, len(attempts) - 1, last.retry_after_s)
        if wait_s is None:
            raise failed_call(function, attempts, together(function, body, attempts, time.perf_counter() - start))
        time.sleep(wait_s)


def _retry_after_s(error: Exception) -> float:
    """Return the seconds of the header Retry-After; 0 without one, or where it is a date."""
    response = getattr(error, "response", None) or {}
    asked = str(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return min(float(asked), _LONGEST_ASKED_S) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", asked) else 0.0


def _call(client: Any, function: str, body: bytes) -> tuple[bytes, str]:
    response = client.invoke(FunctionName=function, InvocationType="RequestResponse", LogType="Tail", Payload=body)
    log = log_of(response)  # from the head, which is there before the answer
    try:
        payload = bounded.read_stream(response["Payload"], bounded.RESPONSE)
        error = dict(json.loads(payload or b"{}")) if "FunctionError" in response else None
    except Exception as failed:
        raise _BilledFailure(kind_of(failed), str(failed), log) from failed
    if error is not None:
        kind = error.get("errorType", "Unknown")
        raise _BilledFailure(kind, f"{kind}: {error.get('errorMessage', 'no message')}", log)
    return payload, log


def log_of(response: dict[str, Any]) -> str:
    """Return the end of an invocation's log, which a response has that was asked for it."""
    return base64.b64decode(response.get("LogResult", "")).decode("utf-8", "replace")
