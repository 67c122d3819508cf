"""The main function as a Lambda function: on the twin, calling its expert functions there, and its handler by itself."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from awslambdaric.lambda_context import LambdaContext

from remoe_cli.deploy import main_files
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local import lifecycle, target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import DeployError, InvokeError, RemoeError, UsageError
from remoe_cli.package.bundle import Manifest
from remoe_cli.package.partial_checkpoint import MANIFEST
from remoe_cli.plan.document import LayerPlan, MainSpec, Source
from remoe_cli.runtime import client, lambda_main
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.expected_cost import Predictor, cost_model
from remoe_cli.runtime.kept import Book
from remoe_cli.runtime.receipt import failed_receipt
from remoe_cli.runtime.streamed import Streamed
from tests.support import endpoint as endpoints
from tests.support.api_server import PRICES
from tests.support.by_hand import PROMPT, PROMPT_IDS, ByHand, by_hand

LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 3, 5, 6, 7), memory_mb=1769, replicas=1, functions=((1, 7), (2, 5, 3, 6))),
    LayerPlan(layer=1, remote=(1, 3, 4, 6), memory_mb=1769, replicas=1),
)
IDLE_S = 2.0
HERE = target.LocalTarget(SILENT)


@dataclass(frozen=True)
class Deployed:
    made: ByHand
    status: dict[str, Any]
    predicted: Predictor

    def ask(self, new_tokens: int = 16, on_text: Callable[[str], None] = lambda text: None, **more: Any) -> dict[str, Any]:
        return client.answer(HERE.main_address("l"), PROMPT, new_tokens, on_text, **more)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """With two vCPUs, so that a cold start takes no longer than it must."""
    folder = tmp_path_factory.mktemp("lambda")
    made = by_hand(folder, LAYERS)
    plan = made.plan.model_copy(update={"main": MainSpec(name="lambda-3538", memory_mb=3538)})
    catalog = made.catalog.model_copy(update={"function": made.catalog.function.model_copy(update={"idle_ttl_s": IDLE_S})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(folder / "state"))
        patch.setattr(target, "read_inputs", lambda path: (plan, made.profile, catalog))
        status = HERE.deploy(made.plan_path, "l", DeployOptions(endpoint=Endpoint.aws_lambda))
        try:
            yield Deployed(made, status, cost_model(plan, made.profile, catalog))
        finally:
            lifecycle.destroy("l")


def test_it_answers_through_its_functions_from_zero_to_zero_and_back(deployed: Deployed, measured: Callable[[str], None]) -> None:
    main = deployed.status["main"]
    assert (main["kind"], main["name"], main["state"], main["instances"], main["memory_mb"]) == ("lambda", "l-main", "at rest", [], 3538)
    expected = deployed.made.tokens()
    pieces: list[str] = []

    begun = time.perf_counter()
    cold = deployed.ask(on_text=pieces.append)
    cold_s = time.perf_counter() - begun
    assert cold["token_ids"] == expected and tuple(cold["prompt_token_ids"]) == PROMPT_IDS
    assert "".join(pieces) == cold["text"] and len(pieces) == 16, "it streams"
    assert {f["name"] for f in cold["receipt"]["functions"]} == {f["name"] for f in deployed.status["functions"]}
    assert 1 < cold["receipt"]["main_load_s"] < cold_s
    assert cold["receipt"]["predicted"] == deployed.predicted(20, 15).model_dump(mode="json")

    begun = time.perf_counter()
    warm = deployed.ask()
    measured(f"main function on Lambda: cold {cold_s:.1f} s, warm {time.perf_counter() - begun:.2f} s for 16 tokens")
    assert warm["token_ids"] == expected
    assert (warm["receipt"]["main_load_s"], warm["receipt"]["predicted"]) == (0, cold["receipt"]["predicted"])
    busy = lifecycle.status("l")
    assert (busy["main"]["state"], busy["main"]["cold_starts"], busy["main"]["invocations"]) == ("running", 1, 2)
    assert busy["main"]["resident_bytes"] > 1e8

    give_up = time.monotonic() + IDLE_S + 10
    while (rest := lifecycle.status("l"))["main"]["instances"] or any(f["instances"] for f in rest["functions"]):
        assert time.monotonic() < give_up
        time.sleep(0.2)
    assert rest["main"]["state"] == "at rest" and rest["main"]["resident_bytes"] == 0
    # Asked twice at once it takes one, and says so.
    with ThreadPoolExecutor(1) as other:
        first = other.submit(deployed.ask)
        while not lifecycle.status("l")["main"]["instances"]:
            time.sleep(0.05)
        with pytest.raises(DeployError, match="The main function l-main is busy"):
            deployed.ask()
        again = first.result()
    assert again["token_ids"] == expected and again["receipt"]["main_load_s"] > 1
    assert lifecycle.status("l")["main"]["cold_starts"] == 2


def test_an_event_is_a_request_of_any_api(deployed: Deployed) -> None:
    """Lambda's answer is the API's document, whole or streamed; errors have the API's form."""
    address = HERE.main_address("l")
    assert isinstance(address, client.LambdaMain)

    def invoke(event: dict[str, Any]) -> Any:
        return json.loads(address.client.invoke(FunctionName=address.function, Payload=json.dumps(event).encode())["Payload"].read())

    def stream(event: dict[str, Any]) -> tuple[list[bytes], dict[str, Any]]:
        payload = json.dumps(event | {"stream": True}).encode()
        events = list(address.client.invoke_with_response_stream(FunctionName=address.function, Payload=payload)["EventStream"])
        return [part["PayloadChunk"]["Payload"] for part in events[:-1]], events[-1]["InvokeComplete"]

    chat = {"model": "", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 4}
    text = " ".join(f"w{token}" for token in deployed.made.tokens(4))
    answer = invoke(chat)
    receipt = answer["usage"]["remoe"]
    assert answer["choices"][0]["message"]["content"] == text and receipt["invocations"] > 0 and receipt["functions_called"] == 3
    predicted = deployed.predicted(answer["usage"]["prompt_tokens"], 3).model_dump(mode="json")
    assert receipt["predicted"] == predicted
    message = invoke(chat | {"anthropic_version": "2023-06-01"})
    assert message["content"] == [{"type": "text", "text": text}]
    for wrong, param in (({"temperature": -1}, "temperature"), ({"model": "other"}, "model")):
        assert invoke(chat | wrong)["error"]["param"] == param
        (refused,), ended = stream(chat | wrong)
        assert json.loads(refused)["error"]["param"] == param and "ErrorCode" not in ended
    parts, ended = stream(chat | {"stream_options": {"include_usage": True}})
    assert len(parts) >= 4 and "ErrorCode" not in ended, "each token is a part, the last one with what ends the answer"
    *chunks, usage, done = b"".join(parts).decode().strip().split("\n\n")
    assert done == "data: [DONE]" and json.loads(usage.removeprefix("data: "))["usage"]["remoe"]["predicted"] == predicted
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    parts, _ = stream(chat | {"anthropic_version": "2023-06-01"})
    assert b"event: message_stop" in parts[-1]
    # Who asks for a stream by Invoke gets all of its lines at once.
    payload = json.dumps(chat | {"stream": True}).encode()
    whole = address.client.invoke(FunctionName=address.function, Payload=payload)["Payload"].read()
    assert whole.startswith(b"data: {") and whole.endswith(b"data: [DONE]\n\n")


