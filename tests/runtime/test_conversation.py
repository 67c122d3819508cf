"""A conversation on its way: from the client's request to the tokens that the engine is given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Conversation
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.runtime import client, main_function
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.main_function import MainFunction, parse
from remoe_cli.runtime.receipt import Prices

TALK = Conversation(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}), ({"name": "add"},))
PRICES = Prices(
    catalog="by hand",
    main=MainPrices(rented=False, usd_per_s=0.04, usd_per_request=0.0, usd_per_read=0.0),
    function=FunctionPrices(
        usd_per_gb_second=0.1, usd_per_storage_gb_second=0.0, storage_free_mb=0.0, usd_per_call=0.001, usd_per_read=0.0
    ),
)


class Engine:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def prompt_ids(self, prompt: Any) -> list[int]:
        self.asked.append(prompt)
        return [1, 2, 3]

    device = None

    def sequence(self, ids: Any, *_: Any) -> Any:
        return ids

    def run(self, ids: Any) -> Generated:
        return Generated(tuple(ids), (7,), "text", "stop", (0.5,), ())


@pytest.mark.parametrize("prompt", ["Why?", TALK, Conversation(TALK.messages)])
def test_what_the_client_asks_is_what_the_engine_is_given(prompt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    config = type("Config", (), {"prices": PRICES, "refuse_unserved": lambda *_: None, "speculate": "off"})
    main = MainFunction(config, engine)  # type: ignore[arg-type]

    def answered(endpoint: client.Endpoint, request: dict[str, Any]) -> Any:
        yield {"answer": main.answer(parse(json.dumps(request).encode())).model_dump(mode="json")}

    monkeypatch.setattr(client, "_events", answered)
    assert client.answer(client.Http("http://nowhere"), prompt, 8, lambda text: None)["prompt_token_ids"] == [1, 2, 3]
    assert engine.asked == [prompt]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
        ({"messages": [{"role": "user", "content": "b"}], "prompt_token_ids": [1]}, "either 'prompt' or 'prompt_token_ids', or 'messages'"),
        ({"messages": "Why?"}, "The request is wrong at 'messages'"),
        ({"messages": [{"role": "nobody", "content": "b"}]}, "The request: message 1 has the role 'nobody'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "The request: message 1 has content of type 'image_url'"),
    ],
)
def test_requests_that_ask_nothing_or_twice(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        main_function.parse(request_)
    assert message in caught.value.message
    assert caught.value.hint
