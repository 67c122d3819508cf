"""Each way of writing calls of tools: what is read, what a grammar asks for, and that the two are the same."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import load_response_template

from remoe_cli.runtime.answer import CallPiece, ToolCall
from remoe_cli.runtime.follow import Grammars
from remoe_cli.runtime.grammar import tools_grammar
from remoe_cli.runtime.tool_calls import Reader
from remoe_cli.runtime.tool_formats import FORMATS, ToolFormat, format_of, why_none
from tests.support.chatml import TEMPLATE

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = {"city": 'Rome, "Roma"', "days": 3}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "other-one")]
JSON = json.dumps(ARGUMENTS)
# How models of each format write a call: what their chat templates show them.
WRITTEN = {
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome, \"Roma\"\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome, \"Roma\"</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "mistral, since its version 11": f"[TOOL_CALLS]weather[ARGS]{JSON}",
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}]',
    "gpt-oss": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{JSON}",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{JSON}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{JSON}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]',
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>',
    "llama": f'{{"name": "weather", "parameters": {JSON}}}',
}  # fmt: skip
# Other ways in which such models write it.
ALSO = [
    ("gpt-oss", f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>"),
    ("deepseek", f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {JSON}, "id": "123456789"}}]'),
    ("llama", f'<|python_tag|>{{"name": "weather", "parameters": {JSON}}}'),
    ("hermes", f'<tool_call>{{"arguments": {JSON}, "name": "weather"}}</tool_call>'),
]
# Those whose checkpoints have the tags as tokens.
TAGS = (
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]"),
    *("<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|start|>", "<|end|>", "<|tool_call|>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|tool_calls_section_end|>", "<|python_tag|>", "<|python_end|>"),
)


def row(name: str) -> ToolFormat:
    return next(each for each in FORMATS if each.name == name)


def reader(form: ToolFormat, **more: Any) -> Reader:
    return Reader(form.field, TOOLS, **more)


def read(form: ToolFormat, text: str, step: int, **more: Any) -> tuple[str, list[ToolCall], str]:
    """What is read in steps of some characters; the last value is the text that was passed on meanwhile."""
    made, found = reader(form, **more), []
    for at in range(0, len(text), step):
        found += made.feed(text[at : at + step])
    found += made.finish()
    joined: list[ToolCall] = []
    for piece in (each for each in found if isinstance(each, CallPiece)):
        if piece.first:
            joined.append(ToolCall(piece.call.id, piece.call.name, ""))
        joined[-1] = replace(joined[-1], arguments=joined[-1].arguments + piece.delta)
        assert joined[-1] == piece.call
    assert joined == made.calls and all(isinstance(each, str) or each.last for each in found[-1:])
    return made.text, made.calls, "".join(each for each in found if isinstance(each, str))


@cache
def tokens(tags: tuple[str, ...]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.add_tokens([AddedToken(tag, special=tag.startswith("["), normalized=False) for tag in tags])
    return made


@cache
def ll_tokens(made: Tokenizer) -> LLTokenizer:
    return LLTokenizer(made.to_str(), eos_token=made.token_to_id("<|endoftext|>"))


def accepts(made: Tokenizer, grammar: str, text: str) -> tuple[bool, bool]:
    """Whether a grammar allows a text, and whether the text may end there."""
    matcher = LLMatcher(ll_tokens(made), grammar, log_level=0)
    assert not matcher.get_error()
    ids = made.encode(text).ids
    return matcher.try_consume_tokens(ids) == len(ids), matcher.is_accepting()


def test_every_format_has_its_own_sample() -> None:
    assert list(WRITTEN) == [each.name for each in FORMATS]


@pytest.mark.parametrize(("name", "text"), [*WRITTEN.items(), *ALSO])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_call_is_read_whatever_the_pieces(name: str, text: str, step: int) -> None:
    _, (call,), _ = read(row(name), text, step)
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    assert len(call.id) == 9 and call.id.isalnum(), "what Mistral's chat templates take"


@pytest.mark.parametrize("name", WRITTEN)
def test_text_before_calls_stays_and_tokens_that_end_an_answer_do_not(name: str) -> None:
    form = row(name)
    if name == "llama":  # a call is the whole answer
        assert read(form, "Hello. " + WRITTEN[name], 3)[:2] == ("Hello. " + WRITTEN[name], [])
        return
    text, calls, passed = read(form, f"I look. {WRITTEN[name]}<end>", 1000, ends=("<end>",), hidden=form.dropped)
    assert (text.strip(), len(calls), passed) == ("I look.", 1, text)


def test_special_tokens_that_are_no_call_are_not_shown() -> None:
    pieces = ["<|channel|>", "analysis", "<|message|>", "Look", ".", "<|end|>", ALSO[0][1]]
    made = reader(row("gpt-oss"), hidden=("<|channel|>", "<|message|>", "<|end|>", "<|start|>"))
    found = [each for piece in pieces for each in made.feed(piece)] + made.finish()
    (call,) = made.calls
    assert found == ["analysis", "Look", ".", CallPiece(call, call.arguments, True, True)] and made.text == "analysisLook."


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("tags", [TAGS, ()], ids=["tokens", "text"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_grammar_asks_for_is_what_is_read(name: str, tags: tuple[str, ...], several: bool) -> None:
    form, made, written = row(name), tokens(tags), WRITTEN[name]
    assert form.writing
    added = {tag: made.token_to_id(tag) for tag in tags}
    tools = [(tool["function"]["name"], SCHEMA) for tool in TOOLS]  # type: ignore[index]
    options: dict[str, Any] = {"several": several}
    grammar = tools_grammar(tools, form.writing, added, [256], needed=True, **options)
    assert accepts(made, grammar, written) == (True, True)
    assert accepts(made, grammar, written.replace("weather", "other-one")) == (True, True)
    for wrong in ("Hello", written.replace("weather", "third"), written.replace("3", '"x"'), written.replace("days", "daze")):
        assert accepts(made, grammar, wrong)[0] is False, wrong
    between = form.writing.between
    assert accepts(made, grammar, f"{written}{between}{written}" if not form.writing.before else written)[0] is (
        (several and between is not None) or bool(form.writing.before)
    )
    otherwise = tools_grammar(tools, form.writing, added, [256], needed=False, otherwise='%json {"const": 7}', **options)
    assert accepts(made, otherwise, "7") == accepts(made, otherwise, written) == (True, True)
    if form.writing.opening is None:
        with pytest.raises(ValueError, match="cannot be told from other text"):
            tools_grammar(tools, form.writing, added, [256], needed=False, **options)
        return
    free = tools_grammar(tools, form.writing, added, [256], needed=False, **options)
    for right in ("Hello", written, f"I look.\n{written}"):
        assert accepts(made, free, right) == (True, True), right
    assert accepts(made, free, written.replace("3", '"x"'))[0] is False
    twice = accepts(made, free, f"{written}\n{written}")[0]
    assert twice is several


def test_a_call_that_cannot_be_read_or_of_no_tool_stays_text() -> None:
    form = row("hermes")
    good = WRITTEN["hermes"]
    for wrong in (
        "<tool_call>\n{not json}\n</tool_call>",
        '<tool_call>{"name": "third", "arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        f"<tool_call>{'[' * 10_000}</tool_call>",
    ):
        for step in (1, 4) if len(wrong) < 100 else (500,):
            text, calls, passed = read(form, f"a {wrong} b\n{good}", step)
            assert (len(calls), text) == (1, passed), wrong
            assert wrong in text and text.startswith("a ") and " b" in text


# What is passed on before a call is complete, and in how many pieces it comes if characters come one by one.
STREAMED = {"qwen3-coder": 3, "glm": 3, "mistral": 1, "granite": 1}


@pytest.mark.parametrize("name", WRITTEN)
def test_arguments_come_in_pieces_where_the_name_is_known(name: str) -> None:
    form, text = row(name), WRITTEN[name]
    made, found = reader(form), []
    for character in text:
        found += made.feed(character)
    found += made.finish()
    pieces = [each.delta for each in found if isinstance(each, CallPiece) and each.delta]
    assert len(pieces) == STREAMED.get(name, len(JSON))
    if name not in ("mistral", "granite"):
        assert "days" not in pieces[0] and json.loads("".join(pieces)) == ARGUMENTS


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_an_answer_that_ends_in_a_call_has_what_there_is_of_it(name: str, step: int) -> None:
    form, whole = row(name), WRITTEN[name]
    text = whole[: whole.index("Roma") + 4]
    shown, calls, _ = read(form, text, step)
    if name in ("mistral", "granite"):
        assert (shown, calls) == (text, [])
        return
    (call,) = calls
    begun = "" if name in ("qwen3-coder", "glm") else '{"city": "Rome, \\"Roma'
    assert (call.name, call.arguments, call.parsed, shown.strip()) == ("weather", begun, None, "")


CASTS = {
    '{"days": "3"}': '{"days": 3}',
    '{"city": "3", "days": "3" , "other": "3"}': '{"city": "3", "days": 3 , "other": "3"}',
    '{"days": {"days": "3"}}': '{"days": {"days": "3"}}',
    '{"days": "x\\"}", "city":"\\u00e9"}': '{"days": "x\\"}", "city":"\\u00e9"}',
    '{"days":["3", "4"], "city": []}': '{"days":[3, 4], "city": []}',
    '{"city": "\\\\", "days": "\\u00e9", "days": "7"}': '{"city": "\\\\", "days": "\\u00e9", "days": 7}',
    '{"maybe": "3", "city": 1}': '{"maybe": 3, "city": 1}',
    "{}": "{}",
}
MAYBE = {"maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}


@pytest.mark.parametrize("written", CASTS)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_arguments_are_as_written_but_for_those_that_the_schema_has_otherwise(written: str, step: int) -> None:
    """So does transformers: what it makes of them is the same JSON."""
    form = row("mistral, since its version 11")
    text = f"[TOOL_CALLS]weather[ARGS]{written}"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA | {"properties": SCHEMA["properties"] | MAYBE}}}]
    made = Reader(form.field, tools)
    for at in range(0, len(text), step):
        made.feed(text[at : at + step])
    assert made.finish() == [] and made.text == ""
    (call,) = made.calls
    assert call.arguments == CASTS[written]
    template = load_response_template({"start_anchor": "\0", "fields": {"tool_calls": dict(form.field)}})
    (of_transformers,) = parse_response(text, template, prefix="", tools=tools)["tool_calls"]
    assert call.parsed == of_transformers["function"]["arguments"]


def test_what_is_no_json_is_passed_on_as_it_is() -> None:
    for arguments in ("{nonsense", '{"city": NaN}', '{"a" "b"}', '{"city": "x",, }'):
        _, calls, _ = read(row("mistral, since its version 11"), f"[TOOL_CALLS]weather[ARGS]{arguments}", 1)
        assert [(call.arguments, call.parsed) for call in calls] == [(arguments, None)]
    for step in (1, 9):
        shown, (call,), _ = read(row("mistral, since its version 11"), f"[TOOL_CALLS]weather[ARGS]{JSON} and more{{", step)
        assert (call.parsed, shown) == (ARGUMENTS, " and more{")


@given(
    arguments=st.dictionaries(
        st.sampled_from(["city", "days", "a", 'q"']),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
        max_size=4,
    ),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    ascii_only=st.booleans(),
    name=st.sampled_from([name for name in WRITTEN if name not in STREAMED]),
)
def test_pieces_are_the_arguments_that_transformers_reads(arguments: dict[str, Any], steps: list[int], ascii_only: bool, name: str) -> None:
    form, written = row(name), json.dumps(arguments, ensure_ascii=ascii_only)
    text = WRITTEN[name].replace(JSON, written)
    made, at, found = reader(form), 0, []
    for step in itertools.cycle(steps):
        found += made.feed(text[at : (at := at + step)])
        if at >= len(text):
            break
    found += made.finish()
    pieces = [each for each in found if isinstance(each, CallPiece)]
    assert "".join(piece.delta for piece in pieces) == made.calls[0].arguments and pieces[-1].last
    template = load_response_template({"start_anchor": "\0", "fields": {"tool_calls": dict(form.field)}})
    wanted = parse_response(text, template, prefix="", tools=TOOLS)["tool_calls"]
    (of_transformers,) = wanted if isinstance(wanted, list) else [wanted]
    assert made.calls[0].parsed == of_transformers["function"]["arguments"]


def test_a_checkpoints_own_template_is_used_first() -> None:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=tokens(TAGS))
    assert format_of(tokenizer) is None and "has no chat template that shows" in why_none(tokenizer), "it has no chat template"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert format_of(tokenizer) is None and "has no chat template that shows" in why_none(tokenizer), "its chat template shows no tools"
    tokenizer.chat_template = "{{ tools }} {{ messages[0].content }}"
    assert format_of(tokenizer) is None and "its calls cannot be read" in why_none(tokenizer), "how it writes calls is not known"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert format_of(tokenizer) is None
    tokenizer.chat_template = TEMPLATE
    found = format_of(tokenizer)
    assert found is row("hermes")
    own = {"open": "<<", "close": ">>", "content": "json", "repeats": True, "transform": {"type": "function", "function": "{content}"}}
    tokenizer.response_template = {"start_anchor": "x", "fields": {"tool_calls": own, "content": {"close": "<|endoftext|>"}}}
    mine = format_of(tokenizer)
    assert mine and read(mine, f'a<<{{"name": "weather", "arguments": {JSON}}}>>b', 1)[:1] == ("ab",)


def test_a_model_that_cannot_follow_says_why() -> None:
    bytes_only = SimpleNamespace(backend_tokenizer=tokens(()))
    for grammars, why in (
        (Grammars(bytes_only, 257, ()), "no token that ends an answer"),
        (Grammars(SimpleNamespace(backend_tokenizer=None), 257, (256,)), "cannot follow a grammar"),
        (Grammars(bytes_only, 257, (256,)), r'Unimplemented keys: \["not"\]'),
    ):
        with pytest.raises(Exception, match=why) as caught:
            grammars.check('start: %json {"type": "object", "properties": {"a": {"not": {}}}}')
        assert getattr(caught.value, "kind", "") == "Usage"
