"""Requests to a main server: what is wrong with one is its own error, and nothing is done for a client that has gone."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.local import target
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.errors import UsageError
from remoe_cli.plan.document import LayerPlan
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import address, client, http_server, server
from remoe_cli.runtime.access import Door
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.device import Device
from remoe_cli.runtime.kept import Book
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.main_function import MainFunction
from tests.support import api_server
from tests.support.api_server import PRICES
from tests.support.by_hand import PROMPT, PROMPT_IDS, ByHand, by_hand, on_twin
from tests.support.families import VOCAB_SIZE

HERE = target.LocalTarget(SILENT)
LAYERS = (LayerPlan(layer=0, remote=(1, 2, 3, 5, 6, 7), memory_mb=1769, replicas=1),)
LONG = 480  # of the model's 512 positions
CHAT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    """A deployment whose main server has remote experts and a chat template."""
    folder = tmp_path_factory.mktemp("deployed")
    whole = by_hand(folder, LAYERS, {"chat_template.jinja": CHAT})
    with pytest.MonkeyPatch.context() as patch, on_twin(whole, folder, patch) as deployed:
        HERE.deploy(deployed.plan_path, "d", DeployOptions())
        yield deployed


def main_url() -> str:
    endpoint = HERE.main_address("d")
    assert isinstance(endpoint, client.Http)
    return endpoint.url


def invocations() -> int:
    return sum(int(function["invocations"]) for function in HERE.status("d")["functions"])


IDS = {"prompt_token_ids": list(PROMPT_IDS)}
MESSAGES = {"messages": [{"role": "user", "content": "w1"}]}
DEEP: Any = 0
for _ in range(200):
    DEEP = [DEEP]
OUTSIDE = f"is not in the model's vocabulary of {VOCAB_SIZE} tokens."
WRONG: dict[str, tuple[Any, str]] = {
    "id too large": (
        {"prompt_token_ids": [1, VOCAB_SIZE]},
        f"The token id {VOCAB_SIZE} {OUTSIDE}",
    ),
    "id negative": ({"prompt_token_ids": [-1]}, f"The token id -1 {OUTSIDE}"),
    "id huge": ({"prompt_token_ids": [2**64]}, f"The token id {2**64} {OUTSIDE}"),
    "id float": ({"prompt_token_ids": [1.5]}, "'prompt_token_ids.0'"),
    "id whole float": ({"prompt_token_ids": [1.0]}, "'prompt_token_ids.0'"),
    "id boolean": ({"prompt_token_ids": [True]}, "'prompt_token_ids.0'"),
    "id text": ({"prompt_token_ids": ["1"]}, "'prompt_token_ids.0'"),
    "id null": ({"prompt_token_ids": [None]}, "'prompt_token_ids.0'"),
    "ids nested": ({"prompt_token_ids": [[1, 2]]}, "'prompt_token_ids.0'"),
    "ids nested deep": ({"prompt_token_ids": DEEP}, "The request is wrong"),
    "ids no list": ({"prompt_token_ids": 1}, "'prompt_token_ids'"),
    "ids empty": ({"prompt_token_ids": []}, "The prompt has no tokens."),
    "ids too many": ({"prompt_token_ids": [1] * 600}, "exceed the model's 512 positions"),
    "answer too long": (IDS | {"max_new_tokens": 1000}, "exceed the model's 512 positions"),
    "answer far too long": (IDS | {"max_new_tokens": 10**30}, "'max_new_tokens'"),
    "answer of nothing": (IDS | {"max_new_tokens": 0}, "'max_new_tokens'"),
    "tokens text": (IDS | {"max_new_tokens": "5"}, "'max_new_tokens'"),
    "tokens float": (IDS | {"max_new_tokens": 5.0}, "'max_new_tokens'"),
    "tokens boolean": (IDS | {"max_new_tokens": True}, "'max_new_tokens'"),
    "calls text": (IDS | {"calls": "yes"}, "'calls'"),
    "unknown field": (IDS | {"temprature": 0.5}, "'temprature'"),
    "temperature negative": (IDS | {"temperature": -0.1}, "'temperature'"),
    "temperature text": (IDS | {"temperature": "0.5"}, "'temperature'"),
    "nucleus of nothing": (IDS | {"top_p": 0}, "'top_p'"),
    "bias of no token": (IDS | {"logit_bias": {"200": 1}}, "'logit_bias' has the token id 200"),
    "bias of text": (IDS | {"logit_bias": {"w1": 1}}, "'logit_bias.w1"),
    "bias too large": (IDS | {"logit_bias": {"1": 101}}, "'logit_bias.1'"),
    "stop empty": (IDS | {"stop": [""]}, "'stop.0'"),
    "answers none": (IDS | {"n": 0}, "'n'"),
    "nothing": ({}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
    "two prompts": (IDS | {"prompt": "w1"}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
    "text and messages": (MESSAGES | {"prompt": "w1"}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
    "prompt a list": ({"prompt": ["w1"]}, "'prompt'"),
    "prompt a number": ({"prompt": 7}, "'prompt'"),
    "messages an object": ({"messages": {"role": "user", "content": "w1"}}, "'messages'"),
    "messages empty": ({"messages": []}, "'messages' that are empty"),
    "message a text": ({"messages": ["w1"]}, "'messages.0'"),
    "tools alone": ({"prompt": "w1", "tools": []}, "'tools' without 'messages'"),
    "refused by the template": ({"messages": [{"role": "system", "content": "w1"}]}, "refuses the prompt: No system role."),
}


@pytest.mark.sweep
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_request_is_400_streamed_or_not(case: str, streamed: bool, made: ByHand) -> None:
    request, message = WRONG[case]
    before = invocations()
    answer = httpx.post(f"{main_url()}/invocations", json=request | {"stream": streamed}, trust_env=False, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["kind"]) == (400, "Usage"), error
    assert message in error["message"] and error["hint"]
    assert invocations() == before


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'"w1"', b"{", b'{"prompt": "caf\xe9"}', b'{"prompt": "\\ud83d"}', b'{"prompt": "w1", "stream": 1}', b"\xff\xfe"],
)
def test_bodies_that_are_no_request_are_400(body: bytes, made: ByHand) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{main_url()}/invocations", content=body, headers=headers, trust_env=False, timeout=60)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (400, "Usage")


def test_the_client_raises_what_the_server_refuses(made: ByHand) -> None:
    """Also where the answer would have been streamed; and text with characters that other programs end lines at comes whole."""
    with pytest.raises(UsageError, match="exceed the model's 512 positions"):
        client.answer(HERE.main_address("d"), PROMPT, 1000, lambda text: None)
    assert client.answer(HERE.main_address("d"), "w1\u2028w2\x85w3", 2, lambda text: None)["prompt_token_ids"]


def post_raw(url: str, document: dict[str, Any]) -> socket.socket:
    """Send a request, and return the connection without reading the answer."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = json.dumps(document).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((host.strip("[]"), int(port)))
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_when_its_client_has_gone(streamed: bool, made: ByHand) -> None:
    """Counted in calls of expert functions, of which each pass has one."""
    before = invocations()
    with post_raw(main_url(), IDS | {"max_new_tokens": LONG, "stream": streamed}):
        while invocations() < before + 3:
            pass
    answer = client.answer(HERE.main_address("d"), PROMPT, 16, lambda text: None)  # its turn comes when the other has ended
    assert answer["token_ids"] == made.tokens()
    assert invocations() - before < LONG


