"""The arguments of a call of a tool while the model writes them.

They are passed on as the model writes them. A value that transformers would cast to the type of the tool's schema, such as "3" for an
integer, waits until it is complete. So the pieces of a streamed answer are the arguments of one that is not streamed.

Source: OpenAI's and Anthropic's streams, whose clients join pieces of JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remoe_cli import bounded

_NAMED = {"name": "{name}", "arguments": "{content}"}
_STRING = r'"(?:[^"\\]|\\.)*"'
_CONTENT_KEY = re.compile(r"\{content\.(\w+)\}")


def json_begin(region: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return what stands in a region before the JSON of arguments.

    Its group `name` is the JSON of a name that stands there. It is None where arguments are no JSON object after the name: in lists of
    calls, tags, or a dialect.
    """
    if region.get("content") != "json" or region.get("content_args") or region.get("transform_each"):
        return None
    transform = region.get("transform")
    match transform.get("function") if isinstance(transform, Mapping) else None:
        case made if made == _NAMED:
            return re.compile(r"\s*(?=\{)")
        case "{content}":
            name, arguments = "name", "arguments"
        case {"name": str(of_name), "arguments": str(of_arguments), **rest} if not rest:
            found = _CONTENT_KEY.fullmatch(of_name), _CONTENT_KEY.fullmatch(of_arguments)
            if found[0] is None or found[1] is None:
                return None
            name, arguments = found[0][1], found[1][1]
        case _:
            return None
    return re.compile(rf'\s*\{{\s*"{name}"\s*:\s*(?P<name>{_STRING})\s*,\s*"{arguments}"\s*:\s*(?=\{{)')


def tag_of(region: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return the tag of one argument, in a region that has each in a tag; None for another region."""
    transform, made = region.get("transform"), region.get("content_args") or {}
    named = isinstance(transform, Mapping) and transform.get("function") == _NAMED
    if region.get("content") != "xml-inline" or not named or made.get("merge_duplicates"):
        return None
    return re.compile(made["tag_pattern"], re.DOTALL)


@dataclass
class JsonArguments:
    """Arguments that are written as a JSON object, read from its first brace on.

    properties   of the tool's schema
    cast         (name, JSON of its value) -> JSON of the value as the schema has it
    done         whether the object is complete
    rest         what came after it
    """

    properties: Mapping[str, Any]
    cast: Callable[[str, str], str]
    done: bool = False
    rest: str = ""
    _out: list[str] = field(default_factory=list)
    _held: list[str] | None = None  # an argument that waits
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _in_value: bool = False  # of an argument, not in its name
    _begun: bool = False  # whether that value has
    _name: list[str] = field(default_factory=list)

    def feed(self, text: str) -> str:
        """Read on; returns what can be passed on."""
        for at, character in enumerate(text):
            if self.done:
                self.rest += text[at:]
                break
            self._read(character)
        return self._take()

    def finish(self, *, closed: bool) -> str:
        """Return what waits, where nothing comes any more."""
        self._out += self._held or ()
        self._held = None
        return self._take()

    def _take(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    def _put(self, character: str) -> None:
        (self._out if self._held is None else self._held).append(character)

    def _read(self, character: str) -> None:
        top = self._depth == 1
        if self._in_string:
            if top and not self._in_value:
                self._name.append(character)
            self._put(character)
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            if top and self._in_value and not self._in_string:
                self._release()
            return
        if top and self._in_value and not self._begun and not character.isspace():
            self._begun = True
            if not _stays(self.properties.get(self._key), character):
                self._held = []
        match character:
            case '"':
                self._in_string = True
                if top and not self._in_value:
                    self._name = [character]
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
            case ":" | "," if top:
                self._in_value, self._begun = character == ":", False
        self._put(character)
        if character in "}]" and self._depth == 1:
            self._release()
        self.done = self._depth == 0

    @property
    def _key(self) -> str:
        try:
            return str(bounded.parse_json("".join(self._name)))
        except ValueError:
            return ""

    def _release(self) -> None:
        """Pass on an argument that has waited."""
        if self._held is not None:
            text, self._held = "".join(self._held), None
            self._out.append(self.cast(self._key, text))


def _stays(schema: object, first: str) -> bool:
    """Tell whether transformers leaves a value as it is written, by its schema and its first character."""
    if first not in '"[' or not isinstance(schema, Mapping):
        return True
    if {"anyOf", "oneOf", "nullable"} & schema.keys():
        return False
    return schema.get("type") in (None, "string" if first == '"' else "array")


@dataclass
class TagArguments:
    """Arguments that are written in tags; each is passed on when its tag is complete.

    tag     of one argument
    read    makes arguments of the region's text so far, as transformers does
    done    always False: only the end of the region ends them
    """

    tag: re.Pattern[str]
    read: Callable[[str], Mapping[str, Any]]
    done: bool = False
    rest: str = ""
    _text: str = ""
    _at: int = 0  # behind the last complete tag
    _sent: list[str] = field(default_factory=list)

    def feed(self, text: str) -> str:
        """Read on; returns what can be passed on."""
        self._text += text
        found = self.tag.search(self._text, self._at)
        if found is None:
            return ""
        while found is not None:
            self._at = found.end()
            found = self.tag.search(self._text, self._at)
        made = ""
        for name, value in self.read(self._text[: self._at]).items():
            if name not in self._sent:
                made += f"{', ' if self._sent else '{'}{json.dumps(name, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
                self._sent.append(name)
        return made

    def finish(self, *, closed: bool) -> str:
        """Return the end of the object, where the region has been `closed`."""
        return ("}" if self._sent else "{}") if closed else ""
