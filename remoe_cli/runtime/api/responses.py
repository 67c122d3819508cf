"""OpenAI's responses: POST /v1/responses. Nothing is stored, so there is none to get or to go on from.

Source: OpenAI's API reference, "Create a model response", "Streaming events".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.api import openai_form
from remoe_cli.runtime.api.common import (
    Api,
    Asked,
    Body,
    Event,
    check_messages,
    check_model,
    fault_of,
    read,
    request,
    sampled,
    sse,
    usage_receipt,
)
from remoe_cli.runtime.main_function import Answer, MainFunction

_INCOMPLETE = {"length": "max_output_tokens", "time-limit": "max_output_tokens"}


class _Format(Body):
    type: Literal["text"]


class _TextOptions(Body):
    format: _Format | None = None


class ResponsesBody(Body):
    """The parameters that are supported; of those with one value, no other one is."""

    model: str
    input: str | Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    text: _TextOptions | None = None
    tools: tuple[()] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    include: tuple[()] | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=0)
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


def _messages(body: ResponsesBody) -> tuple[dict[str, Any], ...]:
    """Make messages of the input: a text, or messages as they came or as earlier answers had them."""
    system = ({"role": "system", "content": body.instructions},) if body.instructions else ()
    if isinstance(body.input, str):
        return (*system, {"role": "user", "content": body.input})
    # An item of an earlier answer has an id and a status, which say nothing to a model.
    items = [{key: value for key, value in item.items() if key not in ("id", "status", "phase")} for item in body.input]
    messages = tuple({k: v for k, v in item.items() if (k, v) != ("type", "message")} for item in items)
    check_messages(messages, "input")
    return (*system, *messages)


def _parse(body: bytes, main: MainFunction) -> Asked:
    asked = read(ResponsesBody, body)
    check_model(asked.model, main)
    fields = sampled(asked, main) | {
        "messages": _messages(asked),
        "max_new_tokens": asked.max_output_tokens,
        "stream": bool(asked.stream),
    }
    return Asked(request(fields, {"max_new_tokens": "max_output_tokens", "messages": "input"}), asked, main.name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(asked: Asked, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{asked.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _response(asked: Asked, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    sampling = asked.request
    return {
        "id": f"resp_{asked.id}",
        "object": "response",
        "created_at": asked.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.body.instructions,
        "max_output_tokens": asked.body.max_output_tokens,
        "metadata": {},
        "model": asked.model,
        "output": output,
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    why = _INCOMPLETE.get(answer.finish_reason)
    status = "incomplete" if why else "completed"
    prompt, generated = answer.receipt.prompt_tokens, answer.receipt.generated_tokens
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
        "remoe": usage_receipt(answer),
    }
    details = {"incomplete_details": {"reason": why}} if why else {}
    return _response(asked, status, [_item(asked, status, [_part(answer.text)])]) | {"usage": usage} | details


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    number = -1

    def event_of(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    at = {"item_id": f"msg_{asked.id}", "output_index": 0, "content_index": 0}
    begun = False
    async for event in events:
        if not begun and not isinstance(event, Exception):
            begun = True
            yield event_of("response.created", response=_response(asked, "in_progress", []))
            yield event_of("response.in_progress", response=_response(asked, "in_progress", []))
            yield event_of("response.output_item.added", output_index=0, item=_item(asked, "in_progress", []))
            yield event_of("response.content_part.added", **at, part=_part(""))
        match event:
            case Piece():
                yield event_of("response.output_text.delta", **at, delta=event.text, logprobs=[])
            case Answer():
                whole = _whole(asked, event)
                yield event_of("response.output_text.done", **at, text=event.text, logprobs=[])
                yield event_of("response.content_part.done", **at, part=_part(event.text))
                yield event_of("response.output_item.done", output_index=0, item=whole["output"][0])
                yield event_of(f"response.{whole['status']}", response=whole)
            case _:
                error = openai_form.error(fault_of(event))["error"]
                yield event_of("error", code=error["code"], message=error["message"], param=error["param"])


RESPONSES = Api("text/event-stream", _parse, _whole, _stream, openai_form.error)
