"""The server's OpenAPI document: it has every path, and requests that are drawn from it are no fault of the server."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from remoe_cli.runtime.api.document import document
from remoe_cli.runtime.app import make_app
from tests.runtime.schema_requests import LIMITS, ask
from tests.support.api_server import serving, whole_model
from tests.support.chatml import save_chatml


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(whole_model(save_chatml(tmp_path_factory.mktemp("chatml") / "model")), LIMITS) as url:
        yield url


def test_every_path_is_in_the_document() -> None:
    with ThreadPoolExecutor(1) as pool:
        app = make_app(Future(), pool, threading.Event(), LIMITS)
    served = {(method.lower(), re.sub(":path", "", route.path)) for route in app.routes for method in getattr(route, "methods", ())}
    described = {(method, path) for path, methods in document()["paths"].items() for method in methods}
    assert described <= served
    left_out = {path for method, path in served - described if method != "head"}
    # SageMaker's prefix, and responses, of which none is kept.
    assert all(path.startswith("/openai/") or path.startswith("/v1/responses/{name}") for path in left_out), left_out


def test_bodies_have_the_parameters_that_are_supported(url: str) -> None:
    served = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    assert served == document()
    schemas = served["components"]["schemas"]
    assert {"messages", "tools", "tool_choice", "response_format", "seed", "n"} <= schemas["ChatBody"]["properties"].keys()
    assert schemas["MessagesBody"]["additionalProperties"] is False and "max_tokens" in schemas["MessagesBody"]["required"]


@pytest.mark.filterwarnings("ignore")
def test_no_drawn_request_is_a_fault_of_the_server(url: str) -> None:
    """`python -m tests.runtime.schema_requests 1000` draws more."""
    seen = ask(url, examples=2, seed=1)
    assert {operation for operation, _ in seen} >= {f"POST {path}" for path, methods in document()["paths"].items() if "post" in methods}
    assert {status for _, status in seen} >= {200, 400}