class HeldSequence:
    """Goes on until its engine releases it, or until it is stopped."""

    error = None

    def __init__(self, ids: Any, stopped: Callable[[], object]) -> None:
        self.ids, self.stopped = tuple(ids), stopped

    def generated(self) -> Generated:
        return Generated(self.ids, (7,), "text", "stop", (0.5,), ())


class Held:
    """An engine and its batch, whose answers go on until they are released or stopped; `asked` has the prompts that were begun."""

    device, batches = Device(kind="cpu", name="a CPU", memory_bytes=1), True

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.begun, self.released = threading.Event(), threading.Event()
        self.sequences: list[HeldSequence] = []

    def refuse(self, ids: Any, new: int) -> None:
        pass

    def sequence(self, ids: Any, new: int, on_piece: Any, stopped: Callable[[], object], sampling: Any, speculate: Any) -> HeldSequence:
        return HeldSequence(ids, stopped)

    def batch(self) -> Held:
        return self

    def add(self, sequence: HeldSequence) -> None:
        self.asked.append(sequence.ids)
        self.sequences.append(sequence)
        self.begun.set()

    def step(self) -> list[HeldSequence]:
        released = self.released.wait(0.001)
        ended = [each for each in self.sequences if released or each.stopped()]
        self.sequences = [each for each in self.sequences if each not in ended]
        return ended


