"""The twin through its Invoke API: a real boto3 client, real workers, real limits. Each test says which AWS behaviour it pins."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from remoe_cli import cages
from remoe_cli.deploy.local import front, processes
from tests.support.handlers import report, server


@pytest.fixture
def serve(tmp_path: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return server(tmp_path, probed, monkeypatch)


def test_echo_and_names(serve: Any) -> None:
    with serve("app.echo") as twin:
        assert twin.call({"a": [1, None, "é"]}) == {"a": [1, None, "é"]}
        for name in ("f:live", "arn:aws:lambda:us-east-1:123456789012:function:f", "arn:aws:lambda:us-east-1:123456789012:function:f:7"):
            assert twin.call(5, name=name) == 5
        assert twin.raw(b"1")["ExecutedVersion"] == "$LATEST"
        with pytest.raises(twin.client.exceptions.ResourceNotFoundException):
            twin.call(1, name="g")
        assert twin.raw(b"1", InvocationType="DryRun")["StatusCode"] == 204
        with pytest.raises(twin.client.exceptions.InvalidParameterValueException, match="not Event"):
            twin.call(1, InvocationType="Event")


def test_cold_then_warm_and_the_report_line(serve: Any) -> None:
    with serve("app.who") as twin:
        cold = twin.raw(b"{}", LogType="Tail")
        warm = twin.raw(b"{}", LogType="Tail")
        first, second = report(cold), report(warm)
        assert first["init"] > 10 and "init" not in second
        for numbers in (first, second):
            total_ms = numbers["duration"] + numbers.get("init", 0.0)
            assert total_ms - 0.02 <= numbers["billed"] <= total_ms + 1.02  # rounded up, init included
            assert numbers["size"] == 1769 and 5 < numbers["used"] < 100
        assert json.loads(cold["body"])["pid"] == json.loads(warm["body"])["pid"]
        log = base64.b64decode(warm["LogResult"]).decode()
        request_id = warm["ResponseMetadata"]["RequestId"]
        assert log.startswith(f"START RequestId: {request_id} Version: $LATEST\nhello from {request_id}\nEND RequestId: {request_id}\n")
        (function,) = twin.status()["functions"]
        assert (function["invocations"], function["cold_starts"], function["errors"]) == (2, 1, 0)
        assert function["billed_ms"] == first["billed"] + second["billed"]
        (instance,) = function["instances"]
        assert instance["state"] == "IDLE" and instance["pid"] == json.loads(warm["body"])["pid"] and instance["resident_bytes"] > 5e6


@pytest.mark.alone
def test_a_second_call_at_once_is_throttled(serve: Any) -> None:
    with serve("app.sleep") as twin, ThreadPoolExecutor(1) as pool:
        twin.call(0)
        slow = pool.submit(twin.call, 0.5)
        time.sleep(0.2)
        with pytest.raises(twin.client.exceptions.TooManyRequestsException) as caught:
            twin.call(0)
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
        assert caught.value.response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
        pid = slow.result()
        assert twin.call(0) == pid
        assert twin.status()["functions"][0]["invocations"] == 3


@pytest.mark.alone
def test_concurrency_2_runs_two_and_reuses_the_latest(serve: Any) -> None:
    with serve("app.sleep", concurrency=2) as twin, ThreadPoolExecutor(2) as pool:
        long, short = pool.submit(twin.call, 0.8), pool.submit(twin.call, 0.3)
        assert short.result() != long.result()
        assert twin.call(0) == long.result()
        assert twin.status()["functions"][0]["cold_starts"] == 2


def test_timeout(serve: Any) -> None:
    with serve("app.sleep", timeout_s=0.4) as twin:
        pid = twin.call(0)
        begun = time.perf_counter()
        answer = twin.raw(b"30", LogType="Tail")
        fault = json.loads(answer["body"])
        assert 0.4 <= time.perf_counter() - begun < 2
        assert fault["errorType"] == "Sandbox.Timedout"
        assert fault["errorMessage"] == f"RequestId: {answer['ResponseMetadata']['RequestId']} Error: Task timed out after 0.40 seconds"
        assert report(answer)["duration"] >= 400
        assert twin.call(0) != pid


def test_handler_exception_keeps_the_worker(serve: Any) -> None:
    with serve("app.fail") as twin:
        for _ in range(2):
            fault = twin.fault()
            assert fault["errorType"] == "KeyError" and fault["errorMessage"] == "'no such expert'"
            assert "app.py" in fault["stackTrace"][0]
        (function,) = twin.status()["functions"]
        assert (function["cold_starts"], function["errors"]) == (1, 2)


def test_exit_in_handler_is_named(serve: Any) -> None:
    with serve("app.leave") as twin:
        fault = twin.fault()
        assert fault["errorType"] == "Runtime.ExitError"
        assert fault["errorMessage"].endswith("Error: Runtime exited with error: exit status 3")


@pytest.mark.parametrize(
    ("source", "handler", "error_type", "words"),
    [
        ("import no_such_module", "bad.f", "Runtime.ImportModuleError", "No module named 'no_such_module'"),
        ("def f(:", "bad.f", "Runtime.UserCodeSyntaxError", "Syntax error"),
        ("", "bad.f", "Runtime.HandlerNotFound", "Handler 'f' missing"),
        ("raise ValueError('damaged weights')", "bad.f", "ValueError", "damaged weights"),
        ("import os; os._exit(7)", "bad.f", "Runtime.ExitError", "exit status 7"),
        ("import os; os.abort()", "bad.f", "Runtime.ExitError", "signal: aborted"),
    ],
)
def test_init_failure_is_named(serve: Any, tmp_path: Path, source: str, handler: str, error_type: str, words: str) -> None:
    (tmp_path / "code" / "bad.py").write_text(source)
    with serve(handler) as twin:
        answer = twin.raw(b"1", LogType="Tail")
        fault = json.loads(answer["body"])
        assert answer["FunctionError"] == "Unhandled" and fault["errorType"] == error_type and words in fault["errorMessage"]
        assert "init" in report(answer)
        assert twin.fault()["errorType"] == error_type  # and again: nothing is stuck


def test_missing_code_is_named(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "code" / "app.py").unlink()
    (tmp_path / "code").rmdir()
    with serve("app.echo") as twin:
        assert twin.fault()["errorType"] == "Runtime.LaunchError"


def test_slow_init(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "code" / "slow.py").write_text("import time; time.sleep(30)")
    with serve("slow.f", init_limit_s=0.5) as twin:
        begun = time.perf_counter()
        fault = twin.fault()
        assert 0.5 <= time.perf_counter() - begun < 3
        assert fault["errorType"] == "Runtime.InitError" and fault["errorMessage"].endswith("Init timed out after 0.50 seconds")


SLOW = """
import time
begun = time.monotonic()
time.sleep({})
ended = time.monotonic()

