"""Tools and formats of answers in all APIs: what the model is shown, and the grammar of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from remoe_cli import bounded
from remoe_cli.errors import UsageError
from remoe_cli.runtime.api.common import Body, Refusal
from remoe_cli.runtime.grammar import json_grammar, json_rule, tools_grammar
from remoe_cli.runtime.main_function import MainFunction

TOOLS = 128  # as OpenAI's and Anthropic's APIs have it
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Schema = dict[str, Any]
_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


class TextFormat(Body):
    """An answer that is any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


@dataclass(frozen=True)
class Tool:
    """A tool of a request.

    shown       to the chat template, in OpenAI's form
    schema      of its arguments
    strict      whether every call of it has arguments by the schema
    where       its place in the request
    """

    name: str
    shown: dict[str, Any]
    schema: Schema | None
    strict: bool
    where: str

    @property
    def arguments(self) -> Schema:
        return self.schema or _NO_ARGUMENTS


@dataclass(frozen=True)
class Choice:
    """Which tools an answer calls.

    needed    it calls one of them
    name      the only one that it may call
    several   it may call several, or one several times
    none      it calls none of them
    where     the place of the parameter in the request, for errors
    """

    needed: bool = False
    name: str | None = None
    several: bool = True
    none: bool = False
    where: str = "tool_choice"


def tool(where: str, name: str, description: str | None, schema: Schema | None, strict: bool | None) -> Tool:
    """Make a tool of what an API says about it."""
    described = {"description": description} if description is not None else {}
    function = {"name": name, **described, "parameters": schema if schema is not None else {"type": "object", "properties": {}}}
    return Tool(name, {"type": "function", "function": function}, schema, bool(strict), where)


def fields(main: MainFunction, tools: Sequence[Tool], choice: Choice, schema: Schema | None = None, where: str = "") -> dict[str, Any]:
    """Return the fields of a request with tools, and an answer that otherwise is JSON by `schema`.

    `where` is the place of the schema in the request.

    Raises: Refusal for a model that takes no tools, a choice among tools that are not there, and a schema that cannot be followed.
    """
    if (choice.needed or choice.name) and not tools:
        raise Refusal(f"The parameter '{choice.where}' asks for a call, but there are no tools.", "Add 'tools'.", param=choice.where)
    if choice.name is not None and choice.name not in [each.name for each in tools]:
        raise Refusal(f"The parameter '{choice.where}' names {choice.name!r}, which is not among the tools.", param=choice.where)
    if schema is not None:
        _check(main, json_grammar(schema), where)
    if choice.none or not tools:  # what the model is not shown it does not call
        return {"grammar": json_grammar(schema)} if schema is not None else {}
    _check_tools(main, tools)
    read = {"tools": tuple(each.shown for each in tools), "tool_calls": True, "skip_special_tokens": False}
    grammar = _grammar(main, tools, choice, None if schema is None else json_rule(schema))
    return read if grammar is None else read | {"grammar": grammar}


def check_history(main: MainFunction, messages: Sequence[Mapping[str, Any]], name: str = "messages") -> None:
    """Raise Refusal for calls and results of tools in messages, where the model takes no tools."""
    if main.engine.tool_format is None and any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
        raise Refusal(f"The parameter '{name}' has calls of tools, or their results. {main.engine.no_tools}", "Leave them out.", param=name)


def _check_tools(main: MainFunction, tools: Sequence[Tool]) -> None:
    names = [each.name for each in tools]
    if twice := next((each for at, each in enumerate(tools) if each.name in names[:at]), None):
        raise Refusal(f"The parameter '{twice.where}' is wrong: two tools have the name {twice.name!r}.", param=twice.where)
    if main.engine.tool_format is None:
        raise Refusal(
            f"The parameter 'tools' is not supported. {main.engine.no_tools}", "Leave it out.", param="tools", code="unsupported_parameter"
        )


def _grammar(main: MainFunction, tools: Sequence[Tool], choice: Choice, otherwise: str | None) -> str | None:
    """Make the grammar of an answer where its calls are not left to the model; None where they are."""
    engine, form = main.engine, main.engine.tool_format
    needed = choice.needed or choice.name is not None
    strict = next((each for each in tools if each.strict), None)
    if not needed and strict is None and choice.several and otherwise is None:
        return None
    where = choice.where if needed else strict.where if strict else "parallel_tool_calls" if not choice.several else "tools"
    if form is None or form.writing is None:
        raise Refusal(f"The parameter '{where}' is not supported: how this model asks for calls is not known.", param=where)
    called = [each for each in tools if choice.name in (None, each.name)]
    for each in called:
        if needed or each.strict:
            _check(main, json_grammar(each.arguments), each.where)
    # Only what the request asks to be held is: another tool's arguments are any JSON object.
    written = [(each.name, each.arguments if needed or each.strict else {"type": "object"}) for each in called]
    added = {token.content: int(number) for number, token in engine.tokenizer.added_tokens_decoder.items()}
    try:
        grammar = tools_grammar(written, form.writing, added, engine.ends, needed=needed, several=choice.several, otherwise=otherwise)
    except ValueError as error:
        raise Refusal(f"The parameter '{where}' is not supported with this model: {error}.", param=where) from None
    _check(main, grammar, where)
    return grammar


def _check(main: MainFunction, grammar: str, where: str) -> None:
    try:
        main.engine.grammars.check(grammar)
    except UsageError as error:
        raise Refusal(
            f"The parameter '{where}' is not supported: {error.message}", error.hint, param=where, code="unsupported_value"
        ) from None


def called(where: str, call_id: str, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    """Write a call of an earlier answer as chat templates take it.

    Raises: Refusal for arguments that are no JSON object.
    """
    if isinstance(arguments, str):
        try:
            parsed = bounded.parse_json(arguments or "{}")
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Refusal(f"The parameter '{where}' is no JSON object as text.", param=where)
        arguments = parsed
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
