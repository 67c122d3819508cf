"""Anthropic's messages: POST /v1/messages and /v1/messages/count_tokens.

Source: Anthropic's API reference, "Create a Message", "Count tokens in a Message", "Streaming Messages", "Errors".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.api.common import (
    Api,
    Asked,
    Body,
    Event,
    Fault,
    Refusal,
    Texts,
    check_model,
    fault_of,
    read,
    request,
    sampled,
    sse,
    usage_receipt,
)
from remoe_cli.runtime.main_function import Answer, MainFunction, Request

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# A time limit ends an answer early as a length does; `usage.remoe.finish_reasons` tells them apart.
_STOP = {"stop": "end_turn", "length": "max_tokens", "time-limit": "max_tokens"}


class _Text(Body):
    type: Literal["text"]
    text: str
    citations: None = None


class _Message(Body):
    role: Literal["user", "assistant"]
    content: str | tuple[_Text, ...]


class _Metadata(Body):
    user_id: str | None = None


class _Thinking(Body):
    type: Literal["disabled"]


class CountBody(Body):
    """What a prompt is made of."""

    model: str
    messages: tuple[_Message, ...] = Field(min_length=1)
    system: str | tuple[_Text, ...] | None = None
    tools: tuple[()] | None = None
    thinking: _Thinking | None = None


class MessagesBody(CountBody):
    """The parameters that are supported; of those with one value, no other one is."""

    max_tokens: int = Field(ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Texts | None = None
    stream: bool | None = None
    metadata: _Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    anthropic_version: str | None = None  # in the body where a cloud's own API carries it; here a header does


def _content(content: str | tuple[_Text, ...]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _messages(body: CountBody) -> tuple[dict[str, Any], ...]:
    system = ({"role": "system", "content": _content(body.system)},) if body.system else ()
    return (*system, *({"role": message.role, "content": _content(message.content)} for message in body.messages))


def _parse(body: bytes, main: MainFunction) -> Asked:
    asked = read(MessagesBody, body)
    check_model(asked.model, main)
    if asked.messages[-1].role == "assistant":
        raise Refusal(
            "The parameter 'messages' ends with the assistant: going on with a text that is given is not supported.",
            "End with a message of the user.",
            param="messages",
        )
    fields = sampled(asked, main) | {
        "messages": _messages(asked),
        "max_new_tokens": asked.max_tokens,
        "stop": asked.stop_sequences or (),
        "stream": bool(asked.stream),
    }
    return Asked(request(fields, {"max_new_tokens": "max_tokens", "stop": "stop_sequences"}), asked, main.name)


def count_request(body: bytes, main: MainFunction) -> Request:
    """Read what is to be counted."""
    asked = read(CountBody, body)
    check_model(asked.model, main)
    return request({"messages": _messages(asked)})


def _stop(answer: Answer) -> dict[str, Any]:
    reason = "stop_sequence" if answer.stop_string else _STOP[answer.finish_reason]
    return {"stop_reason": reason, "stop_sequence": answer.stop_string}


def _message(asked: Asked, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{asked.id}", "type": "message", "role": "assistant", "model": asked.model, "content": content}


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    tokens = {"input_tokens": answer.receipt.prompt_tokens, "output_tokens": answer.receipt.generated_tokens}
    return _message(asked, [{"type": "text", "text": answer.text}]) | _stop(answer) | {"usage": tokens | {"remoe": usage_receipt(answer)}}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    def event_of(kind: str, **fields: Any) -> str:
        return sse({"type": kind, **fields}, kind)

    begun = False
    async for event in events:
        if not begun and not isinstance(event, Exception):
            begun = True
            # The prompt's tokens are known at the end, with the receipt: message_delta has both.
            empty = {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
            yield event_of("message_start", message=_message(asked, []) | empty)
            yield event_of("content_block_start", index=0, content_block={"type": "text", "text": ""})
        match event:
            case Piece():
                yield event_of("content_block_delta", index=0, delta={"type": "text_delta", "text": event.text})
            case Answer():
                yield event_of("content_block_stop", index=0)
                yield event_of("message_delta", delta=_stop(event), usage=_whole(asked, event)["usage"])
                yield event_of("message_stop")
            case _:
                yield sse(_error(fault_of(event)), "error")


def _error(fault: Fault) -> dict[str, Any]:
    kind = _TYPES.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": fault.message, **fault.receipt}, "request_id": None}


MESSAGES = Api("text/event-stream", _parse, _whole, _stream, _error)
