"""OpenAI's chat completions: POST /v1/chat/completions.

Source: OpenAI's API reference, "Create chat completion"; vLLM's parameters top_k, min_p and repetition_penalty.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import Field

from remoe_cli.runtime.answer import Piece, TokenLogprob
from remoe_cli.runtime.api import openai_form
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


class _Format(Body):
    type: Literal["text"]


class ChatBody(SampledBody):
    """The parameters that are supported; of those with one value, no other one is."""

    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    response_format: _Format | None = None
    tools: tuple[()] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


def _parse(body: bytes, main: MainFunction) -> Asked:
    chat = read(ChatBody, body)
    check_model(chat.model, main)
    check_messages(chat.messages)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise Refusal("The parameter 'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    openai_form.ends_with_usage(chat)  # refuses options without a stream
    lengths = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(lengths) > 1:
        raise Refusal("The parameters 'max_tokens' and 'max_completion_tokens' differ.", "Give one of them.", param="max_tokens")
    fields = sampled(chat, main) | {
        "messages": chat.messages,
        "max_new_tokens": next(iter(lengths), None),
        "logprobs": (chat.top_logprobs or 0) if chat.logprobs else None,
        "stream": bool(chat.stream),
    }
    return Asked(request(fields, {"logprobs": "top_logprobs"}), chat, main.name)


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
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _logprobs(choice.logprobs) if asked.body.logprobs else None,
            "finish_reason": openai_form.FINISH[choice.finish_reason],
        }
        for index, choice in enumerate(answer.choices)
    ]
    return _document(asked, "chat.completion", choices) | {"usage": openai_form.usage(answer)}


def _document(asked: Asked, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{asked.id}", "object": kind, "created": asked.created, "model": asked.model, "choices": choices}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    with_usage = openai_form.ends_with_usage(asked.body)
    sent: dict[int, int] = {}  # log-probabilities, by choice

    def chunk(index: int, delta: dict[str, Any], tokens: Sequence[TokenLogprob] = (), finish: str | None = None) -> str:
        sent[index] = sent.get(index, 0) + len(tokens)
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(tokens) if tokens else None, "finish_reason": finish}
        return sse(_document(asked, "chat.completion.chunk", [choice]) | ({"usage": None} if with_usage else {}))

    def last(index: int, choice: Choice) -> str:
        return chunk(index, {}, choice.logprobs[sent.get(index, 0) :], openai_form.FINISH[choice.finish_reason])

    async for event in events:
        match event:
            case Piece():
                if event.choice not in sent:
                    yield chunk(event.choice, {"role": "assistant", "content": ""})
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
                yield sse(openai_form.error(fault_of(event)))


CHAT = Api("text/event-stream", _parse, _whole, _stream, openai_form.error)
