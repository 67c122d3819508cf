"""Reading the calls of tools out of an answer while it is generated.

transformers' own parser finds them (utils/chat_parsing). What it cannot read, or what calls no tool of the request, stays text. Once a
call's name is known and its arguments begin, they are passed on as they come (tool_arguments.py): then it is a call, also where the answer
ends in it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from remoe_cli import bounded
from remoe_cli.runtime.answer import CallPiece, Piece, TokenLogprob, ToolCall
from remoe_cli.runtime.tool_arguments import JsonArguments, TagArguments, json_begin, tag_of

_ID = 9  # characters: what Mistral's chat templates take, and no other minds
Found = str | CallPiece


def _template(region: Mapping[str, Any]) -> ResponseTemplate:
    fields = {"tool_calls": dict(region), "content": {"content": "text", "content_args": {"strip": False}}}
    # The answer's own text is all that is read, so there is no place in the prompt where it begins.
    return load_response_template({"start_anchor": "\0", "fields": fields})


# A call as one JSON object: what casts a single argument.
_ALONE = _template({"open": "\1", "close": "\2", "content": "json", "transform": {"type": "function", "function": "{content}"}})


@dataclass
class Reader:
    """Reads one answer.

    region   `tool_calls` of a response template
    tools    of the request, in OpenAI's form
    ends     texts of the tokens that end an answer
    hidden   texts of tokens that a client does not see in text
    """

    region: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    ends: Sequence[str] = ()
    hidden: Sequence[str] = ()
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    _raw: str = ""
    _at: int = 0  # in _raw: where begins what has become neither text nor call
    _ended: bool = False
    _body: str = ""  # of the region that is open
    _call: ToolCall | None = None  # that is passed on as it comes
    _arguments: JsonArguments | TagArguments | None = None
    _templates: tuple[ResponseTemplate, ResponseTemplate] = field(init=False)  # that reads calls, and one that finds where they are
    _parser: ResponseParser = field(init=False)
    _begin: re.Pattern[str] | None = field(init=False)
    _tag: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        self._begin, self._tag = json_begin(self.region), tag_of(self.region)
        bounds = {key: value for key, value in self.region.items() if key.startswith(("open", "close")) or key == "repeats"}
        text = {"content": "text", "content_args": {"strip": False}, "transform": {"text": "{content}"}}
        self._templates = _template(self.region), _template(bounds | text)
        self._parser = ResponseParser(self._templates[1], prefix="")

    def feed(self, text: str) -> list[Found]:
        """Read on; returns texts and pieces of calls as they come."""
        if self._ended:
            return []
        ends = [at for end in self.ends if (at := text.find(end)) >= 0]
        if ends:
            text, self._ended = text[: min(ends)], True
        self._raw += text
        return self._found(self._parser.feed(text))

    def finish(self) -> list[Found]:
        """Read what is left at the end of the answer."""
        found = self._found(self._parser.finalize()[1])
        self._ended = True
        return found

    def _found(self, events: Sequence[Mapping[str, Any]]) -> list[Found]:
        found: list[Found] = []
        for event in events:
            match event:
                case {"type": "region_chunk", "field": "content", "text": str(text)}:
                    self._at += len(text)
                    found += self._shown(text)
                case {"type": "region_chunk", "text": str(text)}:
                    self._body += text
                    found += self._going_on(text)
                case {"type": "region_close", "field": "tool_calls"}:
                    found += self._closed()
        return found

    def _going_on(self, text: str) -> list[Found]:
        """Pass on what is new of a call, once it has begun."""
        if self._arguments is None:
            begun = self._begun()
            if begun is None:
                return []
            self._call, self._arguments, text = begun
            return [self._piece(self._arguments.feed(text), first=True)]
        delta = self._arguments.feed(text)
        return [self._piece(delta)] if delta else []

    def _begun(self) -> tuple[ToolCall, JsonArguments | TagArguments, str] | None:
        """Begin a call whose name is known and whose arguments have begun; returns it with their text so far."""
        opened, tag = self._opened(), self._tag
        at = self._begin.match(self._body) if self._begin else None
        if opened is None or (at is None and tag is None):
            return None
        name = _text(at["name"]) if at and "name" in at.groupdict() else opened.groupdict().get("name")
        tool = next((tool["function"] for tool in self.tools if tool["function"]["name"] == name), None)
        if tool is None:
            return None
        call = ToolCall(secrets.token_hex(_ID)[:_ID], tool["name"], "")
        if at is None:
            assert tag is not None
            head = opened[0]
            return call, TagArguments(tag, lambda text: _arguments_of(self._value(head + text))), self._body
        parameters = tool.get("parameters") or {}
        properties = parameters.get("properties")
        cast = lambda key, value: self._cast(tool["name"], key, value)  # noqa: E731
        return call, JsonArguments(properties if isinstance(properties, Mapping) else {}, cast), self._body[at.end() :]

    def _piece(self, delta: str, *, first: bool = False, last: bool = False) -> CallPiece:
        assert self._call is not None and self._arguments is not None
        self._call = replace(self._call, arguments=self._call.arguments + delta)
        last = last or self._arguments.done
        if last:
            self.calls.append(self._call)
        return CallPiece(self._call, delta, first, last)

    def _closed(self) -> list[Found]:
        """Take what the region has that ends here."""
        found = self._going_on("") if self._arguments is None else []  # a call in tags may have no arguments, and so no text
        begin, end = self._at, self._region_end()
        self._at = len(self._raw) if end is None else end
        arguments, self._body = self._arguments, ""
        if arguments is None:
            calls = self._calls(self._value(self._raw[begin : self._at]))
            if calls is None:
                return self._shown(self._raw[begin : self._at])
            self.calls += calls
            return [CallPiece(call, call.arguments, True, True) for call in calls]
        if not arguments.done:
            found.append(self._piece(arguments.finish(closed=end is not None or self._ended), last=True))
        rest = arguments.rest if "name" in self._field.open_re.groupindex else ""  # elsewhere it is the end of an object around them
        self._call = self._arguments = None
        return [*found, *(self._shown(rest) if rest.strip() else [])]

    @property
    def _field(self) -> Any:
        return self._templates[0].fields["tool_calls"]

    def _opened(self) -> re.Match[str] | None:
        """Return what has opened the region that is open."""
        found: re.Match[str] | None = self._field.open_re.search(self._raw, self._at)
        return found

    def _region_end(self) -> int | None:
        """Return where the region ends; None where the model has not ended it."""
        of, begin = self._field, self._opened()
        end = of.close_re.search(self._raw, begin.end() + len(self._body)) if begin and of.close_re else None
        return int(end.end()) if end else None

    def _value(self, text: str) -> Any:
        """Let transformers read a region; None where it cannot."""
        parser = ResponseParser(self._templates[0], prefix="", tools=[dict(tool) for tool in self.tools])
        try:
            events = [*parser.feed(text), *parser.finalize()[1]]
        except (ValueError, KeyError, RecursionError):  # the last: brackets in brackets
            return None
        return next((event["value"] for event in events if event["type"] == "region_close" and event["field"] == "tool_calls"), None)

    def _cast(self, name: str, key: str, text: str) -> str:
        """Let transformers cast an argument to the type of the tool's schema; returns its text where nothing changes."""
        try:
            value = bounded.parse_json(text)
            call = json.dumps({"name": name, "arguments": {key: value}}, ensure_ascii=False)
            parser = ResponseParser(_ALONE, prefix="", tools=[dict(tool) for tool in self.tools])
            cast = _arguments_of(parser.feed(f"\1{call}\2")[-1].get("value"))[key]
        except (ValueError, KeyError):
            return text
        return text if cast == value and type(cast) is type(value) else json.dumps(cast, ensure_ascii=False)

    def _calls(self, value: Any) -> list[ToolCall] | None:
        """Make calls of what was read; None where it is no call of a tool of the request."""
        calls = []
        names = {tool["function"]["name"] for tool in self.tools}
        for one in value if isinstance(value, list) else [value]:
            match one:
                case {"function": {"name": str(name), **more}} if name in names:
                    arguments = more.get("arguments") or {}
                    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                    call = ToolCall(secrets.token_hex(_ID)[:_ID], name, text)
                    if call.parsed is None:
                        return None
                    calls.append(call)
                case _:
                    return None
        return calls

    def _shown(self, text: str) -> list[Found]:
        if self.hidden:
            text = re.sub("|".join(map(re.escape, self.hidden)), "", text)
        self.text += text
        return [text] if text else []


