"""OpenAI's responses: POST /v1/responses. Nothing is stored, so there is none to get or to go on from.

Source: OpenAI's API reference, "Create a model response", "Streaming events".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import CallPiece, Piece, ToolCall
from remoe_cli.runtime.api import openai_form, tool_use
from remoe_cli.runtime.api.common import (
    Api,
    Asked,
    Body,
    Event,
    Refusal,
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


class _ResponsesSchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: tool_use.Schema = Field(alias="schema")
    strict: bool | None = None


class _TextOptions(Body):
    format: Annotated[tool_use.TextFormat | tool_use.ObjectFormat | _ResponsesSchemaFormat, Field(discriminator="type")] | None = None


class _ResponsesTool(Body):
    type: Literal["function"]
    name: tool_use.ToolName
    description: str | None = None
    parameters: tool_use.Schema | None = None
    strict: bool | None = None


class _ResponsesToolChoice(Body):
    type: Literal["function"]
    name: str


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
    tools: tuple[_ResponsesTool, ...] | None = Field(default=None, max_length=tool_use.TOOLS)
    tool_choice: Literal["none", "auto", "required"] | _ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: tuple[()] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(default=None, max_length=16)
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


def _messages(body: ResponsesBody) -> tuple[dict[str, Any], ...]:
    """Make messages of the input: a text, or messages, calls and results as they came or as earlier answers had them."""
    system = ({"role": "system", "content": body.instructions},) if body.instructions else ()
    if isinstance(body.input, str):
        return (*system, {"role": "user", "content": body.input})
    messages: list[dict[str, Any]] = []
    for at, given in enumerate(body.input):
        # An item of an earlier answer has an id and a status, which say nothing to a model.
        item = {key: value for key, value in given.items() if key not in ("id", "status", "phase")}
        match item:
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments), **rest} if not rest:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                calls = messages[-1].get("tool_calls", [])
                messages[-1] = messages[-1] | {"tool_calls": [*calls, tool_use.called(f"input.{at}.arguments", call_id, name, arguments)]}
            case {"type": "function_call_output", "call_id": str(call_id), "output": str() | list() as output, **rest} if not rest:
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case {"type": "function_call" | "function_call_output"}:
                raise Refusal(f"The parameter 'input.{at}' is wrong: it has no call_id, or other fields.", param=f"input.{at}")
            case _:
                messages.append({k: v for k, v in item.items() if (k, v) != ("type", "message")})
                messages[-1].setdefault("role", None)
    check_messages(messages, "input")
    return (*system, *messages)


def _tool_fields(body: ResponsesBody, main: MainFunction) -> dict[str, Any]:
    made = [
        tool_use.tool(f"tools.{at}", each.name, each.description, each.parameters, each.strict) for at, each in enumerate(body.tools or ())
    ]
    choice, several = body.tool_choice, body.parallel_tool_calls is not False
    named = choice.name if isinstance(choice, _ResponsesToolChoice) else None
    chosen = tool_use.Choice(choice == "required", named, several and named is None, choice == "none")
    match body.text.format if body.text else None:
        case _ResponsesSchemaFormat(schema_=schema):
            return tool_use.fields(main, made, chosen, schema, "text.format.schema")
        case tool_use.ObjectFormat():
            return tool_use.fields(main, made, chosen, {"type": "object"}, "text.format")
    return tool_use.fields(main, made, chosen)


def _parse(body: bytes, main: MainFunction) -> Asked:
    asked = read(ResponsesBody, body)
    check_model(asked.model, main)
    messages = _messages(asked)
    tool_use.check_history(main, messages, "input")
    fields = sampled(asked, main) | {
        "messages": messages,
        "max_new_tokens": asked.max_output_tokens,
        "stream": bool(asked.stream),
        **_tool_fields(asked, main),
    }
    return Asked(request(fields, {"max_new_tokens": "max_output_tokens", "messages": "input"}), asked, main.name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(asked: Asked, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{asked.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _call(call: ToolCall, *, begins: bool = False) -> dict[str, Any]:
    arguments = "" if begins else call.arguments
    status = "in_progress" if begins else "incomplete" if call.parsed is None else "completed"
    of = {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id}
    return {**of, "name": call.name, "arguments": arguments, "status": status}


def _response(asked: Asked, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    sampling, body = asked.request, asked.body
    shown = body.model_dump(mode="json", by_alias=True)
    return {
        "id": f"resp_{asked.id}",
        "object": "response",
        "created_at": asked.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": asked.model,
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": (shown["text"] or {}).get("format") or {"type": "text"}},
        "tool_choice": shown["tool_choice"] or "auto",
        "tools": shown["tools"] or [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    status = "incomplete" if answer.finish_reason in _INCOMPLETE else "completed"
    text = [_item(asked, status, [_part(answer.text)])] if answer.text or not answer.tool_calls else []
    return _finished(asked, answer, [*text, *(_call(call) for call in answer.tool_calls)])


def _finished(asked: Asked, answer: Answer, output: list[dict[str, Any]]) -> dict[str, Any]:
    why = _INCOMPLETE.get(answer.finish_reason)
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
    return _response(asked, "incomplete" if why else "completed", output) | {"usage": usage} | details


class _Stream:
    """The events of one stream: numbered, and about items that are numbered as they begin."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._number = asked, -1
        self._items: list[ToolCall | None] = []  # None is the message

    def event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number, **fields}, kind)

    def begin(self) -> Iterator[str]:
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=_response(self._asked, "in_progress", []))

    def text(self, text: str) -> Iterator[str]:
        if None not in self._items:
            self._items.append(None)
            yield self.event("response.output_item.added", output_index=len(self._items) - 1, item=_item(self._asked, "in_progress", []))
            yield self.event("response.content_part.added", **self._at, part=_part(""))
        if text:
            yield self.event("response.output_text.delta", **self._at, delta=text, logprobs=[])

    def call(self, piece: CallPiece) -> Iterator[str]:
        call = piece.call
        if piece.first:
            self._items.append(call)
        at = {"output_index": len(self._items) - 1}
        of = at | {"item_id": f"fc_{call.id}"}
        if piece.first:
            yield self.event("response.output_item.added", **at, item=_call(call, begins=True))
        if piece.delta:
            yield self.event("response.function_call_arguments.delta", **of, delta=piece.delta)
        if piece.last:
            self._items[-1] = call
            yield self.event("response.function_call_arguments.done", **of, name=call.name, arguments=call.arguments)
            yield self.event("response.output_item.done", **at, item=_call(call))

    def finish(self, answer: Answer) -> Iterator[str]:
        if not self._items:
            yield from self.text("")
        status = "incomplete" if answer.finish_reason in _INCOMPLETE else "completed"
        message = _item(self._asked, status, [_part(answer.text)])
        if None in self._items:
            yield self.event("response.output_text.done", **self._at, text=answer.text, logprobs=[])
            yield self.event("response.content_part.done", **self._at, part=_part(answer.text))
            yield self.event("response.output_item.done", output_index=self._items.index(None), item=message)
        output = [message if item is None else _call(item) for item in self._items]
        yield self.event(f"response.{status}", response=_finished(self._asked, answer, output))

    def error(self, error: Exception) -> str:
        of = openai_form.error(fault_of(error, "input"))["error"]
        return self.event("error", code=of["code"], message=of["message"], param=of["param"])

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._asked.id}", "output_index": self._items.index(None), "content_index": 0}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    stream, begun = _Stream(asked), False
    async for event in events:
        lines: list[str] = []
        if not begun and not isinstance(event, Exception):
            begun = True
            lines += stream.begin()
        match event:
            case Piece(call=CallPiece() as piece):
                lines += stream.call(piece)
            case Piece():
                lines += stream.text(event.text)
            case Answer():
                lines += stream.finish(event)
            case _:
                lines.append(stream.error(event))
        for line in lines:
            yield line


RESPONSES = Api("text/event-stream", _parse, _whole, _stream, openai_form.error, "input")