def serving(
    engine: Held,
    host: str = "127.0.0.1",
    limits: Limits = Limits(),  # noqa: B008
    concurrency: int = 1,
) -> AbstractContextManager[str]:
    fields = {
        "prices": PRICES,
        "refuse_unserved": lambda *_: None,
        "model": ModelRef(path="m", revision="r"),
        "concurrency": concurrency,
        "speculate": "off",
    }
    config: Any = type("Config", (), fields)
    return api_server.serving(MainFunction(config, engine), limits, host)  # type: ignore[arg-type]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_queued_request_whose_client_has_gone_is_never_begun(streamed: bool) -> None:
    engine = Held()
    with serving(engine) as url, httpx.Client(trust_env=False, timeout=60) as http, ThreadPoolExecutor(1) as other:
        first = other.submit(http.post, f"{url}/invocations", json={"prompt_token_ids": [1]})
        assert engine.begun.wait(30)
        with post_raw(url, {"prompt_token_ids": [2], "stream": streamed}):
            assert httpx.get(f"{url}/ping", trust_env=False).is_success  # so the request before it has been read
        assert httpx.get(f"{url}/ping", trust_env=False).is_success  # and so has the end of its connection
        engine.released.set()
        assert first.result().json()["text"] == "text"
        assert http.post(f"{url}/invocations", json={"prompt_token_ids": [3]}).json()["text"] == "text"
    assert engine.asked == [(1,), (3,)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_full_queue_is_429_which_says_when_to_ask_again(streamed: bool) -> None:
    engine = Held()
    with serving(engine, limits=Limits(requests=2)) as url, ThreadPoolExecutor(2) as others:

        def post(token: int) -> httpx.Response:
            request = {"prompt_token_ids": [token], "stream": streamed}
            return httpx.post(f"{url}/invocations", json=request, trust_env=False, timeout=60)

        asked = [others.submit(post, 1)]
        assert engine.begun.wait(30)
        asked.append(others.submit(post, 2))
        while 'vllm:num_requests_waiting{model_name="m"} 1.0' not in httpx.get(f"{url}/metrics", trust_env=False).text:
            time.sleep(0.01)
        refused = post(3)
        assert (refused.status_code, refused.headers["retry-after"], refused.json()["error"]["kind"]) == (429, "1", "Deploy")
        engine.released.set()
        assert [each.result().status_code for each in asked] == [200, 200]
        assert post(4).status_code == 200
        assert "remoe_requests_refused_total 1.0" in httpx.get(f"{url}/metrics", trust_env=False).text
    assert engine.asked == [(1,), (2,), (4,)]


def test_as_many_requests_are_answered_at_once_as_the_plan_counts_on() -> None:
    """The others wait, in the order in which they came, and the figures for dashboards say so."""
    engine = Held()
    with serving(engine, concurrency=2) as url, ThreadPoolExecutor(4) as others:

        def post(token: int) -> int:
            request = {"prompt_token_ids": [token]}
            return httpx.post(f"{url}/invocations", json=request, trust_env=False, timeout=60).status_code

        asked = []
        for token in range(4):
            asked.append(others.submit(post, token))
            at_once, waiting = min(2, token + 1), max(0, token - 1)
            figures = [f'num_requests_{name}{{model_name="m"}} {n}.0' for name, n in (("running", at_once), ("waiting", waiting))]
            give_up = time.monotonic() + 30
            while not all(figure in httpx.get(f"{url}/metrics", trust_env=False).text for figure in figures):
                assert time.monotonic() < give_up, figures
        assert engine.asked == [(0,), (1,)]
        engine.released.set()
        assert [each.result() for each in asked] == [200] * 4
        assert 'num_requests_running{model_name="m"} 0.0' in httpx.get(f"{url}/metrics", trust_env=False).text
    assert engine.asked == [(0,), (1,), (2,), (3,)]


def test_a_fault_in_a_step_is_told_to_everybody_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step = Held(), Held.step

    def broken(self: Held) -> list[HeldSequence]:
        monkeypatch.setattr(Held, "step", step)
        self.sequences.clear()
        raise KeyError("a fault")

    monkeypatch.setattr(Held, "step", broken)
    engine.released.set()
    with serving(engine, concurrency=2) as url, httpx.Client(trust_env=False, timeout=60) as http:
        assert http.post(f"{url}/invocations", json={"prompt_token_ids": [1]}).status_code == 500
        assert http.post(f"{url}/invocations", json={"prompt_token_ids": [2]}).status_code == 200


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *(pytest.param(host, marks=needs_ipv6) for host in ("::1", "[::1]", "::"))])
def test_hosts_are_ipv4_ipv6_and_names(host: str) -> None:
    engine = Held()
    engine.released.set()
    with serving(engine, host) as url:
        reached = url.replace("[::]", "127.0.0.1" if socket.has_dualstack_ipv6() else "[::1]")

        assert httpx.get(f"{reached}/ping", trust_env=False).json() == {"status": "ready", "device": Held.device.model_dump()}
        assert ("[" in url) == (":" in host)