def test_a_function_that_does_not_stream_is_one_part(deployed: Deployed) -> None:
    """As on AWS; and a function that fails says so at the end."""
    address = HERE.main_address("l")
    assert isinstance(address, client.LambdaMain)
    name = deployed.status["functions"][0]["name"]
    events = list(address.client.invoke_with_response_stream(FunctionName=name, Payload=b'"nonsense"', LogType="Tail")["EventStream"])
    end = events[-1]["InvokeComplete"]
    assert end["ErrorCode"] == "Unhandled" and json.loads(end["ErrorDetails"])["errorType"] and end["LogResult"]
    with pytest.raises(address.client.exceptions.ResourceNotFoundException):
        address.client.invoke_with_response_stream(FunctionName="nobody", Payload=b"{}")


def test_what_is_wrong_with_a_request_comes_back_as_such(deployed: Deployed) -> None:
    with pytest.raises(UsageError, match="exceed the model's 512 positions"):
        deployed.ask(new_tokens=1000)


def failed(kind: str) -> bytes:
    return json.dumps({"errorType": kind, "errorMessage": f"it was {kind}"}).encode()


@pytest.mark.parametrize(
    ("reply", "kind", "sentence"),
    [
        (
            endpoints.streamed(error=failed("Sandbox.Timedout")),
            InvokeError,
            r"The main function f ran out of time \(Sandbox.Timedout: it was Sandbox.Timedout\)",
        ),
        (endpoints.streamed(b'{"text": "a"}\n', error=failed("Runtime.OutOfMemory")), InvokeError, "ran out of memory"),
        (endpoints.streamed(error=failed("Runtime.ExitError")), InvokeError, r"The main function f failed \(Runtime.ExitError"),
        (endpoints.refused(429, "TooManyRequestsException"), DeployError, "is busy"),
        (endpoints.refused(404, "ResourceNotFoundException"), DeployError, "does not exist"),
        (endpoints.refused(403, "AccessDeniedException"), DeployError, "may not be called with these credentials"),
        (endpoints.refused(403, "ExpiredTokenException"), DeployError, "the credentials have expired"),
        (endpoints.refused(500, "ServiceException"), DeployError, "ended before the answer was complete .ServiceException"),
        (endpoints.Reply(hang_up=True), DeployError, "ended before the answer was complete .ConnectionClosedError"),
        (endpoints.streamed(b"nonsense"), DeployError, "ended before the answer was complete .JSONDecodeError"),
        (
            endpoints.streamed(b'{"error": {"kind": "Invoke", "message": "An expert is gone.", "hint": "Look."}}'),
            InvokeError,
            "An expert is gone",
        ),
        (
            endpoints.streamed(b'{"error": {"kind": "Internal", "message": "Something else.", "hint": "Report it."}}'),
            RemoeError,
            "Something else",
        ),
    ],
)
def test_a_main_function_that_fails_is_one_clear_sentence(reply: endpoints.Reply, kind: type[RemoeError], sentence: str) -> None:
    with endpoints.Endpoint() as endpoint:
        endpoint.script = [reply]
        with pytest.raises(kind, match=sentence) as raised:
            client.answer(client.LambdaMain("f", endpoint.client), "w1", 4, print)
    assert type(raised.value) is kind and raised.value.hint and "\n" not in raised.value.message
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("odd", ["receipt", "observed"])
def test_an_answer_is_not_lost_where_what_is_to_be_kept_is_of_another_version(
    odd: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receipt = failed_receipt(PRICES, 0.5, ()).model_dump(mode="json")
    sent: dict[str, Any] = {"text": "", "receipt": receipt, "observed": {"revision": "r"}}
    sent[odd]["of_a_later_version"] = 1
    book, texts = Book(tmp_path / "r"), list[str]()
    with endpoints.Endpoint() as endpoint, caplog.at_level(logging.WARNING):
        endpoint.script = [endpoints.streamed(b'{"text": "hello"}\n' + json.dumps({"answer": sent}).encode())]
        made = client.answer(client.LambdaMain("f", endpoint.client, book=book), "w1", 4, texts.append)
    assert texts == ["hello"] and made["receipt"]["main"]["seconds"] == (0.5 if odd == "receipt" else 0.013)
    (record,) = caplog.records
    assert "of another version of remoe, which" in record.getMessage()
    assert len(list(book.receipts())) == (odd == "observed") and not list(book.observations())


def test_functions_only_and_the_main_function_on_ones_own_machine(deployed: Deployed) -> None:
    """The server needs this process's main thread, so the questions come from another."""
    made = deployed.made
    status = HERE.deploy(made.plan_path, "n", DeployOptions(endpoint=Endpoint.none))
    try:
        assert status["main"] is None and len(status["functions"]) == 3
        with pytest.raises(DeployError, match="'n' has functions only") as raised:
            HERE.main_address("n")
        assert "remoe serve n" in raised.value.hint
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def ask() -> dict[str, Any]:
            try:
                for _ in range(600):
                    with suppress(httpx.ConnectError):
                        if httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False, timeout=20).status_code == 200:
                            break
                    time.sleep(0.1)
                return client.answer(client.Http(f"http://127.0.0.1:{port}"), PROMPT, 16, lambda text: None)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        with ThreadPoolExecutor(1) as other:
            asked = other.submit(ask)
            HERE.serve("n", "127.0.0.1", port)
            answer = asked.result()
        assert answer["token_ids"] == made.tokens() and len(answer["receipt"]["functions"]) == 3
    finally:
        lifecycle.destroy("n")
    with pytest.raises(UsageError, match="no SageMaker endpoint"):
        HERE.deploy(made.plan_path, "n", DeployOptions(endpoint=Endpoint.sagemaker))


