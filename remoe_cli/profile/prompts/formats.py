"""How a row holds a prompt: one table of the formats in which people publish and keep prompts.

A row of the table names the field by which a format is known and the function that reads it. The first row of a source decides the
format of all its rows. `--field` names another field; `a.b.0.c` goes into objects and lists.

A conversation becomes what the model is served when it gives the last answer: the messages before that answer. Where this is one
message of the user and nothing else, the prompt is its text, so that the same question is the same prompt in every format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from remoe_cli import bounded
from remoe_cli.artifacts import escaped
from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Conversation, Prompt, conversation, is_message

Row = Mapping[str, Any]
DEFAULT_FIELD = "prompt"
_SHOWN_NAMES = 30
_CORRECT = "Correct the row, or choose another --field."


@dataclass(frozen=True)
class PromptFormat:
    """One way in which rows hold a prompt.

    field     the field by which the format is known
    read      makes the prompt of a row; the text is where the row is, for errors. An empty text asks nothing.
    also      further fields that `read` looks at
    beside    fields without which `field` does not mean this format
    is_text   whether `field` itself is a text, which is then all that --field asks for
    """

    field: str
    read: Callable[[Row, str], Prompt]
    also: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    is_text: bool = False

    def columns(self, names: Sequence[str]) -> list[str]:
        """Return those of a table's columns that hold the prompt."""
        return [name for name in names if name in {_root(self.field, names), *self.also, *self.beside}]


def choose(where: str, names: Collection[str], field: str) -> PromptFormat:
    """Find the format of rows with the fields `names`: that of `field`, else the first one that fits.

    Raises: UsageError, whose message begins with `where` and names the fields, when no format fits.
    """
    if _root(field, names) is not None:
        return _named(field)
    if field == DEFAULT_FIELD:
        for known in FORMATS:
            if {known.field, *known.beside} <= set(names):
                return known
    raise no_field(where, field, names)


def no_field(where: str, field: str, names: Iterable[object]) -> UsageError:
    known = ", ".join(" with ".join((known.field, *known.beside)) for known in FORMATS)
    return UsageError(
        f"{where} has no field {field!r}; it has {_listing(names) or 'none'}.",
        f"Name the field of the prompts with --field, a nested one as a.b.0.c. Without --field, remoe looks for {DEFAULT_FIELD}, {known}.",
    )


def _listing(names: Iterable[object]) -> str:
    """List the first names of fields, in characters that a terminal shows."""
    shown = [escaped(str(name)[:40]) for name in islice(names, _SHOWN_NAMES + 1)]
    return ", ".join([*shown[:_SHOWN_NAMES], *(["..."] if len(shown) > _SHOWN_NAMES else [])])


def messages_of(value: object, where: str) -> Prompt | None:
    """Read a row that is itself a list of messages; None for any other list."""
    return _served(value, where) if isinstance(value, list) and value and all(map(is_message, value)) else None


def _root(field: str, names: Collection[str]) -> str | None:
    """Return the one of `names` in which the field is or begins."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), None)


def _find(value: object, path: str) -> Any:
    """Go down a path such as a.b.0.c, also into JSON that is a text.

    Raises: LookupError where it leads nowhere.
    """
    if isinstance(value, str):
        try:
            value = bounded.parse_json(value)
        except ValueError:
            raise LookupError(path) from None
    if isinstance(value, Mapping) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, list) and head.isascii() and head.isdecimal() and len(head) < 10:
        value = value[int(head)]
    elif isinstance(value, Mapping) and rest:
        value = value[head]
    else:
        raise LookupError(path)
    return _find(value, rest) if rest else value


def _field(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise no_field(where, name, row)
    return row[name]


def _not_text(where: str, field: str, value: object) -> UsageError:
    what = "null" if value is None else f"of type {type(value).__name__}"
    return UsageError(f"{where}: the field {field!r} is {what}, not text.", _CORRECT)


def _text(row: Row, name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise _not_text(where, name, value)
    return value


def _named(field: str) -> PromptFormat:
    """Make the format of rows whose `field` holds the prompt.

    The field is a text, a list of messages, or what a format of the table has in a field of this name.
    """
    above, _, name = field.rpartition(".")
    container = next((known for known in FORMATS if known.field == name and not known.is_text), None)

    def read(row: Row, where: str) -> Prompt:
        try:
            value = _find(row, field)
            holder = _unpacked(_find(row, above), where) if above and field not in row else row
        except LookupError:
            raise no_field(where, field, row) from None
        if container and isinstance(holder, Mapping) and name in holder:
            return container.read(holder, where)
        if isinstance(value, str):
            return value
        if (prompt := messages_of(value, where)) is None:
            raise _not_text(where, field, value)
        return prompt

    return PromptFormat(field, read, container.also if container else ())


def _served(messages: object, where: str, tools: object = None, system: object = None) -> Prompt:
    """Return what the model is served when it gives the last answer of a conversation.

    ShareGPT's long conversations are cut into several, of which all but the first may begin with an answer: it is left out, as FastChat
    does, because its question is lost and many templates refuse it.

    Source: FastChat, train/train.py, "Skip the first one if it is not from human".
    """
    messages = _listed(messages, where)
    found = conversation(messages, tools, where=where)
    kept = list(found.messages)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if any(isinstance(message, Mapping) and message.get("from") for message in messages):
        first = next((at for at, message in enumerate(kept) if message["role"] not in ("system", "assistant")), len(kept))
        asked = kept[first:]
        kept = [message for message in kept[:first] if message["role"] == "system" and asked] + asked
    if kept and not any(message["role"] == "system" for message in kept):
        before = conversation([{"role": "system", "content": system}], where=f"{where}: the field 'system'")
        kept = [*before.messages, *kept]
    if not found.tools and len(kept) <= 1 and all(message.keys() == {"role", "content"} and message["role"] == "user" for message in kept):
        return str(kept[0]["content"]) if kept else ""
    return Conversation(tuple(kept), found.tools)


def _unpacked(value: object, where: str) -> object:
    """Return the value that a cell of a table holds as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return bounded.parse_json(value)
    except ValueError as error:
        raise UsageError(f"{where} is text that is not JSON ({error}).", _CORRECT) from None


