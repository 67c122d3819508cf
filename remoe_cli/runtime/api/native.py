"""remoe's own API: one JSON object a line where it is streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from remoe_cli.runtime.answer import Piece
from remoe_cli.runtime.api.common import Api, Asked, Event, Fault, Refusal
from remoe_cli.runtime.main_function import Answer, MainFunction, described, parse


def _parse(body: bytes, main: MainFunction) -> Asked:
    asked = parse(body)
    if asked.grammar is not None:  # what other APIs make of schemas, which are checked as such
        raise Refusal("The parameter 'grammar' is not supported.", "Use 'response_format' of /v1/chat/completions.", param="grammar")
    return Asked(asked, None, main.name)


def _whole(asked: Asked, answer: Answer) -> dict[str, Any]:
    return answer.model_dump(mode="json")


async def _stream(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for event in events:
        match event:
            case Piece():
                if event.call is not None and not event.call.last and not event.logprobs:
                    continue  # here a call comes when it is whole
                line: dict[str, Any] = {"text": event.text, "token_id": event.token_id}
                line |= {"choice": event.choice} if event.choice else {}
                line |= {"tool_calls": [asdict(event.call.call)]} if event.call is not None and event.call.last else {}
                line |= {"logprobs": [asdict(each) for each in event.logprobs]} if event.logprobs else {}
            case Answer():
                line = {"answer": event.model_dump(mode="json")}
            case _:
                line = {"error": described(event)}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _error(fault: Fault) -> dict[str, Any]:
    return {"error": dict(fault.document)}


NATIVE = Api("application/x-ndjson", _parse, _whole, _stream, _error, comment="\n")