def _context(remaining_s: float) -> LambdaContext:
    return LambdaContext("id", {}, {}, int((time.time() + remaining_s) * 1000))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ByHand:
    """REMOE_MAIN names the share of a model whose experts are all local."""
    made = by_hand(tmp_path, ())
    bundle = Manifest(
        plan=Source(path="", sha256=""), model=made.profile.record.model, spec=made.profile.record.spec, code_sha256="", functions=()
    )
    config = main_files.server_config(made.plan, made.profile, made.catalog, bundle, str)
    main_files.write_main_files(config, made.plan_path, tmp_path / "main")
    monkeypatch.setenv("REMOE_MAIN", str(tmp_path / "main" / MANIFEST))
    monkeypatch.setattr(lambda_main, "_main", None)
    return made


def test_an_answer_ends_before_the_functions_time_does(alone: ByHand) -> None:
    request = {"prompt_token_ids": list(PROMPT_IDS), "max_new_tokens": 200}
    whole = lambda_main.handle(request, _context(60))
    assert whole["finish_reason"] == "length" and whole["receipt"]["main_load_s"] > 0
    took_s = whole["receipt"]["total_s"]
    part = lambda_main.handle(request, _context(lambda_main._MARGIN_S + took_s / 2))
    assert part["finish_reason"] == "time-limit" and part["receipt"]["main_load_s"] == 0
    assert 1 <= len(part["token_ids"]) < 200 and part["token_ids"] == whole["token_ids"][: len(part["token_ids"])]
    assert whole["text"].startswith(part["text"]) and part["receipt"]["generated_tokens"] == len(part["token_ids"])
    none = lambda_main.handle(request, _context(lambda_main._MARGIN_S / 2))
    assert none["error"]["kind"] == "Deploy" and "no time left" in none["error"]["message"]


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({}, "either 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "w1", "prompt_token_ids": [1]}, "either 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "w1", "max_new_tokens": 0}, "wrong at 'max_new_tokens'"),
        ({"prompt": "w1", "temprature": 1}, "wrong at 'temprature'"),
        ([], "The request is wrong"),
    ],
)
def test_an_event_that_is_no_request_is_refused_before_anything_is_loaded(
    event: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REMOE_MAIN", raising=False)
    error = lambda_main.handle(event, _context(60))["error"]
    assert error["kind"] == "Usage" and sentence in error["message"] and error["hint"]


def test_a_streamed_answer_that_fails_says_so_in_its_stream(alone: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise DeployError("The GPU's memory is full.", "Ask again.")

    chat = {"model": "", "messages": [{"role": "user", "content": "w1"}], "stream": True, "max_tokens": 2}
    for event, start in ((chat, b"data: "), ({"prompt": "w1", "stream": True}, b"")):
        made = lambda_main.handle(event, _context(60))
        assert isinstance(made, Streamed)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "run", broken)
            parts: list[bytes] = []
            made.send(parts.append)
        (line,) = parts
        error = json.loads(line.removeprefix(start))["error"]
        assert "memory is full" in error["message"] and (error.get("remoe") or error["receipt"])["main"]["seconds"] > 0


def test_an_instance_of_its_own_answers_whole(alone: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_LAMBDA_MAX_CONCURRENCY", "1")
    whole = lambda_main.handle({"prompt": "w1", "stream": True, "max_new_tokens": 2}, _context(60))
    assert isinstance(whole, dict) and len(whole["token_ids"]) == 2
    chat = {"model": "", "messages": [{"role": "user", "content": "w1"}], "stream": True}
    refused = lambda_main.handle(chat, _context(60))
    assert isinstance(refused, dict) and (refused["error"]["type"], refused["error"]["param"]) == ("invalid_request_error", "stream")


def test_a_share_that_was_changed_is_named_and_tried_again(alone: ByHand, tmp_path: Path) -> None:
    weights = tmp_path / "main" / "weights-0000.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    request = {"prompt_token_ids": [1, 2], "max_new_tokens": 2}
    error = lambda_main.handle(request, _context(60))["error"]
    assert error["kind"] == "Artifact" and f"{weights} is not the file that the manifest names" in error["message"]
    weights.unlink()
    assert "is missing" in lambda_main.handle(request, _context(60))["error"]["message"]
    weights.write_bytes(right)
    assert len(lambda_main.handle(json.loads(json.dumps(request)), _context(60))["token_ids"]) == 2
