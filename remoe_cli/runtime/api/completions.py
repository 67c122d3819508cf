"""OpenAI's completions: POST /v1/completions. The prompt stands as it is, outside the chat template.

Source: OpenAI's API reference, "Create completion".
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
    Event,
    Refusal,
    SampledBody,
    StreamOptions,
    check_model,
    fault_of,
    read,
    request,
    sampled,
    sse,
)
from remoe_cli.runtime.main_function import Answer, MainFunction

_TOKENS = 16  # OpenAI's default
_TOP = 5  # OpenAI's limit


class CompletionBody(SampledBody):
    """The parameters that are supported; of those with one value, no other one is."""

    prompt: str | tuple[str | int, ...] = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=_TOP)
    stream_options: StreamOptions | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None


def _prompt(prompt: str | tuple[str | int, ...]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "template": False}
    if all(isinstance(token, int) for token in prompt):
        return {"prompt_token_ids": prompt}
    if len(prompt) == 1:
        return {"prompt": prompt[0], "template": False}
    raise Refusal(
        "The parameter 'prompt' with several texts is not supported.",
        "Send one request for each.",
        param="prompt",
        code="unsupported_value",
    )


def _parse(body: bytes, main: MainFunction) -> Asked:
    completion = read(CompletionBody, body)
    check_model(completion.model, main)
    if completion.best_of not in (None, completion.n or 1):
        raise Refusal("The parameter 'best_of' is not supported where it differs from 'n'.", "Leave it out.", param="best_of")
    openai_form.ends_with_usage(completion)  # refuses options without a stream
    fields = sampled(completion, main) | {
        **_prompt(completion.prompt),
        "max_new_tokens": completion.max_tokens or _TOKENS,
        "logprobs": completion.logprobs,
        "stream": bool(completion.stream),
    }
    return Asked(request(fields, {"prompt_token_ids": "prompt"}), completion, main.name)


def _logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [{text: p for _, text, p in each.top} for each in tokens],
        "text_offset": offsets,
    }


def _document(asked: Asked, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"cmpl-{asked.id}", "object": "text_completion", "created": asked.created, "model": asked.model, "choices": choices}


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": None if asked.body.logprobs is None else _logprobs(choice.logprobs),
            "finish_reason": openai_form.FINISH[choice.finish_reason],
        }
        for index, choice in enumerate(answer.choices)
    ]
    return _document(asked, choices) | {"usage": openai_form.usage(answer)}


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    with_usage = openai_form.ends_with_usage(asked.body)
    sent: dict[int, list[TokenLogprob]] = {}  # by choice

    def chunk(index: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None = None) -> str:
        before = sent.setdefault(index, [])
        logprobs = _logprobs(tokens, sum(len(each.text) for each in before)) if tokens else None
        before += tokens
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return sse(_document(asked, [choice]) | ({"usage": None} if with_usage else {}))

    async for event in events:
        match event:
            case Piece():
                yield chunk(event.choice, event.text, event.logprobs)
            case Answer():
                for index, choice in enumerate(event.choices):
                    rest = choice.logprobs[len(sent.get(index, ())) :]
                    yield chunk(index, "", rest, openai_form.FINISH[choice.finish_reason])
                if with_usage:
                    yield sse(_document(asked, []) | {"usage": openai_form.usage(event)})
                yield "data: [DONE]\n\n"
            case _:
                yield sse(openai_form.error(fault_of(event, "prompt")))


COMPLETIONS = Api("text/event-stream", _parse, _whole, _stream, openai_form.error, "prompt")
