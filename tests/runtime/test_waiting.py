"""Who waits: a stream in which nothing happens stays open, and counting tokens waits for no answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from remoe_cli.errors import DeployError
from remoe_cli.runtime import app, client
from remoe_cli.runtime.http_server import configured
from remoe_cli.runtime.main_function import MainFunction
from tests.support.api_server import serving, whole_model
from tests.support.chatml import save_chatml

USER: Any = [{"role": "user", "content": "One and two?"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(whole_model(save_chatml(tmp_path_factory.mktemp("chatml") / "model"))) as url:
        yield url


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Answers begin when it is set; comments come often."""
    may_begin, answering = threading.Event(), MainFunction.answering

    def waiting(self: MainFunction, *arguments: Any, **more: Any) -> Any:
        assert may_begin.wait(60)
        return (yield from answering(self, *arguments, **more))

    monkeypatch.setattr(MainFunction, "answering", waiting)
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.05)
    yield may_begin
    may_begin.set()


def test_a_stream_in_which_nothing_happens_stays_open(url: str, held: threading.Event) -> None:
    chat: Any = {"model": "", "messages": USER, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat, trust_env=False, timeout=60) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines) for _ in range(3)] == [": still here"] * 3
        held.set()
        rest = [line for line in lines if line != ": still here"]
        assert rest[0].startswith("data: {") and rest[-1] == "data: [DONE]"


def test_clients_read_over_it(url: str, held: threading.Event) -> None:
    with (
        ThreadPoolExecutor(2) as pool,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)) as of,
    ):
        ours = pool.submit(client.answer, client.Http(url), "Hi", 40, lambda text: None)
        theirs = pool.submit(lambda: list(of.chat.completions.create(model="", messages=USER, stream=True, temperature=0)))
        threading.Event().wait(0.3)  # some comments long
        assert not ours.done() and not theirs.done()
        held.set()
        assert ours.result()["text"].startswith("Let me add.")
        assert "".join(chunk.choices[0].delta.content or "" for chunk in theirs.result()).startswith("Let me add.")


def test_what_goes_wrong_after_a_stream_has_begun_is_in_it(url: str, held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **more: Any) -> Any:
        held.wait(60)
        raise DeployError("The GPU's memory is full.", "")
        yield

    monkeypatch.setattr(MainFunction, "answering", broken)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as of:
        stream = of.chat.completions.create(model="", messages=USER, stream=True)
        held.set()
        with pytest.raises(openai.APIError, match="memory is full"):
            list(stream)


def test_counting_waits_for_no_answer(url: str, held: threading.Event) -> None:
    chat: Any = {"model": "", "messages": USER, "max_tokens": 10}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/messages", json=chat, trust_env=False, timeout=60)
        for _ in range(2):
            counted = httpx.post(f"{url}/v1/messages/count_tokens", json={"model": "", "messages": USER}, trust_env=False, timeout=30)
            assert counted.json()["input_tokens"] > 10 and not answer.done()
        held.set()
        assert answer.result().json()["usage"]["input_tokens"] == counted.json()["input_tokens"]


def test_a_connection_that_waits_is_ended_by_its_client() -> None:
    """Where both end it after as long, one may be ended as its next request comes, which is then lost."""
    clients_s = (httpx.Limits().keepalive_expiry, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry)
    assert all(each is not None and configured(app).timeout_keep_alive > 2 * each for each in clients_s)