def _text(json_string: str) -> str | None:
    try:
        return str(bounded.parse_json(json_string))
    except ValueError:
        return None


def _arguments_of(value: Any) -> Mapping[str, Any]:
    """Return the arguments of a call that was read; none where it is no call."""
    match value:
        case {"function": {"arguments": dict(arguments)}}:
            return arguments
    return {}


@dataclass
class Readers:
    """Readers of all answers to a request, by choice.

    noted   log-probabilities of text that is held back
    """

    readers: Sequence[Reader]
    noted: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    token_ids: dict[int, int] = field(default_factory=dict)

    def pass_on(self, on_piece: Callable[[Piece], None]) -> Callable[[Piece], None]:
        """Return what takes pieces of text as they are generated, and passes texts and calls on."""

        def take(piece: Piece) -> None:
            self.noted[piece.choice] = self.noted.get(piece.choice, ()) + piece.logprobs
            self.token_ids[piece.choice] = piece.token_id
            self._send(piece.choice, self.readers[piece.choice].feed(piece.text), on_piece)

        return take

    def finish(self, on_piece: Callable[[Piece], None]) -> None:
        """Pass on what is left at the end of all answers."""
        for choice, reader in enumerate(self.readers):
            self._send(choice, reader.finish(), on_piece)

    def of_choice(self, choice: int) -> dict[str, Any]:
        """Return what of a choice is not as it was generated."""
        return {"text": self.readers[choice].text, "tool_calls": tuple(self.readers[choice].calls)}

    def _send(self, choice: int, found: Sequence[Found], on_piece: Callable[[Piece], None]) -> None:
        for one in found:
            piece = Piece(self.token_ids.get(choice, 0), "", self.noted.pop(choice, ()), choice)
            on_piece(replace(piece, text=one) if isinstance(one, str) else replace(piece, call=one))
