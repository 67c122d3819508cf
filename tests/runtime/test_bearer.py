"""A token: who has it is answered, and everybody else gets each API's own error."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime.bearer import with_token
from remoe_cli.runtime.main_function import MainFunction
from tests.support.api_server import serving

TOKEN = "s3cret-of-mine"


def _app() -> Starlette:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": []})

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"x-api-key": TOKEN}, 200),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"x-api-key": ""}, 401),
        ({"Authorization": "Basic s3cret-of-mine"}, 401),
    ],
)
def test_only_the_token_opens(headers: dict[str, str], status: int) -> None:
    http = TestClient(with_token(_app(), TOKEN))
    for path in ("/v1/models", "/invocations", "/metrics", "/main", "/ping/", "/v1/messages"):
        answer = http.get(path, headers=headers)
        assert answer.status_code == status, path
        assert TOKEN not in answer.text and (status == 200 or answer.headers["www-authenticate"] == "Bearer")
    for path in ("/ping", "/health", "/ready"):
        assert http.get(path, headers=headers).status_code == 200
    assert TestClient(with_token(_app(), None)).get("/main").status_code == 200


def test_the_clients_raise_their_own_class() -> None:
    config = type("Config", (), {"model": ModelRef(path="m", revision="r")})
    main = MainFunction(config, type("Engine", (), {"positions": 512}))  # type: ignore[arg-type]
    with serving(main, token=TOKEN) as url:
        for key in (TOKEN, "other"):
            http = httpx.Client(trust_env=False)
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, max_retries=0) as client:
                if key == TOKEN:
                    assert [model.id for model in client.models.list()] == ["m"]
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()
        others = anthropic.DefaultHttpxClient(trust_env=False)
        with (
            anthropic.Anthropic(base_url=url, api_key="other", http_client=others, max_retries=0) as client_,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client_.messages.create(model="m", messages=[{"role": "user", "content": "w1"}], max_tokens=1)
