"""One invocation: REPORT lines, retries, and what is raised when it fails."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire
from remoe_cli.runtime.failures import RETRIES
from remoe_cli.runtime.invoke import FailedCall, invoke, make_caller, make_client, ping
from tests.support.endpoint import Endpoint, Reply, failed, ok, refused, report

Make = Callable[[str, int, float], Any]


@pytest.fixture(params=[make_client, make_caller], ids=["botocore", "direct"])
def make(request: pytest.FixtureRequest) -> Make:
    """Both ways to make a client: whatever happens, callers see the same."""
    made: Make = request.param
    return made


@pytest.fixture
def endpoint(make: Make) -> Iterator[Endpoint]:
    with Endpoint(make) as made:
        yield made


FRAME = pack(Batch("float32", (1, 4), (1, 2), np.arange(12, dtype=np.float32).reshape(3, 4)))


@pytest.mark.parametrize("init", [None, 181.25])
def test_the_report_line_is_read_with_and_without_init(endpoint: Endpoint, init: float | None) -> None:
    endpoint.script = [ok(init)]
    answer, call = invoke(endpoint.client, "layer-001", FRAME)
    assert answer == FRAME
    assert (call.function, call.duration_ms, call.billed_ms, call.memory_mb, call.init_ms, call.retries) == (
        "layer-001",
        12.34,
        13,
        512,
        init,
        0,
    )
    assert call.request_bytes == call.response_bytes == len(to_wire(FRAME))
    assert 0 < call.elapsed_s < 5
    ((path, headers, body),) = endpoint.requests
    assert path == "/2015-03-31/functions/layer-001/invocations"
    named = {name.lower(): value for name, value in headers.items()}
    assert {named[name] for name in ("x-amz-invocation-type", "x-amz-log-type")} == {"RequestResponse", "Tail"}
    assert from_wire(body) == FRAME


@pytest.mark.parametrize(
    "failure",
    [
        failed("Runtime.ExitError"),
        failed("ShardUnreachableError"),
        refused(429, "TooManyRequestsException"),
        refused(500, "ServiceException"),
        Reply(hang_up=True),
        Reply(body=b'"', cut=True, headers=ok().headers),
    ],
    ids=["worker died", "S3", "throttled", "service", "connection closed", "answer cut"],
)
def test_what_can_differ_next_time_is_tried_again_and_counted(endpoint: Endpoint, failure: Reply) -> None:
    endpoint.script = [failure, failure, ok(99.0)]
    answer, call = invoke(endpoint.client, "f", FRAME)
    assert answer == FRAME
    assert call.retries == 2
    assert len(endpoint.requests) == 3
    assert len({body for _, _, body in endpoint.requests}) == 1


def test_a_try_that_failed_in_the_function_is_billed_and_a_throttled_one_is_not(endpoint: Endpoint) -> None:
    died = failed("Runtime.ExitError")
    died.headers["X-Amz-Log-Result"] = report(700.0, 701, 512, None).decode()
    endpoint.script = [died, refused(429, "TooManyRequestsException"), ok()]
    _, call = invoke(endpoint.client, "f", FRAME)
    assert (call.retries, call.billed_tries, call.billed_ms, call.unreported) == (2, 2, 714, 0)


def test_whatever_was_billed_for_a_call_that_failed_is_known(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that died cold, an answer that was lost on its way, and four that are throttled."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    died = failed("Runtime.ExitError")
    died.headers["X-Amz-Log-Result"] = report(700.0, 901, 512, 200.0).decode()
    endpoint.script = [died, Reply(hang_up=True), refused(429, "TooManyRequestsException")]
    with pytest.raises(FailedCall) as raised:
        invoke(endpoint.client, "f", FRAME)
    call = raised.value.invocation
    assert (call.failed, call.billed_ms, call.billed_tries, call.cold_tries, call.unreported, call.retries) == (True, 901, 1, 1, 1, RETRIES)
    assert raised.value.kind == "Invoke" and call.memory_mb == 512
    endpoint.script = [ok(body=b"null")]
    with pytest.raises(FailedCall, match="did not answer with a frame") as raised:
        invoke(endpoint.client, "f", FRAME)
    assert (raised.value.invocation.billed_ms, raised.value.invocation.billed_tries) == (13, 1)


def test_an_answer_that_is_cut_off_is_billed_as_its_head_says(endpoint: Endpoint) -> None:
    """Lambda's REPORT line comes before the answer, so it is known what the lost answer cost."""
    cut = Reply(body=b'"', cut=True, headers={"X-Amz-Log-Result": report(90.0, 91, 512, 180.0).decode()})
    endpoint.script = [cut, ok()]
    _, call = invoke(endpoint.client, "f", FRAME)
    assert (call.billed_ms, call.billed_tries, call.cold_tries, call.retries, call.unreported) == (104, 2, 1, 1, 0)
    no_document = Reply(headers={"X-Amz-Function-Error": "Unhandled", "X-Amz-Log-Result": cut.headers["X-Amz-Log-Result"]}, body=b"null")
    endpoint.script = [no_document]
    with pytest.raises(FailedCall) as raised:
        invoke(endpoint.client, "f", FRAME)
    assert (raised.value.invocation.billed_ms, raised.value.invocation.unreported) == (91, 0)


