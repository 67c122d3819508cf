"""Calls that fail in ways of which the twin has none: credentials that expire, answers of nobody, functions that are avoided."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.errors import DeployError
from remoe_cli.function.codec import Batch
from remoe_cli.runtime.breaker import CLOSED, Breaker
from remoe_cli.runtime.budget import HEDGES, RETRIES
from remoe_cli.runtime.calls import LAST_S, Caller
from remoe_cli.runtime.failures import LOG_IN
from remoe_cli.runtime.hedging import Latencies
from remoe_cli.runtime.invoke import FailedCall, make_client
from remoe_cli.runtime.last_resort import LastResort, ShardPlace
from remoe_cli.runtime.remote_function import RemoteFunction
from tests.support.endpoint import Endpoint, failed, ok, refused

FUNCTION = RemoteFunction("layer-003", (1,), 1, 0.0)
BATCH = Batch("float32", (1,), (2,), np.ones((2, 8), np.float32))


@contextmanager
def caller_of(endpoint: Endpoint) -> Iterator[Caller]:
    with ThreadPoolExecutor(4) as pool:
        yield Caller(endpoint.client, pool, [])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as made:
        yield made


def call(caller: Caller, function: RemoteFunction = FUNCTION) -> None:
    begun = caller.begin(3, function, BATCH, time.monotonic())
    (answer,) = caller.finish([begun], lambda: None)
    assert answer.data.tobytes() == BATCH.data.tobytes()


def test_credentials_that_expire_are_read_again_once_a_call(endpoint: Endpoint) -> None:
    made = []
    with caller_of(endpoint) as caller:
        caller.renew = lambda: made.append(make_client(endpoint.url, 1, 5.0)) or made[-1]
        endpoint.script = [refused(403, "ExpiredTokenException"), ok()]
        call(caller)
        assert caller.client is made[0] and len(made) == 1
        endpoint.script = [refused(403, "ExpiredTokenException")]
        with pytest.raises(FailedCall, match=r"The expert function layer-003 of layer 3 failed after 2 tries: .*ExpiredToken") as raised:
            call(caller)
        assert raised.value.hint == LOG_IN and len(made) == 2
        for client in made:
            client.close()


def test_what_answers_without_a_report_is_not_lambda(endpoint: Endpoint) -> None:
    endpoint.script = [ok()]
    del endpoint.script[0].headers["X-Amz-Log-Result"]
    with caller_of(endpoint) as caller, pytest.raises(FailedCall, match="of layer 3 failed: it answered without Lambda's REPORT line"):
        call(caller)


def test_a_function_that_keeps_failing_is_avoided_for_a_while_and_named_where_nothing_else_helps(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    place = ShardPlace("nothing.safetensors", 0, "")
    with caller_of(endpoint) as caller:
        caller.last_resort = LastResort(str(tmp_path))
        endpoint.script = [failed("KeyError")]
        function = RemoteFunction("layer-003", (1,), 1, 0.0, shard=place)
        for tries in (1, 2, 3, 4, 5, 5):
            with pytest.raises(FailedCall, match="could not compute its experts itself: FileNotFoundError"):
                call(caller, function)
            assert len(endpoint.requests) == tries
        with pytest.raises(FailedCall, match="of layer 3 failed: after failures: KeyError: it was KeyError"):
            call(caller, function)
    assert [each.failed for each in caller.sent] == [True] * 7 and caller.sent[-1].billed_tries == 0


def test_the_breakers_pause_doubles_up_to_a_minute_and_a_success_ends_it() -> None:
    breaker, now, pauses = CLOSED, 0.0, []
    for _ in range(8):
        breaker = breaker.failed(now, lasts=True)
        pauses.append(breaker.until_s - now)
        now = breaker.until_s
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not Breaker(failures=4).is_open(0.0) and Breaker(failures=4).failed(0.0).is_open(0.5)
    assert breaker.failed(now - 1, lasts=True).until_s == now  # a try that was under way when it was opened


def test_budgets_end_and_fill_with_successes() -> None:
    retries = RETRIES
    for _ in range(10):
        assert retries.allows
        retries = retries.spent()
    assert not retries.allows and not retries.earned(9).allows and retries.earned(10).allows
    assert retries.earned(10**6).tokens == 10
    assert not HEDGES.earned(19).allows and HEDGES.earned(20).allows


def test_slow_calls_do_not_move_the_time_of_a_hedge_up_to_themselves() -> None:
    taken = Latencies()
    for i in range(19):
        assert taken.hedge_after_s() is None
        taken.add(0.010 + i / 1e5)
    taken.add(0.011)
    assert math.isclose(taken.hedge_after_s() or 0.0, 2 * 0.01009, rel_tol=0.01)  # twice the median, as the 95% are close to it
    for i in range(200):
        taken.add(0.1 if i % 10 == 0 else 0.01)
    assert taken.hedge_after_s() == 0.1  # a tenth of them is slow: the quantile says so
    for _ in range(200):
        taken.add(0.01)
    assert taken.hedge_after_s() == 0.02 and len(taken._by_size) == 128  # only the last ones count


def test_a_call_has_a_second_however_late_it_is(endpoint: Endpoint) -> None:
    """Else the last token of a request would be computed here, layer by layer, and functions that do well would be avoided."""
    endpoint.script = [ok()]
    with caller_of(endpoint) as caller:
        caller.last_resort = LastResort("nowhere")
        for left_s in (0.01, -0.01):
            asked_s = time.monotonic()
            begun = caller.begin(3, FUNCTION, BATCH, asked_s, asked_s + left_s)
            assert begun.until_s >= asked_s + LAST_S
            (answer,) = caller.finish([begun], lambda: "time-limit")
            assert answer.data.tobytes() == BATCH.data.tobytes()
        assert caller._known[FUNCTION.name].breaker == CLOSED


def test_what_a_call_was_billed_is_kept_where_nothing_can_compute_it_here(endpoint: Endpoint) -> None:
    """The function is out of memory, and then the credentials for its shard have expired."""

    def environment() -> dict[str, str]:
        raise DeployError("The login has expired.", "Log in again.")

    endpoint.script = [failed("Runtime.OutOfMemory")]
    with caller_of(endpoint) as caller:
        caller.last_resort = LastResort("s3://bucket", environment)
        function = RemoteFunction("layer-003", (1,), 1, 0.0, shard=ShardPlace("x.safetensors", 10, "0" * 64))
        with pytest.raises(FailedCall, match=r"The expert function layer-003 of layer 3 .*DeployError: The login has expired\.$"):
            call(caller, function)
        assert [made.failed for made in caller.sent] == [True], "what the tries were billed is in its invocation"
