"""Reading the calls of tools out of an answer while it is generated.

transformers' own parser finds them (utils/chat_parsing). What it cannot read, or what calls no tool of the request, stays text.
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
from remoe_cli.runtime.answer import Piece, TokenLogprob, ToolCall

_ID = 9  # characters: what Mistral's chat templates take, and no other minds
Found = str | ToolCall


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
    _template: ResponseTemplate = field(init=False)
    _parser: ResponseParser = field(init=False)

    def __post_init__(self) -> None:
        fields = {"tool_calls": dict(self.region), "content": {"content": "text", "content_args": {"strip": False}}}
        # The answer's own text is all that is read, so there is no place in the prompt where it begins.
        self._template = load_response_template({"start_anchor": "\0", "fields": fields})
        self._parser = self._new_parser()

    def feed(self, text: str) -> list[Found]:
        """Read on; returns texts and calls as they are complete."""
        if self._ended:
            return []
        ends = [at for end in self.ends if (at := text.find(end)) >= 0]
        if ends:
            text, self._ended = text[: min(ends)], True
        self._raw += text
        try:
            events = self._parser.feed(text)
        except (ValueError, KeyError):
            return self._unread()
        return self._found(events)

    def finish(self) -> list[Found]:
        """Read what is left at the end of the answer."""
        try:
            events = self._parser.finalize()[1]
        except (ValueError, KeyError):
            return self._shown(self._raw[self._at :])
        self._ended = True
        return self._found(events)

    def _new_parser(self) -> ResponseParser:
        return ResponseParser(self._template, prefix="", tools=[dict(tool) for tool in self.tools])

    def _found(self, events: Sequence[Mapping[str, Any]]) -> list[Found]:
        found: list[Found] = []
        for event in events:
            match event:
                case {"type": "region_chunk", "field": "content", "text": str(text)}:
                    self._at += len(text)
                    found += self._shown(text)
                case {"type": "region_close", "field": "tool_calls", "value": value}:
                    begin, self._at = self._at, self._region_end()
                    calls = self._calls(value)
                    found += self._shown(self._raw[begin : self._at]) if calls is None else calls
                    self.calls += calls or ()
        return found

    def _region_end(self) -> int:
        """Return where the call ends that begins next."""
        of = self._template.fields["tool_calls"]
        begin = of.open_re.search(self._raw, self._at)
        end = of.close_re.search(self._raw, begin.end()) if begin and of.close_re else None
        return int(end.end()) if end else len(self._raw)

    def _unread(self) -> list[Found]:
        """Take a call that cannot be read, and what came with it, for text, and read on behind it."""
        begin, self._at = self._at, self._region_end()
        rest, self._raw = self._raw[self._at :], self._raw[: self._at]
        self._parser = self._new_parser()
        return [*self._shown(self._raw[begin:]), *self.feed(rest)]

    def _calls(self, value: Any) -> list[ToolCall] | None:
        """Make calls of what was read; None where it is no call of a tool of the request."""
        calls = []
        names = {tool["function"]["name"] for tool in self.tools}
        for one in value if isinstance(value, list) else [value]:
            match one:
                case {"function": {"name": str(name), **more}} if name in names:
                    arguments = more.get("arguments") or {}
                    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                    if not _is_object(text):
                        return None
                    calls.append(ToolCall(secrets.token_hex(_ID)[:_ID], name, text))
                case _:
                    return None
        return calls

    def _shown(self, text: str) -> list[Found]:
        if self.hidden:
            text = re.sub("|".join(map(re.escape, self.hidden)), "", text)
        self.text += text
        return [text] if text else []


def _is_object(text: str) -> bool:
    try:
        return isinstance(bounded.parse_json(text, finite=True), dict)
    except ValueError:
        return False


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
            on_piece(replace(piece, text=one) if isinstance(one, str) else replace(piece, tool_calls=(one,)))
