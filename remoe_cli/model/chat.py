"""What a model is asked: one text of the user, or the messages of a conversation.

Messages are those of OpenAI's chat API, which chat templates take. Names of roles that other formats use are brought to its four:
system, user, assistant and tool; `developer` is `system`, as models make no difference between the two. This module imports
nothing heavy: clients and readers of files need no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remoe_cli import bounded
from remoe_cli.errors import UsageError

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# Besides role and content, what chat templates look at.
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_DEPTH = 64  # of tools and of the calls of tools
_CORRECT = "Correct the row."


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them.

    messages   in their order, each with `role` and `content` (a text)
    tools      the JSON schemas of the tools that the model may call

    >>> as_text(conversation([{"from": "human", "value": "Why?"}], where="a.json"))
    'Why?'
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the conversation as the fields of a request: messages, and tools where there are any."""
        return {"messages": list(self.messages)} | ({"tools": list(self.tools)} if self.tools else {})


Prompt = str | Conversation


def as_text(prompt: Prompt) -> str:
    """Return the texts of a prompt, joined by blank lines. A model without a chat template is served this."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt.messages)


def is_message(value: object) -> bool:
    """Tell whether a value looks like one message of a conversation, in OpenAI's names or in ShareGPT's."""
    return isinstance(value, Mapping) and bool({"role", "from"} & value.keys()) and bool({"content", "value", "tool_calls"} & value.keys())


def conversation(messages: Sequence[object], tools: object = None, *, where: str) -> Conversation:
    """Check messages and bring them to one form, without system messages that have no text.

    The content of a message is a text, or a list of parts of text, which are joined by line ends as vLLM does. Arguments of tool calls
    become objects, which is what chat templates expect.

    Raises: UsageError, whose message begins with `where`, for an unknown role, for parts that are no text, and for what is no message.
    Source: OpenAI's API reference, chat completions; FastChat's and LLaMA-Factory's ShareGPT formats; vLLM, entrypoints/chat_utils.py.
    """
    checked = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    tools = _parsed(tools, f"{where}: the field 'tools'") if isinstance(tools, str) and tools.strip() else tools or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UsageError(f"{where}: the tools are of type {type(tools).__name__}, not a list.", _CORRECT)
    return Conversation(
        tuple(message for message in checked if message["role"] != "system" or message["content"].strip()),
        tuple(_plain(tool, f"{where}: the field 'tools'") for tool in tools),
    )


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is of type {type(value).__name__}, not an object with role and content.", _CORRECT)
    name = value.get("role") or value.get("from")
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UsageError(f"{where} has the role {name!r:.60}, which is not known.", f"Known are {', '.join(_ROLES)}.")
    content = value["value"] if value.get("content") is None and "value" in value else value.get("content")
    kept = {key: value[key] for key in _KEPT if value.get(key)}
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_arguments(call) for call in calls]
    return {"role": role, "content": _plain(_content_text(content, where), where), **_plain(kept, where)}


def _content_text(content: object, where: str) -> str:
    """Join a message's content to one text; raises UsageError for what is not text, such as an image."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{where} has content of type {kind!r:.60}, which is not text.", "Leave the row out: remoe serves text only.")
        texts.append(text)
    return "\n".join(texts)


def _with_arguments(call: object) -> object:
    """Replace the arguments of a tool call, which are JSON as text in OpenAI's API, by the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = bounded.parse_json(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _parsed(text: str, where: str) -> object:
    try:
        return bounded.parse_json(text)
    except ValueError as error:
        raise UsageError(f"{where} is text that is not JSON ({error}).", _CORRECT) from None


def _plain(value: object, where: str, depth: int = _DEPTH) -> Any:
    """Copy a value without the nulls that tables fill in; raises UsageError for what JSON cannot hold."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{where} holds half of a surrogate pair.", _CORRECT)
        return value
    if depth == 0:
        raise UsageError(f"{where} is nested more than {_DEPTH} levels deep.", _CORRECT)
    if isinstance(value, Mapping):
        return {_plain(str(key), where): _plain(item, where, depth - 1) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth - 1) for item in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UsageError(f"{where} holds {value!r}, which JSON cannot hold.", _CORRECT)
