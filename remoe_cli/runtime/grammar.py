"""Grammars of answers: JSON by a schema, and calls of tools.

A grammar is a text in llguidance's form of Lark, in which `%json {..}` is a JSON schema and `<[7]>` is the token 7. Imports no torch.

Source: llguidance, docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Between the tokens of JSON there is one line and its indentation at most: a model cannot go on with spaces for ever.
_SPACES = {"whitespace_flexible": True, "whitespace_pattern": r"\n?[ \t]{0,32}"}


def json_rule(schema: Mapping[str, Any]) -> str:
    """Write a JSON schema as a part of a grammar.

    >>> json_rule({"type": "object"}).startswith('%json {"type": "object", "x-guidance":')
    True
    """
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACES})}"


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Make the grammar of an answer that is JSON by a schema."""
    return f"start: {json_rule(schema)}"


# A call is written in parts: texts as they stand, and parts of a grammar.
Parts = Sequence["str | Rule"]


@dataclass(frozen=True)
class Rule:
    """A part of a call that a grammar describes."""

    text: str


@dataclass(frozen=True)
class Writing:
    """What a grammar needs for a call that is asked for.

    call                     the parts of one call, by the tool's name and the schema of its arguments
    before, between, after   the texts around calls; no `between` where an answer has one call at most
    opening                  the text by which a call is recognised in other text; None where there is none
    text_end                 the text that ends an argument that is no JSON
    """

    call: Callable[[str, Mapping[str, Any]], Parts]
    opening: str | None
    before: str = ""
    between: str | None = "\n"
    after: str = ""
    text_end: str | None = None


def tools_grammar(
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    writing: Writing,
    added: Mapping[str, int],
    ends: Sequence[int],
    *,
    needed: bool,
    several: bool,
    otherwise: str | None = None,
) -> str:
    """Make the grammar of an answer that calls tools.

    tools       name and schema of the arguments of those that may be called
    added       the tokenizer's added tokens, by their text
    needed      whether the answer is a call; else it may be other text, before and after calls too
    several     whether there may be several calls
    otherwise   a part of a grammar that an answer without calls follows

    Raises: ValueError for a format in which calls cannot be told from other text.
    """
    several = several and writing.between is not None
    in_text = not needed and otherwise is None
    if in_text and writing.opening is None:
        raise ValueError("calls cannot be told from other text")
    opening = writing.opening or ""
    # An opening that is no token of its own is found as text, and what follows it is the rest of a call.
    found = opening if in_text and opening not in added else ""
    chained = several and not (found and not writing.before)

    def spelled(*parts: str | Rule, first: bool = False) -> str:
        begin = [part.removeprefix(found) if first and not number and isinstance(part, str) else part for number, part in enumerate(parts)]
        return _spelled(begin, added)

    names = [f"call_{number}" for number in range(len(tools))]
    rules = [f"call: {' | '.join(names)}"]
    rules += [f"{name}: {spelled(*writing.call(*tool), first=not writing.before)}" for name, tool in zip(names, tools, strict=True)]
    rules += [_value(writing.text_end, added)] if writing.text_end else []
    more = f"({spelled(writing.between or '')} call)*" if chained else ""
    calls = " ".join(filter(None, [spelled(writing.before, first=True), "call", more, spelled(writing.after)]))
    if found:
        # Text behind the last call could hold another one.
        whole = f"(head {calls})* (TEXT)?" if several else f"head {calls} | (TEXT)?"
        start = [f"start: {whole}", f"head[lazy]: TEXT {_quoted(found)}"]
    elif in_text:
        others = ",".join(str(token) for token in sorted({added[opening], *ends}))
        start = [f"start: prose ({calls} prose){'*' if several else '?'}", f"prose: (TEXT | <[^{others}]>)*"]
    else:
        start = [f"start: {calls}" + (f" | {otherwise}" if otherwise is not None else "")]
    return "\n".join([*start, *rules, "TEXT: /(?s:.*)/"])


def _value(end: str, added: Mapping[str, int]) -> str:
    """Write the rule of a text that ends where a text is found, or a token."""
    spelled = _spelled([end], added)
    return f"value: TEXT {spelled}" if spelled.startswith("<[") else f"value[suffix={_quoted(end)}]: /(?s:.*)/"


def _spelled(parts: Parts, added: Mapping[str, int]) -> str:
    """Write parts for a grammar: an added token stands for itself, and is no text."""
    tokens = "|".join(re.escape(text) for text in sorted(added, key=len, reverse=True))
    spelled: list[str] = []
    for part in parts:
        if isinstance(part, Rule):
            spelled.append(part.text)
            continue
        for piece in re.split(f"({tokens})", part) if tokens else [part]:
            if piece:
                spelled.append(f"<[{added[piece]}]>" if piece in added else _quoted(piece))
    return " ".join(spelled)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
