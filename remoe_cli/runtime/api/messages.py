"""Anthropic's messages: POST /v1/messages and /v1/messages/count_tokens.

Source: Anthropic's API reference, "Create a Message", "Count tokens in a Message", "Streaming Messages", "Errors".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import CallPiece, Piece, ToolCall
from remoe_cli.runtime.api import tool_use
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
from remoe_cli.runtime.main_function import Answer, MainFunction

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


class _TextBlock(Body):
    type: Literal["text"]
    text: str
    citations: None = None


class _ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class _ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | tuple[_TextBlock, ...] | None = None
    is_error: bool | None = None


_Block = Annotated[_TextBlock | _ToolUseBlock | _ToolResultBlock, Field(discriminator="type")]


class _InputMessage(Body):
    role: Literal["user", "assistant"]
    content: str | tuple[_Block, ...]


class _MessagesTool(Body):
    type: Literal["custom"] | None = None
    name: tool_use.ToolName
    description: str | None = None
    input_schema: tool_use.Schema
    strict: bool | None = None


class _MessagesToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Metadata(Body):
    user_id: str | None = None


class _Thinking(Body):
    type: Literal["disabled"]


class CountBody(Body):
    """What a prompt is made of."""

    model: str
    messages: tuple[_InputMessage, ...] = Field(min_length=1)
    system: str | tuple[_TextBlock, ...] | None = None
    tools: tuple[_MessagesTool, ...] | None = Field(default=None, max_length=tool_use.TOOLS)
    tool_choice: _MessagesToolChoice | None = None
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


def _content(content: str | tuple[_TextBlock, ...]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _messages(body: CountBody) -> tuple[dict[str, Any], ...]:
    """Make messages as chat templates take them: a result of a tool is one of its own."""
    made: list[dict[str, Any]] = [{"role": "system", "content": _content(body.system)}] if body.system else []
    for at, message in enumerate(body.messages):
        blocks = (_TextBlock(type="text", text=message.content),) if isinstance(message.content, str) else message.content
        results = [block for block in blocks if isinstance(block, _ToolResultBlock)]
        uses = [block for block in blocks if isinstance(block, _ToolUseBlock)]
        texts = tuple(block for block in blocks if isinstance(block, _TextBlock))
        if (results and message.role != "user") or (uses and message.role != "assistant"):
            raise Refusal(f"The parameter 'messages.{at}' has calls or results of tools of the wrong role.", param=f"messages.{at}")
        made += [{"role": "tool", "tool_call_id": result.tool_use_id, "content": _result(result)} for result in results]
        calls = [tool_use.called(f"messages.{at}", use.id, use.name, use.input) for use in uses]
        if texts or calls or not results:
            made.append({"role": message.role, "content": _content(texts), **({"tool_calls": calls} if calls else {})})
    return tuple(made)


def _result(result: _ToolResultBlock) -> str:
    """Return what a tool gave; chat templates have no other place to say that it failed."""
    return ("Error: " if result.is_error else "") + _content(result.content or "")


def _tool_fields(body: CountBody, main: MainFunction) -> dict[str, Any]:
    made = [
        tool_use.tool(f"tools.{at}", each.name, each.description, each.input_schema, each.strict)
        for at, each in enumerate(body.tools or ())
    ]
    choice = body.tool_choice or _MessagesToolChoice(type="auto")
    if (choice.type == "tool") != (choice.name is not None):
        raise Refusal("The parameter 'tool_choice' has a name with the type 'tool', and with no other.", param="tool_choice")
    several = not choice.disable_parallel_tool_use
    return tool_use.fields(main, made, tool_use.Choice(choice.type == "any", choice.name, several, choice.type == "none"))


def _prompt_fields(body: CountBody, main: MainFunction) -> dict[str, Any]:
    messages = _messages(body)
    tool_use.check_history(main, messages)
    return {"messages": messages} | _tool_fields(body, main)


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
        **_prompt_fields(asked, main),
        "max_new_tokens": asked.max_tokens,
        "stop": asked.stop_sequences or (),
        "stream": bool(asked.stream),
        "user": asked.metadata and asked.metadata.user_id,
    }
    names = {"max_new_tokens": "max_tokens", "stop": "stop_sequences", "user": "metadata.user_id"}
    return Asked(request(fields, names), asked, main.name)


def count_tokens(body: bytes, main: MainFunction, own: dict[int, Any]) -> int:
    """Count the tokens of a prompt, with a tokenizer that is made at the first time and kept in `own`."""
    from remoe_cli.model.tokens import encode

    asked = read(CountBody, body)
    check_model(asked.model, main)
    prompt = request(_prompt_fields(asked, main)).asked()
    assert prompt is not None, "it has messages"
    if not own:
        own[0] = deepcopy(main.engine.tokenizer)
    return len(encode(own[0], prompt))


_EMPTY = {"type": "text", "text": ""}


def _stop(answer: Answer) -> dict[str, Any]:
    reason = "stop_sequence" if answer.stop_string else _STOP[answer.finish_reason]
    reason = "tool_use" if answer.tool_calls and reason == "end_turn" else reason
    return {"stop_reason": reason, "stop_sequence": answer.stop_string}


def _message(asked: Asked, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{asked.id}", "type": "message", "role": "assistant", "model": asked.model, "content": content}


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    tokens = {"input_tokens": answer.receipt.prompt_tokens, "output_tokens": answer.receipt.generated_tokens}
    text = [{"type": "text", "text": answer.text}] if answer.text or not answer.tool_calls else []
    uses = [_use(call) | {"input": _input(call)} for call in answer.tool_calls]
    return _message(asked, [*text, *uses]) | _stop(answer) | {"usage": tokens | {"remoe": usage_receipt(answer)}}


def _input(call: ToolCall) -> dict[str, Any]:
    """Return a call's arguments; those that are no JSON, or in which the answer ended, as Anthropic's guide wraps them."""
    return {"INVALID_JSON": call.arguments} if call.parsed is None else call.parsed


def _use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    def event_of(kind: str, **fields: Any) -> str:
        return sse({"type": kind, **fields}, kind)

    def delta(kind: str, **fields: Any) -> str:
        return event_of("content_block_delta", index=index, delta={"type": kind, **fields})

    begun, index, in_text = False, -1, False

    def block(content: dict[str, Any] | None) -> Iterator[str]:
        """End the text block that may be open, and begin another block; None begins none."""
        nonlocal index, in_text
        if in_text:
            yield event_of("content_block_stop", index=index)
        in_text = content is not None and content["type"] == "text"
        if content is not None:
            index += 1
            yield event_of("content_block_start", index=index, content_block=content)

    async for event in events:
        if not begun and not isinstance(event, Exception):
            begun = True
            # The prompt's tokens are known at the end, with the receipt: message_delta has both.
            empty = {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
            yield event_of("message_start", message=_message(asked, []) | empty)
        match event:
            case Piece(call=CallPiece() as piece):
                for line in block(_use(piece.call)) if piece.first else ():
                    yield line
                if piece.delta:
                    yield delta("input_json_delta", partial_json=piece.delta)
                if piece.last:
                    yield event_of("content_block_stop", index=index)
            case Piece():
                for line in () if in_text else block(_EMPTY):
                    yield line
                yield delta("text_delta", text=event.text)
            case Answer():
                for line in (*(() if index >= 0 else block(_EMPTY)), *block(None)):
                    yield line
                yield event_of("message_delta", delta=_stop(event), usage=_whole(asked, event)["usage"])
                yield event_of("message_stop")
            case _:
                yield sse(_error(fault_of(event)), "error")


def _error(fault: Fault) -> dict[str, Any]:
    kind = _TYPES.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": fault.message, **fault.receipt}, "request_id": None}


MESSAGES = Api("text/event-stream", _parse, _whole, _stream, _error)
