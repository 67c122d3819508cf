"""What a model is asked: one text of the user, or the messages of a conversation. Nothing heavy is imported here.

Messages are those of OpenAI's chat API, which chat templates take. Names of roles that other formats use are brought to its four:
system, user, assistant and tool; `developer` is `system`, as models make no difference between the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_MEND = "Mend the row."


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, each with `role` and `content` (a text), as chat templates take them; `tools` are JSON schemas."""

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
    """Check messages and bring them to one form; system messages without text are left out.

    The content of a message is a text, or a list of parts of text, which are joined by line ends as vLLM does. Arguments of tool calls
    become objects, which is what chat templates expect.

    Raises: UsageError, whose message begins with `where`, for an unknown role, for parts that are no text, and for what is no message.
    Source: OpenAI's API reference, chat completions; FastChat's and LLaMA-Factory's ShareGPT formats; vLLM, entrypoints/chat_utils.py.
    """
    checked = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    tools = _parsed(tools, f"{where}: the field 'tools'") if isinstance(tools, str) and tools.strip() else tools or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UsageError(f"{where}: the tools are of type {type(tools).__name__}, not a list.", _MEND)
    return Conversation(
        tuple(message for message in checked if message["role"] != "system" or message["content"].strip()),
        tuple(_plain(tool, f"{where}: the field 'tools'") for tool in tools),
    )


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is of type {type(value).__name__}, not an object with role and content.", _MEND)
    name = value.get("role", value.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UsageError(f"{where} has the role {name!r}, which is not known.", f"Known are {', '.join(_ROLES)}.")
    message: dict[str, Any] = {"role": role, "content": _plain(content_text(value.get("content", value.get("value")), where), where)}
    message |= {key: _plain(value[key], where) for key in _KEPT if value.get(key)}
    for call in message.get("tool_calls", ()):
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
    return message


def content_text(content: object, where: str) -> str:
    """Return a message's content as one text; raises UsageError for content that is not text, such as an image."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{where} has content of type {kind!r}, which is not text.", "Leave the row out: remoe serves text only.")
        texts.append(text)
    return "\n".join(texts)


def _arguments(text: str) -> object:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is text that is not JSON ({error}).", _MEND) from None


def _plain(value: object, where: str, depth: int = _DEPTH) -> Any:
    """Copy a value that JSON can hold, without the nulls that columns of tables fill in; raises UsageError for any other."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{where} holds half of a surrogate pair.", _MEND)
        return value
    if depth == 0:
        raise UsageError(f"{where} is nested more than {_DEPTH} levels deep.", _MEND)
    if isinstance(value, Mapping):
        return {_plain(str(key), where): _plain(item, where, depth - 1) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth - 1) for item in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UsageError(f"{where} holds {value!r}, which JSON cannot hold.", _MEND)