def test_reads_of_s3_are_counted_from_the_log_of_each_try(endpoint: Endpoint) -> None:
    died, answered = failed("ShardUnreachableError"), ok()
    for reply, reads in ((died, 3), (answered, 12)):
        line = base64.b64decode(report(10.0, 11, 512, None))
        reply.headers["X-Amz-Log-Result"] = base64.b64encode(f"remoe: {reads} reads of S3\n".encode() + line).decode()
    endpoint.script = [died, answered]
    _, call = invoke(endpoint.client, "f", FRAME)
    assert (call.reads, call.billed_tries, call.billed_ms) == (15, 2, 22)


@pytest.mark.parametrize("failure", [failed("Runtime.ExitError"), refused(429, "TooManyRequestsException")])
def test_retries_end(endpoint: Endpoint, failure: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    endpoint.script = [failure]
    with pytest.raises(InvokeError, match=f"function f failed after {RETRIES + 1} tries: "):
        invoke(endpoint.client, "f", FRAME)
    assert len(endpoint.requests) == RETRIES + 1


@pytest.mark.parametrize(
    "failure",
    [
        failed("Runtime.OutOfMemory"),
        failed("Sandbox.Timedout"),
        failed("FrameError"),
        refused(404, "ResourceNotFoundException"),
        refused(413, "RequestTooLargeException"),
        Reply(headers={"X-Amz-Function-Error": "Unhandled"}, body=b"not JSON"),
    ],
    ids=["memory", "timeout", "frame", "no function", "too large", "not JSON"],
)
def test_what_would_fail_again_is_not_tried_again(endpoint: Endpoint, failure: Reply) -> None:
    endpoint.script = [failure, ok()]
    with pytest.raises(InvokeError, match="The expert function f failed: ") as raised:
        invoke(endpoint.client, "f", FRAME)
    assert len(endpoint.requests) == 1
    assert "remoe logs" in raised.value.hint


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("ShardDigestError", "deploy the plan again"),
        ("ShardTruncatedError", "deploy the plan again"),
        ("ShardMissingError", "deploy the plan again"),
        ("ShardDeniedError", "role needs s3:GetObject"),
        ("FunctionMemoryError", "more memory"),
        ("FunctionStorageError", "ephemeral storage"),
    ],
)
def test_a_functions_own_error_is_final_and_says_what_mends_it(kind: str, hint: str, endpoint: Endpoint) -> None:
    endpoint.script = [failed(kind), ok()]
    with pytest.raises(InvokeError, match=f"The expert function f failed: {kind}: it was {kind}") as raised:
        invoke(endpoint.client, "f", FRAME)
    assert hint in raised.value.hint and len(endpoint.requests) == 1


@pytest.mark.parametrize("body", [b"null", b'"AAA"', b'"@@@@"', b""])
def test_an_answer_that_is_no_frame_is_an_invoke_error(endpoint: Endpoint, body: bytes) -> None:
    endpoint.script = [ok(body=body)]
    with pytest.raises(InvokeError, match="did not answer with a frame"):
        invoke(endpoint.client, "f", FRAME)


@pytest.mark.parametrize(("asked", "waited_s"), [("3", 3.0), ("0.25", 0.25), ("100000", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)])
def test_a_refusal_says_when_to_come_again(endpoint: Endpoint, asked: str, waited_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    throttled = refused(429, "TooManyRequestsException")
    throttled.headers["Retry-After"] = asked
    endpoint.script = [throttled, ok()]
    assert invoke(endpoint.client, "f", FRAME)[1].retries == 1
    assert waited_s <= waits[0] < waited_s + 0.2  # the rest is drawn


def test_an_answer_without_a_report_is_not_lambda(endpoint: Endpoint) -> None:
    endpoint.script = [Reply()]
    with pytest.raises(InvokeError, match="without Lambda's REPORT line"):
        ping(endpoint.client, "f")


def test_a_dead_endpoint_is_an_invoke_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, and nobody listens
        client = make(f"http://127.0.0.1:{held.getsockname()[1]}", 1, 5.0)
        with pytest.raises(InvokeError, match=f"The expert function f failed after {RETRIES + 1} tries: Could not connect"):
            invoke(client, "f", FRAME)
        client.close()


def test_a_function_that_does_not_answer_in_time_is_an_invoke_error(make: Make) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        client = make(f"http://127.0.0.1:{silent.getsockname()[1]}", 1, 0.2)
        with pytest.raises(InvokeError, match="Read timeout"):
            invoke(client, "f", FRAME)
        client.close()