def _listed(messages: object, where: str) -> list[object]:
    """Return messages as a list; some tables store them as columns, in one object of lists."""
    messages = _unpacked(messages, f"{where}: the list of messages")
    if isinstance(messages, Mapping) and messages and all(isinstance(column, list) for column in messages.values()):
        if len({len(column) for column in messages.values()}) > 1:
            raise UsageError(f"{where}: its messages have {_listing(messages)} of different lengths.", _CORRECT)
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list):
        what = "null" if messages is None else f"of type {type(messages).__name__}"
        raise UsageError(f"{where}: its messages are {what}, not a list.", _CORRECT)
    return messages


def _chat(field: str) -> Callable[[Row, str], Prompt]:
    return lambda row, where: _served(_field(row, field, where), where, row.get("tools"), row.get("system"))


def _turns(row: Row, where: str) -> Prompt:
    """Read the first question; those after it need answers that are not there."""
    turns = _unpacked(_field(row, "turns", where), f"{where}: the field 'turns'")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return turns[0] if turns else ""
    return _served(turns, where)


def _request(field: str) -> Callable[[Row, str], Prompt]:
    """Read the body of a request to an API, in a file of requests."""

    def read(row: Row, where: str) -> Prompt:
        body = _unpacked(_field(row, field, where), f"{where}: the field {field!r}")
        if not isinstance(body, Mapping):
            raise UsageError(f"{where}: the field {field!r} is of type {type(body).__name__}, not an object.", _CORRECT)
        name = next((name for name in ("messages", "prompt", "input") if body.get(name) is not None), None)
        if name is None:
            raise UsageError(f"{where}: its {field} has {_listing(body) or 'no field'}: none of messages, prompt and input.", _CORRECT)
        value = body[name]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]
        if isinstance(value, str) and name != "messages":
            value = [{"role": "user", "content": value}]
        elif name == "prompt" or not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise UsageError(f"{where}: its {field}.{name} is neither one text nor a list of messages.", "Give one prompt a row.")
        return _served(value, where, body.get("tools"), body.get("instructions" if name == "input" else "system"))

    return read


def _instruction(row: Row, where: str) -> Prompt:
    """Join an instruction and its input by a blank line; `history` has earlier questions and answers."""
    context = next((name for name in ("input", "context") if row.get(name) is not None), None)
    texts = [_text(row, "instruction", where), *([_text(row, context, where)] if context else ())]
    question = "\n\n".join(text for text in texts if text.strip())
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UsageError(f"{where}: the field 'history' is not a list of questions with their answers.", _CORRECT)
    before = [{"role": role, "content": text} for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
    return _served([*before, {"role": "user", "content": question}], where, system=row.get("system"))


# In order of precedence; a field `prompt`, or the one of --field, comes before all.
FORMATS: tuple[PromptFormat, ...] = (
    # Source: OpenAI's fine-tuning and chat completions API; TRL, conversational datasets.
    PromptFormat("messages", _chat("messages"), also=("tools", "system")),
    # Source: ShareGPT_V3_unfiltered_cleaned_split.json on the hub; LLaMA-Factory, data/README.md, for `system` and `tools`.
    PromptFormat("conversations", _chat("conversations"), also=("tools", "system")),
    # Source: lmsys/lmsys-chat-1m and allenai/WildChat on the hub.
    PromptFormat("conversation", _chat("conversation"), also=("tools", "system")),
    # Source: FastChat, llm_judge/data/mt_bench/question.jsonl; vLLM's benchmark takes the first turn, too (MTBenchDataset).
    PromptFormat("turns", _turns),
    # Source: OpenAI's guide to the Batch API; vLLM, run_batch.
    PromptFormat("body", _request("body")),
    # Source: Anthropic's Message Batches API.
    PromptFormat("params", _request("params"), beside=("custom_id",)),
    # Source: Amazon Bedrock, format of batch inference data.
    PromptFormat("modelInput", _request("modelInput")),
    # Source: Stanford Alpaca, alpaca_data.json; Dolly for `context`; LLaMA-Factory, data/README.md, for `system` and `history`.
    PromptFormat("instruction", _instruction, also=("input", "context", "system", "history"), is_text=True),
    # Source: FastChat's first Vicuna benchmark, table/question.jsonl. `text` alone may be anything: an answer, a document, a label.
    PromptFormat("text", lambda row, where: _text(row, "text", where), beside=("question_id",), is_text=True),
)
