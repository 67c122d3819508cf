"""The table of failures: which are tried again and after what pause, and that every kind says what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import urllib3.exceptions
from botocore import exceptions as botocore_exceptions

from remoe_cli.function import errors
from remoe_cli.function.codec import Batch, pack
from remoe_cli.runtime.failures import FAILURES, RETRIES, failure, kind_of, pause_s
from remoe_cli.runtime.invoke import invoke
from tests.support.endpoint import Endpoint, Reply, failed, ok, refused

FRAME = pack(Batch("float32", (1,), (1,), np.zeros((1, 4), np.float32)))
# Bounds of the seconds before the first retry of an expert function.
# Whoever changes a pause in remoe_cli/runtime/failures.py changes it here too.
FIRST_PAUSES_S = {
    "Runtime.ExitError": 0.0,
    "ServiceException": 0.05,
    "EndpointConnectionError": 0.1,
    "ConnectTimeoutError": 0.1,
    "ConnectionClosedError": 0.02,
    "ProtocolError": 0.02,
    "ResponseStreamingError": 0.02,
    "IncompleteReadError": 0.02,
    "DamagedAnswer": 0.02,
    "TooManyRequestsException": 0.2,
    "ShardUnreachableError": 0.2,
}


def test_the_pause_before_each_retry() -> None:
    assert {row.kind: row.pause_s for row in FAILURES if row.pause_s is not None} == FIRST_PAUSES_S


def test_a_processor_that_lacks_something_is_not_planned_for_again() -> None:
    """MXFP4 experts are always packed: another plan changes nothing."""
    hint = failure("FunctionProcessorError").hint
    assert "AVX2, FMA and F16C, or arm64" in hint and "plan again" not in hint


@pytest.mark.parametrize(("kind", "first_s"), FIRST_PAUSES_S.items())
def test_pauses_are_drawn_up_to_a_bound_that_doubles_and_end(kind: str, first_s: float) -> None:
    assert RETRIES == 4
    for share in (0.0, 0.25, 1.0):
        pauses = [pause_s(kind, attempt, draw=lambda: share) for attempt in range(5)]  # noqa: B023
        assert pauses == [share * first_s, share * 2 * first_s, share * 4 * first_s, share * 8 * first_s, None]
    assert len({pause_s(kind, 3) for _ in range(9)}) == (9 if first_s else 1)  # callers who failed together do not come back together
    assert pause_s(kind, 0, retry_after_s=2.5, draw=lambda: 0.0) == 2.5
    assert pause_s("Runtime.OutOfMemory", 0) is None and pause_s("a kind that has no row", 0) is None


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("Runtime.ExitError", failed("Runtime.ExitError")),
        ("ServiceException", refused(500, "ServiceException")),
        ("TooManyRequestsException", refused(429, "TooManyRequestsException")),
        ("ShardUnreachableError", failed("ShardUnreachableError")),
        ("ConnectionClosedError", Reply(hang_up=True)),
    ],
)
def test_an_invocation_waits_as_the_table_says(kind: str, reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    waited_s: list[float] = []
    with Endpoint() as endpoint:
        endpoint.script = [reply, reply, ok()]
        monkeypatch.setattr("remoe_cli.runtime.invoke.time.sleep", waited_s.append)
        monkeypatch.setattr("remoe_cli.runtime.invoke.pause_s", lambda kind, attempt, after_s: pause_s(kind, attempt, after_s, lambda: 0.5))
        invoke(endpoint.client, "f", FRAME)
    assert waited_s == [FIRST_PAUSES_S[kind] / 2, FIRST_PAUSES_S[kind]]


def test_every_error_of_a_function_has_a_row_and_is_tried_again_as_its_own_table_says() -> None:
    own = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)} | {"FrameError"}
    again = dict(re.findall(r"^\| (\w+Error) \|.*\| (yes|no) \|$", str(errors.__doc__), re.M))
    assert own == set(again) <= {row.kind for row in FAILURES}
    assert {kind for kind in own if failure(kind).pause_s is not None} == {kind for kind, answer in again.items() if answer == "yes"}


def test_each_kind_has_one_row_that_says_what_to_do() -> None:
    assert len({row.kind for row in FAILURES}) == len(FAILURES)
    for row in FAILURES:
        assert row.hint.endswith(".") and not row.meaning.endswith("."), row.kind


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("ConnectionClosedError", botocore_exceptions),
        ("ResponseStreamingError", botocore_exceptions),
        ("IncompleteReadError", botocore_exceptions),
        ("NoCredentialsError", botocore_exceptions),
        ("EndpointConnectionError", botocore_exceptions),
        ("ConnectTimeoutError", botocore_exceptions),
        ("ProtocolError", urllib3.exceptions),
    ],
)
def test_exceptions_have_the_names_of_their_rows(kind: str, module: object) -> None:
    assert issubclass(getattr(module, kind), Exception) and failure(kind) in FAILURES


def test_the_kind_of_a_failure() -> None:
    error = botocore_exceptions.ClientError({"Error": {"Code": "ThrottlingException"}}, "Invoke")
    assert kind_of(error) == "ThrottlingException"
    assert kind_of(botocore_exceptions.ClientError({}, "Invoke")) == "ClientError"
    assert kind_of(botocore_exceptions.NoCredentialsError()) == "NoCredentialsError"
