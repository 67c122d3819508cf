"""The parsers of a main server: a body of each API, as far as its prompt."""

from __future__ import annotations

import json
from typing import Any

from remoe_cli.runtime.api.chat import CHAT
from remoe_cli.runtime.api.common import Api
from remoe_cli.runtime.api.completions import COMPLETIONS
from remoe_cli.runtime.api.messages import MESSAGES, count_tokens
from remoe_cli.runtime.api.responses import RESPONSES
from remoe_cli.runtime.main_function import MainFunction
from tests.mutants import mutate
from tests.mutants.parser import Parse, Parser


def asked(api: Api, main: MainFunction) -> Parse:
    """What a server does with a body until the request waits for its turn, and the prompt that is made of it then."""

    def parse(body: bytes) -> object:
        made = api.parse(body, main)
        main.refuse(made.request)
        return main.prompt_ids(made.request)

    return parse


_SCHEMA: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]}
_FUNCTION = {"name": "add", "description": "Adds.", "parameters": _SCHEMA, "strict": True}
_TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": 0.5, "stop": ["x"], "logit_bias": {"5": 1.5}, "n": 2}
# Bodies of each API: sampled, with a format, and with tools and their results.
BODIES: dict[str, tuple[dict[str, object], ...]] = {
    "chat": (
        {"messages": _TALK, **_SAMPLING, "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _TALK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
        {
            "messages": [*_TALK, {"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": "1", "content": "2"}],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ),
    "completions": ({"prompt": "p", **_SAMPLING, "logprobs": 2, "max_tokens": 5}, {"prompt": [1, 2, 3], "stream": True}),
    "responses": (
        {"input": "i", "instructions": "s", "temperature": 0.5, "text": {"format": {"type": "json_object"}}},
        {
            "input": [
                *_TALK,
                {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}", "id": "x", "status": "completed"},
                {"type": "function_call_output", "call_id": "1", "output": "2"},
            ],
            "tools": [{"type": "function", **_FUNCTION}],
            "tool_choice": {"type": "function", "name": "add"},
        },
    ),
    "messages": (
        {"max_tokens": 5, "system": "s", "messages": [{"role": "user", "content": "u"}], "stop_sequences": ["x"], "top_k": 3},
        {
            "max_tokens": 5,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "u"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2", "is_error": True}]},
            ],
            "tools": [{"name": "add", "input_schema": _SCHEMA, "strict": True}],
            "tool_choice": {"type": "any"},
        },
    ),
}


def servers_parsers(main: MainFunction) -> dict[str, Parser]:
    """The parsers of a main server's APIs."""
    apis = {"chat": CHAT, "completions": COMPLETIONS, "responses": RESPONSES, "messages": MESSAGES}
    bodies = {name: tuple(json.dumps({"model": "", **body}).encode() for body in some) for name, some in BODIES.items()}
    own: dict[int, Any] = {}
    counted = tuple(json.dumps({"model": "", "messages": body["messages"]}).encode() for body in BODIES["messages"])
    return {
        **{f"body of {name}": Parser(asked(api, main), bodies[name], mutate.JSON, 1.5) for name, api in apis.items()},
        "body of count_tokens": Parser(lambda body: count_tokens(body, main, own), counted, mutate.JSON, 0.5),
    }
