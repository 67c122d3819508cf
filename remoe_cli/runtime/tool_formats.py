"""How models write calls of tools, as their chat templates show it to them.

A checkpoint says it itself where its tokenizer has a `response_template`. For others a text in the chat template tells the format. A row of
`FORMATS` has the field `tool_calls` of a `response_template`, by which transformers reads calls, and what a grammar needs to ask for one.

Source: transformers, "Response Parsing"; the chat templates of Qwen, Mistral, Llama, gpt-oss, DeepSeek, GLM, Kimi and Granite models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from remoe_cli.runtime.grammar import Parts, Rule, Writing, json_rule


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    marks     texts of a chat template, of which all tell the format
    field     `tool_calls` of a response template
    writing   None where no grammar can ask for a call
    dropped   texts that stand outside calls and say nothing
    """

    name: str
    marks: tuple[str, ...]
    field: Mapping[str, Any]
    writing: Writing | None
    dropped: tuple[str, ...] = ()


def _json(before: str, name_key: str, arguments_key: str, after: str) -> Callable[[str, Mapping[str, Any]], Parts]:
    """Write a call as one JSON object between two texts."""
    return lambda name, schema: (
        f'{before}{{"{name_key}": {json.dumps(name)}, "{arguments_key}": ',
        Rule(json_rule(schema)),
        "}" + after,
    )


def _arguments(before: str, between: str, after: str) -> Callable[[str, Mapping[str, Any]], Parts]:
    """Write a call as its name and the JSON of its arguments."""
    return lambda name, schema: (f"{before}{name}{between}", Rule(json_rule(schema)), after)


def _tags(begin: str, key: str, end_value: str, end: str) -> Callable[[str, Mapping[str, Any]], Parts]:
    """Write a call as its name and a pair of tags for each argument: texts as they are, other values as JSON."""

    def call(name: str, schema: Mapping[str, Any]) -> Parts:
        parts: list[str | Rule] = [begin.format(name)]
        shared = {each: schema[each] for each in ("$defs", "definitions") if each in schema}
        for argument, of in schema.get("properties", {}).items():
            optional = argument not in schema.get("required", ())
            is_text = isinstance(of, dict) and of.get("type") == "string" and not {"enum", "const"} & of.keys()
            value = [Rule("value")] if is_text else [Rule(json_rule({**shared, **of})), end_value]
            parts += [*([Rule("(")] if optional else []), key.format(argument), *value, *([Rule(")?")] if optional else [])]
        return (*parts, end)

    return call


_OBJECT = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_NAME = r"(?P<name>[\w.-]+)"

# The first row whose marks are all in the template.
FORMATS = (
    ToolFormat(
        "qwen3-coder",
        ("<function=", "<parameter="),
        {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(
            _tags("<tool_call>\n<function={}>\n", "<parameter={}>\n", "\n</parameter>\n", "</function>\n</tool_call>"),
            "<tool_call>",
            text_end="\n</parameter>\n",
        ),
    ),
    ToolFormat(
        "glm",
        ("<arg_key>", "<arg_value>"),
        {
            "open_pattern": r"\s*<tool_call>\s*(?P<name>[^\s<]+)",
            "close": "</tool_call>",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"},
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(
            _tags("<tool_call>{}\n", "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>"),
            "<tool_call>",
            text_end="</arg_value>\n",
        ),
    ),
    ToolFormat(
        "mistral, since its version 11",
        ("[TOOL_CALLS]", "[ARGS]"),
        {
            "open_pattern": rf"\[TOOL_CALLS\]\s*{_NAME}\s*\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "content": "json",
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(_arguments("[TOOL_CALLS]", "[ARGS]", ""), "[TOOL_CALLS]", between=""),
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        {
            "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
            "content": "json",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        Writing(_json("", "name", "arguments", ""), "[TOOL_CALLS]", before="[TOOL_CALLS] [", between=", ", after="]"),
    ),
    ToolFormat(
        "gpt-oss",
        ("<|channel|>commentary", "to=functions."),
        {
            "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>\w+)?\s*"
            + rf"to=functions\.{_NAME}(?:<\|channel\|>\w+)?\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>",
            "close": ["<|call|>", "<|end|>"],
            "content": "json",
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(_arguments("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""), None, between=None),
    ),
    ToolFormat(
        "deepseek",
        ("<｜tool▁call▁begin｜>",),
        {
            "open_pattern": r"\s*(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
            + r"(?P<name>(?!function<)[\w.-]+)(?:\n```json\n|<｜tool▁sep｜>)",
            "close_pattern": r"(?:\n```)?<｜tool▁call▁end｜>",
            "content": "json",
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(
            _arguments("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
            "<｜tool▁calls▁begin｜>",
            before="<｜tool▁calls▁begin｜>",
            after="<｜tool▁calls▁end｜>",
        ),
        ("<｜tool▁calls▁end｜>",),
    ),
    ToolFormat(
        "kimi",
        ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        {
            "open_pattern": r"(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*(?:functions\.)?"
            + r"(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
            "close": "<|tool_call_end|>",
            "content": "json",
            "repeats": True,
            "transform": _NAMED,
        },
        Writing(
            _arguments("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
            "<|tool_calls_section_begin|>",
            before="<|tool_calls_section_begin|>",
            between="",
            after="<|tool_calls_section_end|>",
        ),
        ("<|tool_calls_section_end|>",),
    ),
    ToolFormat(
        "granite",
        ("<|tool_call|>",),
        {
            "open_pattern": r"\s*<\|tool_call\|>\s*",
            "content": "json",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        Writing(_json("", "name", "arguments", ""), "<|tool_call|>", before="<|tool_call|>[", between=", ", after="]"),
    ),
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True, "transform": _OBJECT},
        Writing(_json("<tool_call>\n", "name", "arguments", "\n</tool_call>"), "<tool_call>"),
    ),
    ToolFormat(
        "llama",
        ('{"name": function name, "parameters": dictionary of argument name and its value}',),
        {
            "open_pattern": r"\A\s*(?:<\|python_tag\|>|<\|python_start\|>)?(?=\{\s*\"name\")",
            "close": "<|python_end|>",
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}},
        },
        Writing(_json("", "name", "parameters", ""), None, between=None),
    ),
)

_PROBE = {
    "type": "function",
    "function": {
        "name": "remoe_probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A."}}, "required": ["a"]},
    },
}


def format_of(tokenizer: Any) -> ToolFormat | None:
    """Return how a model writes calls of tools.

    It is None where the chat template takes no tools, or the format is not known.
    """
    if not _takes_tools(tokenizer):
        return None
    template = tokenizer.get_chat_template(tools=[_PROBE])
    known = next((row for row in FORMATS if all(mark in template for mark in row.marks)), None)
    own = (getattr(tokenizer, "response_template", None) or {}).get("fields", {}).get("tool_calls")
    # The model's own way of reading, and ours of asking where the two are the same format.
    return replace(known or ToolFormat("", (), {}, None), name="its own", field=own) if own else known


def why_none(tokenizer: Any) -> str:
    """Say why `format_of` finds no format: the model is shown no tools, or its calls cannot be read."""
    if not _takes_tools(tokenizer):
        return "This model takes no tools: it has no chat template that shows it any."
    return "This model takes tools, but its calls cannot be read: its chat template writes them in a way that remoe does not know."


def _takes_tools(tokenizer: Any) -> bool:
    """Tell whether a chat template shows tools to the model."""
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tools=[_PROBE], tokenize=False, add_generation_prompt=True)
    except Exception:  # a template refuses in words of its own, of any class
        return False
    return "remoe_probe" in text