def f(event, context):
    return [begun, ended]
"""


def test_no_more_workers_start_at_once_than_there_are_cores(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once would make each other slow and be billed for it, or pass the init limit, as no two do on Lambda."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "code" / "slow.py").write_text(SLOW.format(0.5))
    with serve("slow.f", concurrency=3) as twin, ThreadPoolExecutor(3) as pool:
        starts = sorted({tuple(times) for times in pool.map(twin.call, range(3))})
        assert len(starts) > 1 and all(begun >= ended for (_, ended), (begun, _) in pairwise(starts))


def test_who_waits_for_a_start_when_the_twin_ends_starts_nothing(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "code" / "slow.py").write_text(SLOW.format(30))
    with ThreadPoolExecutor(2) as pool:
        with serve("slow.f", concurrency=2) as twin:  # which checks at its end that no worker and no file is left
            waiting = [pool.submit(twin.raw, b"1") for _ in range(2)]
            while not twin.started:
                time.sleep(0.01)
            time.sleep(0.3)
        assert len(twin.started) == 1
        for each in waiting:
            assert each.exception() is not None or "FunctionError" in each.result()


@pytest.mark.parametrize("body", [b"not json", b'"open', b'"a"b"', b'"a\nb"', b'"a\\"', b'"\xff"', b"\x00", b'{"a":}'])
def test_what_is_not_json_is_refused(serve: Any, body: bytes) -> None:
    assert not front.is_json(body)
    if body == b'"a\nb"':  # one of them through the wire is enough
        with serve("app.echo") as twin, pytest.raises(twin.client.exceptions.InvalidRequestContentException):
            twin.raw(body)


@pytest.mark.parametrize("body", [b'""', b'"QUJD+/=="', b'"a\\"b"', '"é"'.encode(), b"[1, 2]", b" null "])
def test_what_is_json_is_let_through(body: bytes) -> None:
    assert front.is_json(body)


def test_worker_killed_in_mid_request(serve: Any) -> None:
    with serve("app.sleep") as twin, ThreadPoolExecutor(1) as pool:
        pid = twin.call(0)
        slow = pool.submit(twin.fault, 20)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        fault = slow.result(5)
        assert fault["errorType"] == "Runtime.ExitError"
        assert re.fullmatch(r"RequestId: [0-9a-f-]{36} Error: Runtime exited with error: signal: killed", fault["errorMessage"])
        assert twin.call(0) != pid


def test_worker_killed_while_idle_costs_nobody_a_request(serve: Any) -> None:
    with serve("app.sleep") as twin:
        for _ in range(5):
            pid = twin.call(0)
            os.kill(pid, signal.SIGKILL)
            while processes.start_time(pid):  # a worker that still lives takes the event, and its death is then a named error
                time.sleep(0.001)
        (function,) = twin.status()["functions"]
        assert (function["cold_starts"], function["errors"]) == (5, 0)


def test_worker_environment_is_lambdas_and_not_the_parents(serve: Any, tmp_path: Path) -> None:
    with serve("app.who", memory_mb=3600, environment={"LAYER": "7", "LANG": "C.UTF-8"}) as twin:
        answer = twin.call()
        environment = answer["environment"]
        assert not [key for key in environment if "SECRET" in key or "TOKEN" in key]
        assert set(environment) - {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE", "_X_AMZN_TRACE_ID"} == {
            *("PATH", "HOME", "LANG", "TZ", "LAMBDA_TASK_ROOT", "_HANDLER", "AWS_REGION", "AWS_DEFAULT_REGION", "PYTHONPATH", "LAYER"),
            *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOMP_SPINCOUNT", "AWS_LAMBDA_RUNTIME_API", "AWS_LAMBDA_LOG_STREAM_NAME"),
            *("AWS_LAMBDA_FUNCTION_NAME", "AWS_LAMBDA_FUNCTION_VERSION", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "AWS_LAMBDA_LOG_GROUP_NAME"),
            *("AWS_LAMBDA_INITIALIZATION_TYPE", "TMPDIR", "PYTHONNOUSERSITE", "PYTHONSAFEPATH"),
        }
        assert (environment["LAYER"], environment["LANG"], environment["OMP_NUM_THREADS"]) == ("7", "C.UTF-8", "2")
        assert answer["cwd"] == environment["LAMBDA_TASK_ROOT"] == str(tmp_path / "code")
        assert 15_000 < answer["left_ms"] <= 20_000


@pytest.mark.alone
def test_rtt_is_added_to_each_call_but_not_to_the_bill(serve: Any) -> None:
    with serve("app.echo", rtt_ms=120) as twin:
        twin.call(1)
        begun = time.perf_counter()
        answer = twin.raw(b"1", LogType="Tail")
        assert time.perf_counter() - begun >= 0.12
        assert report(answer)["duration"] < 60


@pytest.mark.alone
def test_warm_latency(serve: Any) -> None:
    """Not a benchmark: it fails when a stall (Nagle, a fork, a poll) gets into the warm path.

    A dry run goes the same way but for the worker, and is measured in turns with the call.
    """
    body = json.dumps("A" * 8192).encode()
    with serve("app.echo", memory_mb=3600) as twin:
        twin.raw(body)
        times_ms: dict[str, list[float]] = {"RequestResponse": [], "DryRun": []}
        for _ in range(200):
            for kind, taken_ms in times_ms.items():
                begun = time.perf_counter()
                twin.raw(body, InvocationType=kind)
                taken_ms.append((time.perf_counter() - begun) * 1e3)
        warm_ms, dry_ms = (statistics.median(taken_ms) for taken_ms in times_ms.values())
        print(f"warm 8 KB echo through boto3: median {warm_ms:.2f} ms, {warm_ms / dry_ms:.1f} times a dry run")
        assert warm_ms < 6 * dry_ms


def test_errors_of_the_front_reach_botocore_as_client_errors(serve: Any) -> None:
    with serve("app.echo") as twin, pytest.raises(ClientError, match="Could not parse request body into json"):
        twin.raw(b"{")