@needs_ipv6
def test_an_address_that_cannot_be_had_is_named() -> None:
    with (
        address.listen("::1", 0) as taken,
        pytest.raises(server.DeployError, match=r"cannot listen on \[::1\]:\d+: Address already in use"),
    ):
        server.listen("::1", taken.getsockname()[1])
    with pytest.raises(server.DeployError, match=r"cannot listen on no\.such\.host\.invalid:\d+: "):
        server.listen("no.such.host.invalid", 8080)


def test_the_printed_url_has_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from remoe_cli.deploy.serve_here import serve_here

    said: list[str] = []

    def stub(load: object, listener: Any, door: object, token: object, ready: Callable[[Any], None]) -> None:
        listener.close()
        assert not any("Serving" in line for line in said)
        device = SimpleNamespace(kind="cpu", name="that one")
        ready(SimpleNamespace(engine=SimpleNamespace(device=device), loading_billed="", name="m"))

    monkeypatch.setattr(server, "serve", stub)
    with address.listen("::1", 0) as free:
        port = free.getsockname()[1]
    console, book = replace(SILENT, say=said.append), Book(tmp_path / "receipts")
    serve_here("d", tmp_path / "server.json", lambda connections, timeout_s: None, "::1", port, console, book=book)
    assert said[0].startswith(f"Starting 'd' on http://[::1]:{port};") and said[1].startswith("The model is loaded, on the CPU that one.")
    assert said[2] == f"Serving 'd' on http://[::1]:{port} to your own processes, as the model 'm'. Ctrl-C ends it."


def test_what_loading_was_billed_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program of its own logs it; 'remoe serve' says it, and with --quiet nobody does."""
    spent = SimpleNamespace(loading=SimpleNamespace(billed_ms=3, invocations=1, usd=1.2e-6))
    assert str(MainFunction.loading_billed.fget(SimpleNamespace(spent=spent))).endswith(" $0.0000012 in all.")  # type: ignore[attr-defined]
    main: Any = type("Main", (), {"loading_billed": "Billed 3 ms."})()
    monkeypatch.setattr(http_server.Server, "run", lambda self, sockets: time.sleep(0.1))
    told: list[Any] = []
    server.serve(lambda: main, address.listen("127.0.0.1", 0), Door(None), ready=told.append)
    assert capsys.readouterr().err == "" and told == [main]
    monkeypatch.setattr(server, "serve", lambda load, *rest: load())
    monkeypatch.setattr(server.os, "_exit", lambda code: None)
    with address.listen("127.0.0.1", 0) as listener:
        server.run(lambda: main, listener, Door(None))
    assert capsys.readouterr().err == "Billed 3 ms.\n"
