"""OpenAI's chat completions: POST /v1/chat/completions.

Source: OpenAI's API reference, "Create chat completion"; vLLM's parameters top_k, min_p and repetition_penalty.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import CallPiece, Piece, TokenLogprob, ToolCall
from remoe_cli.runtime.api import openai_form, tool_use
from remoe_cli.runtime.api.common import (
    Api,
    Asked,
    Body,
    Event,
    Refusal,
    SampledBody,
    StreamOptions,
    check_messages,
    check_model,
    fault_of,
    read,
    request,
    sampled,
    sse,
)
from remoe_cli.runtime.main_function import Answer, Choice, MainFunction


class _ChatFunction(Body):
    name: tool_use.ToolName
    description: str | None = None
    parameters: tool_use.Schema | None = None
    strict: bool | None = None


class _ChatTool(Body):
    type: Literal["function"]
    function: _ChatFunction


class _ChatToolName(Body):
    name: str


class _ChatToolChoice(Body):
    type: Literal["function"]
    function: _ChatToolName


class _ChatSchema(Body):
    name: str
    description: str | None = None
    schema_: tool_use.Schema = Field(alias="schema")
    strict: bool | None = None


class _ChatSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: _ChatSchema


class ChatBody(SampledBody):
    """The parameters that are supported; of those with one value, no other one is."""

    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[tool_use.TextFormat | tool_use.ObjectFormat | _ChatSchemaFormat, Field(discriminator="type")] | None = None
    tools: tuple[_ChatTool, ...] | None = Field(default=None, max_length=tool_use.TOOLS)
    tool_choice: Literal["none", "auto", "required"] | _ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: tuple[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


def _parse(body: bytes, main: MainFunction) -> Asked:
    chat = read(ChatBody, body)
    check_model(chat.model, main)
    check_messages(chat.messages)
    tool_use.check_history(main, chat.messages)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise Refusal("The parameter 'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    openai_form.ends_with_usage(chat)  # refuses options without a stream
    lengths = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(lengths) > 1:
        raise Refusal("The parameters 'max_tokens' and 'max_completion_tokens' differ.", "Give one of them.", param="max_tokens")
    fields = sampled(chat, main) | {
        "messages": tuple(_with_calls(message, f"messages.{at}") for at, message in enumerate(chat.messages)),
        "max_new_tokens": next(iter(lengths), None),
        "logprobs": (chat.top_logprobs or 0) if chat.logprobs else None,
        "stream": bool(chat.stream),
        **_tool_fields(chat, main),
    }
    return Asked(request(fields, {"logprobs": "top_logprobs"}), chat, main.name)


def _with_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message whose calls of tools have their arguments as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    made = []
    for at, call in enumerate(calls if isinstance(calls, list) else [calls]):
        match call:
            case {"id": str(call_id), "type": "function", "function": {"name": str(name), "arguments": str(arguments)}}:
                made.append(tool_use.called(f"{where}.tool_calls.{at}.function.arguments", call_id, name, arguments))
            case _:
                place = f"{where}.tool_calls.{at}"
                raise Refusal(f"The parameter '{place}' is no call of a function with an id, a name and arguments.", param=place)
    return message | {"tool_calls": made}


def _tool_fields(chat: ChatBody, main: MainFunction) -> dict[str, Any]:
    made = [
        tool_use.tool(f"tools.{at}", each.function.name, each.function.description, each.function.parameters, each.function.strict)
        for at, each in enumerate(chat.tools or ())
    ]
    choice, several = chat.tool_choice, chat.parallel_tool_calls is not False
    named = choice.function.name if isinstance(choice, _ChatToolChoice) else None
    chosen = tool_use.Choice(choice == "required", named, several and named is None, choice == "none")
    match chat.response_format:
        case _ChatSchemaFormat(json_schema=asked):
            return tool_use.fields(main, made, chosen, asked.schema_, "response_format.json_schema.schema")
        case tool_use.ObjectFormat():
            return tool_use.fields(main, made, chosen, {"type": "object"}, "response_format")
    return tool_use.fields(main, made, chosen)


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        # The bytes of a token that is a part of a character are not known from its text.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [one(each.text, each.logprob) | {"top_logprobs": [one(text, p) for _, text, p in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": _message(choice),
            "logprobs": _logprobs(choice.logprobs) if asked.body.logprobs else None,
            "finish_reason": _finish(choice),
        }
        for index, choice in enumerate(answer.choices)
    ]
    return _document(asked, "chat.completion", choices) | {"usage": openai_form.usage(answer)}


def _message(choice: Choice) -> dict[str, Any]:
    calls = {"tool_calls": [_call(call) for call in choice.tool_calls]} if choice.tool_calls else {}
    return {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None, **calls}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish(choice: Choice) -> str:
    reason = openai_form.FINISH[choice.finish_reason]
    return "tool_calls" if choice.tool_calls and reason == "stop" else reason


def _document(asked: Asked, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{asked.id}", "object": kind, "created": asked.created, "model": asked.model, "choices": choices}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    with_usage = openai_form.ends_with_usage(asked.body)
    sent: dict[int, int] = {}  # log-probabilities, by choice
    called: dict[int, int] = {}  # calls of tools, by choice

    def chunk(index: int, delta: dict[str, Any], tokens: Sequence[TokenLogprob] = (), finish: str | None = None) -> str:
        sent[index] = sent.get(index, 0) + len(tokens)
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(tokens) if tokens else None, "finish_reason": finish}
        return sse(_document(asked, "chat.completion.chunk", [choice]) | ({"usage": None} if with_usage else {}))

    def last(index: int, choice: Choice) -> str:
        return chunk(index, {}, choice.logprobs[sent.get(index, 0) :], _finish(choice))

    def calling(choice: int, piece: CallPiece, tokens: Sequence[TokenLogprob]) -> Iterator[str]:
        if piece.first:
            called[choice] = called.get(choice, -1) + 1
            begun = _call(piece.call) | {"function": {"name": piece.call.name, "arguments": ""}}
            yield chunk(choice, {"tool_calls": [{"index": called[choice], **begun}]}, tokens)
        if piece.delta:
            delta = {"tool_calls": [{"index": called[choice], "function": {"arguments": piece.delta}}]}
            yield chunk(choice, delta, () if piece.first else tokens)

    async for event in events:
        match event:
            case Piece():
                if event.choice not in sent:
                    yield chunk(event.choice, {"role": "assistant", "content": ""})
                for line in calling(event.choice, event.call, event.logprobs) if event.call else ():
                    yield line
                if event.text:
                    yield chunk(event.choice, {"content": event.text}, event.logprobs)
            case Answer():
                for index, choice in enumerate(event.choices):
                    if index not in sent:  # an answer without text
                        yield chunk(index, {"role": "assistant", "content": ""})
                    yield last(index, choice)
                if with_usage:
                    yield sse(_document(asked, "chat.completion.chunk", []) | {"usage": openai_form.usage(event)})
                yield "data: [DONE]\n\n"
            case _:
                yield sse(openai_form.error(fault_of(event, "messages")))


CHAT = Api("text/event-stream", _parse, _whole, _stream, openai_form.error, "messages")
