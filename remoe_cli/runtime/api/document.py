"""The OpenAPI document of a main server, at GET /openapi.json: its paths, and the bodies they take.

Bodies are those that requests are read with, so the document says what is supported and nothing else.

Source: OpenAPI Specification 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import remoe_cli
from remoe_cli.runtime.api.chat import ChatBody
from remoe_cli.runtime.api.completions import CompletionBody
from remoe_cli.runtime.api.messages import CountBody, MessagesBody
from remoe_cli.runtime.api.responses import ResponsesBody
from remoe_cli.runtime.api.routes import INVOCATIONS
from remoe_cli.runtime.main_function import Request

# Each path's body, its summary, and whether it can be streamed.
POSTS: Mapping[str, tuple[Sequence[type[BaseModel]], str, bool]] = {
    "/v1/chat/completions": ((ChatBody,), "OpenAI: create a chat completion", True),
    "/v1/completions": ((CompletionBody,), "OpenAI: create a completion", True),
    "/v1/responses": ((ResponsesBody,), "OpenAI: create a response", True),
    "/v1/messages": ((MessagesBody,), "Anthropic: create a message", True),
    "/v1/messages/count_tokens": ((CountBody,), "Anthropic: count the tokens of a message", False),
    INVOCATIONS: (
        (Request, ChatBody, CompletionBody, ResponsesBody, MessagesBody),
        "A request of any API, which its fields tell; remoe's own names no model",
        True,
    ),
}
GETS: Mapping[str, str] = {
    "/ping": "Whether the model is loaded",
    "/health": "Whether the model is loaded",
    "/ready": "Whether the model is loaded",
    "/metrics": "Metrics for Prometheus",
    "/main": "What the process holds in memory",
    "/v1/models": "OpenAI: list models",
    "/v1/models/{name}": "OpenAI: retrieve a model",
    "/openapi.json": "This document",
}
_JSON = {"application/json": {"schema": {"type": "object"}}}
_ERRORS = {
    "4XX": {"description": "The request is refused; the error names the parameter.", "content": _JSON},
    "5XX": {"description": "The request has failed, or the model is loading.", "content": _JSON},
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def document() -> dict[str, Any]:
    """Make the document."""
    models = {model for bodies, _, _ in POSTS.values() for model in bodies}
    inputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, "validation") for model in sorted(models, key=lambda each: each.__name__)
    ]
    references, definitions = models_json_schema(inputs, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {path: {"get": _get(path, summary)} for path, summary in GETS.items()}
    for path, (bodies, summary, streamed) in POSTS.items():
        schemas = [references[model, "validation"] for model in bodies]
        paths[path] = {"post": _post(path, schemas[0] if len(schemas) == 1 else {"anyOf": schemas}, summary, streamed)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "remoe", "version": remoe_cli.__version__, "summary": "A mixture-of-experts model that is served"},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"token": []}, {"key": []}],  # no token where the server asks for none
    }


def _get(path: str, summary: str) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}} if path == "/metrics" else _JSON
    parameters = {"parameters": [_NAME]} if "{name}" in path else {}
    responses = {"200": {"description": summary, "content": content}, **_ERRORS}
    return {"summary": summary, "operationId": _operation("get", path), **parameters, "responses": responses}


def _post(path: str, schema: Mapping[str, Any], summary: str, streamed: bool) -> dict[str, Any]:
    streams = {"text/event-stream": {"schema": {"type": "string"}}} if streamed else {}
    streams |= {"application/x-ndjson": {"schema": {"type": "string"}}} if path == INVOCATIONS else {}
    return {
        "summary": summary,
        "operationId": _operation("post", path),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer, whole or streamed", "content": _JSON | streams}, **_ERRORS},
    }


def _operation(method: str, path: str) -> str:
    return "_".join([method, *(part.strip("{}").replace(".", "_") for part in path.split("/") if part)])
