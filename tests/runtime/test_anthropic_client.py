"""Anthropic's own client, unchanged, against a main server of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.runtime.test_openai_client import CHAT, MODEL, generated, words
from tests.support.api_server import serving, whole_model
from tests.support.by_hand import PROMPT, ByHand, by_hand

USER: Any = [{"role": "user", "content": PROMPT}]
# The client has left out sampling parameters; other clients of this API send them.
GREEDY: Any = {"model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    return by_hand(tmp_path_factory.mktemp("made"), (), {"chat_template.jinja": CHAT})


@pytest.fixture(scope="module")
def client(made: ByHand) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with (
        serving(whole_model(Path(made.profile.record.model.path))) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client


def test_greedy_answers_are_those_of_transformers_whole_and_streamed(client: anthropic.Anthropic, made: ByHand) -> None:
    answer = client.messages.create(messages=USER, **GREEDY)
    expected = words(made.tokens())
    assert [block.text for block in answer.content if block.type == "text"] == [expected]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("max_tokens", 20, 16)
    assert answer.usage.model_extra and answer.usage.model_extra["remoe"]["cost"]["total_usd"] > 0
    with client.messages.stream(messages=USER, **GREEDY) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("max_tokens", 20, 16)


def test_stop_sequences_systems_and_counts(client: anthropic.Anthropic, made: ByHand) -> None:
    whole = words(made.tokens())
    stop = whole[4:9]
    answer = client.messages.create(messages=USER, stop_sequences=[stop], **GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert [block.text for block in answer.content if block.type == "text"] == [whole[: whole.index(stop)]]
    system: Any = [{"type": "text", "text": "w1 w2"}]
    counted = client.messages.count_tokens(model=MODEL, messages=[*USER, {"role": "assistant", "content": "w3"}], system=system)
    assert counted.input_tokens == 23
    assert client.messages.create(messages=USER, system=system, **GREEDY).usage.input_tokens == 22


def test_a_chat_of_three_turns(client: anthropic.Anthropic) -> None:
    messages: list[Any] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"w{turn + 1}"})
        answer = client.messages.create(messages=messages, **GREEDY | {"max_tokens": 4})
        assert answer.usage.input_tokens == 1 + 5 * turn
        messages.append({"role": answer.role, "content": answer.content})  # the client's own objects, as people do


def test_an_abandoned_stream_ends_at_the_next_token(client: anthropic.Anthropic) -> None:
    before = generated(str(client.base_url))
    with client.messages.create(messages=USER, stream=True, **GREEDY | {"max_tokens": 490}) as stream:
        for _ in range(4):
            next(stream)
    while generated(str(client.base_url)) == before:
        time.sleep(0.02)
    assert 1 <= generated(str(client.base_url)) - before < 490


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"max_tokens": 0}, "max_tokens"),
    "temperature": ({"extra_body": {"temperature": 2}}, "temperature"),
    "tools": ({"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools"),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]}, "messages"),
    "prefill": ({"messages": [*USER, {"role": "assistant", "content": "w3"}]}, "ends with the assistant"),
    "cache": ({"system": [{"type": "text", "text": "w1", "cache_control": {"type": "ephemeral"}}]}, "cache_control"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_or_not_supported_is_named(client: anthropic.Anthropic, case: str, streamed: bool) -> None:
    more, param = WRONG[case]
    with pytest.raises(anthropic.BadRequestError, match=param) as caught:
        client.messages.create(**GREEDY | {"messages": USER, "stream": streamed} | more)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_other_errors_are_the_clients_own_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**GREEDY | {"messages": USER, "model": "other"})
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="other", messages=USER)
    with pytest.raises(anthropic.BadRequestError, match="exceed the model's 512 positions"):
        client.messages.create(**GREEDY | {"messages": USER, "max_tokens": 600})
