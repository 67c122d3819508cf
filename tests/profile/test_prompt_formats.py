"""What a row becomes in every format of prompts, alike in every kind of file that can hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Conversation, Prompt, as_text
from remoe_cli.profile.prompts import PromptSet, read_prompts
from remoe_cli.profile.prompts.formats import FORMATS
from tests.profile.test_prompts import refusal
from tests.support.paths import ROOT

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
MORE = {"role": "user", "content": "And then?"}


def chat(*messages: dict[str, Any], tools: tuple[Any, ...] = ()) -> Conversation:
    return Conversation(messages, tools)


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

# The row, and the prompt that it is.
ROWS: dict[str, tuple[dict[str, Any], Prompt]] = {
    "messages": ({"messages": [SYSTEM, ASK, ANSWER]}, chat(SYSTEM, ASK)),
    "messages, one question": ({"messages": [ASK, ANSWER]}, "Why?"),
    "messages, several turns": ({"messages": [ASK, ANSWER, MORE, ANSWER]}, chat(ASK, ANSWER, MORE)),
    "messages, open": ({"messages": [ASK, ANSWER, MORE]}, chat(ASK, ANSWER, MORE)),
    "messages, begun by the assistant": ({"messages": [ANSWER, ASK]}, chat(ANSWER, ASK)),
    "messages, developer": ({"messages": [{"role": "developer", "content": "Be brief."}, ASK]}, chat(SYSTEM, ASK)),
    "messages, no system prompt": ({"messages": [{"role": "system", "content": " "}, ASK]}, "Why?"),
    "messages, parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "input_text", "text": "not?"}]}]},
        "Why\nnot?",
    ),
    "messages, tools": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
        chat(
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            tools=(TOOL,),
        ),
    ),
    "messages, odd calls": (
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": 5}, MORE]},
        chat(ASK, {"role": "assistant", "content": "", "tool_calls": 5}, MORE),
    ),
    "prompt of messages": ({"prompt": [SYSTEM, ASK], "completion": [ANSWER]}, chat(SYSTEM, ASK)),
    "ShareGPT": ({"id": "a_0", "conversations": sharegpt(("human", "Why?"), ("gpt", "Because."))}, "Why?"),
    "ShareGPT, several turns": (
        {"conversations": sharegpt(("human", "Why?"), ("gpt", "Because."), ("human", "And then?"), ("gpt", "No."))},
        chat(ASK, ANSWER, MORE),
    ),
    "ShareGPT, system": ({"conversations": sharegpt(("system", "Be brief."), ("human", "Why?"), ("gpt", "No."))}, chat(SYSTEM, ASK)),
    "ShareGPT, begun by an answer": ({"id": "a_1", "conversations": sharegpt(("gpt", "Because."), ("human", "Why?"))}, "Why?"),
    "ShareGPT, other names": (
        {"conversations": sharegpt(("user", "Why?"), ("chatgpt", "Because."), ("user", "Why?"))},
        chat(ASK, ANSWER, ASK),
    ),
    "ShareGPT, system beside": ({"conversations": sharegpt(("human", "Why?"), ("gpt", "No.")), "system": "Be brief."}, chat(SYSTEM, ASK)),
    "conversation": ({"conversation_id": "x", "conversation": [ASK, ANSWER]}, "Why?"),
    "MT-Bench": ({"question_id": 81, "category": "writing", "turns": ["Why?", "And then?"]}, "Why?"),
    "Vicuna's benchmark": ({"question_id": 1, "text": "Why?", "category": "generic"}, "Why?"),
    "Alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2"),
    "Alpaca, no input": ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
    "Dolly": ({"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "qa"}, "Add.\n\n1 and 2"),
    "Alpaca, history": (
        {"instruction": "And then?", "input": "", "system": "Be brief.", "history": [["Why?", "Because."]]},
        chat(SYSTEM, ASK, ANSWER, MORE),
    ),
    "batch, chat": (
        {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [SYSTEM, ASK]}},
        chat(SYSTEM, ASK),
    ),
    "batch, completion": ({"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Why?"}}, "Why?"),
    "batch, list of one": ({"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["Why?"]}}, "Why?"),
    "batch, response": (
        {"custom_id": "r", "method": "POST", "url": "/v1/responses", "body": {"input": "Why?", "instructions": "Be brief."}},
        chat(SYSTEM, ASK),
    ),
    "batch, items": (
        {
            "custom_id": "r",
            "url": "/v1/responses",
            "body": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}]},
        },
        "Why?",
    ),
    "batch, Anthropic": (
        {"custom_id": "r", "params": {"model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "Be brief."}], "messages": [ASK]}},
        chat(SYSTEM, ASK),
    ),
    "batch, Bedrock": (
        {"recordId": "r", "modelInput": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}},
        "Why?",
    ),
}


def read(path: Path, field: str = "prompt") -> tuple[Prompt, ...]:
    return read_prompts(str(path), field).texts


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_model_is_served(name: str, tmp_path: Path) -> None:
    row, prompt = ROWS[name]
    for path, content in (("a.jsonl", json.dumps(row)), ("b.json", json.dumps([row])), ("c.json", json.dumps(row, indent=2))):
        (tmp_path / path).write_text(content)
        assert read(tmp_path / path) == (prompt,)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (prompt,)


@pytest.mark.parametrize("name", ROWS)
def test_a_column_of_a_csv_may_hold_json(name: str, tmp_path: Path) -> None:
    row, prompt = ROWS[name]
    if "prompt" in row or "history" in row:
        return  # a text is a prompt there
    cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
    lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in (row, cells)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert read(tmp_path / "a.csv") == (prompt,)


def test_the_same_question_is_the_same_prompt_in_every_format(tmp_path: Path) -> None:
    digests = set()
    for number, (row, prompt) in enumerate(ROWS.values()):
        if prompt == "Why?":
            (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
            digests.add(read_prompts(str(tmp_path / f"{number}.jsonl")).sha256)
    assert digests == {PromptSet("", "", ("Why?",)).sha256}


def test_conversations_have_a_digest_that_sees_roles_and_never_changes() -> None:
    prompts = [chat(SYSTEM, ASK), chat(ASK, SYSTEM), chat(SYSTEM, MORE), chat(ASK, ASK), chat(SYSTEM, ASK, tools=(TOOL,))]
    assert len({PromptSet("", "", (prompt,)).sha256 for prompt in prompts}) == len(prompts)
    known = PromptSet("", "", (chat(SYSTEM, ASK), "one")).sha256
    assert known == "5a6c34afb78a60606e66d898873ff4f185a3ff989d30edfd97aaabd1c3ee68af"


def test_messages_that_are_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([SYSTEM, ASK, ANSWER], indent=1))
    assert read(tmp_path / "a.json") == (chat(SYSTEM, ASK),)
    (tmp_path / "a.jsonl").write_text(json.dumps([ASK]) + "\n" + json.dumps([SYSTEM, ASK]) + "\n")
    assert read(tmp_path / "a.jsonl") == ("Why?", chat(SYSTEM, ASK))


def test_a_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", " ", "two"]')
    found = read_prompts(str(tmp_path / "a.json"))
    assert (found.texts, found.rows, found.skipped) == (("one", "two"), (1, 3), 1)
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n')
    assert read(tmp_path / "a.jsonl") == ("one", "two")


def test_columns_of_lists_are_messages_as_well(tmp_path: Path) -> None:
    """As datasets stores a Sequence of objects."""
    row = {"conversations": {"from": ["human", "gpt", "human"], "value": ["Why?", "Because.", "And then?"]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (chat(ASK, ANSWER, MORE),)


def test_rows_that_ask_nothing_are_counted(tmp_path: Path) -> None:
    turns = [[], sharegpt(("gpt", "Because.")), sharegpt(("system", "Be brief."), ("gpt", "No.")), sharegpt(("human", " "))]
    rows = [{"conversations": each} for each in (*turns, sharegpt(("human", "Why?")))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(str(tmp_path / "a.jsonl"))
    assert (found.texts, found.rows, found.skipped, found.field) == (("Why?",), (5,), 4, "conversations")
    assert found.where(0) == f"{tmp_path / 'a.jsonl'}, row 5"
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]))
    assert "holds no prompts: its 1 rows ask nothing" in refusal(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ("request.body.messages", chat(SYSTEM, ASK)),
        ("request.body", chat(SYSTEM, ASK)),
        ("request.body.messages.1.content", "Why?"),
        ("log.x.y", "dotted"),
        ("packed.messages", chat(SYSTEM, ASK)),
        ("list.0.q", "first"),
        ("instruction", "Add."),
    ],
)
def test_a_field_may_be_anywhere(field: str, prompt: Prompt, tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "input": "1",
        "request": {"body": {"messages": [SYSTEM, ASK]}},
        "log.x.y": "dotted",
        "packed": json.dumps({"messages": [SYSTEM, ASK]}),
        "list": [{"q": "first"}, {"q": "second"}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = read_prompts(str(tmp_path / name), field)
        assert (found.texts, found.field) == ((prompt,), field)


@pytest.mark.parametrize(
    "field", ["request.bodies", "request.0", "list.2.q", "list.x", "request.body.text.more", "list.-1.q", "list..q", "."]
)
def test_a_path_that_leads_nowhere(field: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"request": {"body": {"text": "a"}}, "list": [{"q": "b"}]}))
    assert f"row 1 has no field {field!r}; it has request, list" in refusal(tmp_path / "a.jsonl", field)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "note": "a"}], "row 1 has no field 'prompt'; it has id, note"),
        ([{"messages": [ASK]}, {"text": "a"}], "row 2 has no field 'messages'; it has text"),
        ([{"messages": None}], "row 1: its messages are null, not a list"),
        ([{"messages": 5}], "row 1: its messages are of type int, not a list"),
        ([{"messages": "Why?"}], "row 1: the list of messages is text that is not JSON"),
        ([{"messages": ["Why?"]}], "row 1: message 1 is of type str, not an object with role and content"),
        ([{"messages": [ASK, {"role": "narrator", "content": "x"}]}], "row 1: message 2 has the role 'narrator', which is not known"),
        ([{"messages": [{"content": "x"}]}], "row 1: message 1 has the role None"),
        ([{"messages": [{"role": ["user"], "content": "x"}]}], "row 1: message 1 has the role ['user']"),
        ([{"messages": [{"role": "user", "content": 5}]}], "row 1: message 1 has content of type 'int', which is not text"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}],
            "row 1: message 1 has content of type 'image_url', which is not text",
        ),
        ([{"messages": [SYSTEM, {"role": "user", "content": "a \ud83d"}]}], "row 1: message 2 holds half of a surrogate pair"),
        ([{"messages": [ASK], "system": {"a": 1}}], "row 1: the field 'system': message 1 has content of type None"),
        ([{"messages": [ASK], "system": "\udfff"}], "row 1: the field 'system': message 1 holds half of a surrogate pair"),
        ([{"messages": [ASK], "tools": "add"}], "row 1: the field 'tools' is text that is not JSON"),
        ([{"messages": [ASK], "tools": {"a": 1}}], "row 1: the tools are of type dict, not a list"),
        ([{"conversations": {"from": ["human"], "value": []}}], "row 1: its messages have from, value of different lengths"),
        ([{"turns": None}], "row 1: its messages are null, not a list"),
        ([{"body": {"model": "m"}}], "row 1: its body has model: none of messages, prompt and input"),
        ([{"body": 5}], "row 1: the field 'body' is of type int, not an object"),
        ([{"body": {"prompt": ["a", "b"]}}], "row 1: its body.prompt is neither one text nor a list of messages"),
        ([{"body": {"prompt": [1, 2]}}], "row 1: its body.prompt is neither one text nor a list of messages"),
        ([{"body": {"messages": "Why?"}}], "row 1: its body.messages is neither one text nor a list of messages"),
        ([{"instruction": None}], "row 1: the field 'instruction' is null, not text"),
        ([{"instruction": "Add.", "input": 5}], "row 1: the field 'input' is of type int, not text"),
        ([{"instruction": "Add.", "history": ["a"]}], "row 1: the field 'history' is not a list of questions with their answers"),
        ([{"text": "Why?"}], "row 1 has no field 'prompt'; it has text"),
        ([{"question_id": 1, "text": 5}], "row 1: the field 'text' is of type int, not text"),
        ([5], "row 1: a JSON int, not an object"),
    ],
)
def test_what_is_wrong_with_a_row(rows: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refusal(tmp_path / "a.jsonl")


def test_an_unknown_row_is_told_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "note": "a"}')
    with pytest.raises(UsageError) as caught:
        read_prompts(str(tmp_path / "a.jsonl"))
    assert "--field" in caught.value.hint
    assert all(name in caught.value.hint for name in ("prompt", "messages", "conversations", "turns", "body", "instruction", "text"))


def test_names_that_no_terminal_shows_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"\ud800": 1, "x" * 500: 2}))
    assert refusal(tmp_path / "a.jsonl").endswith(f"it has \\ud800, {'x' * 40}.")
    (tmp_path / "b.jsonl").write_text(json.dumps({f"f{number}": 1 for number in range(1000)}))
    assert refusal(tmp_path / "b.jsonl").endswith("f28, f29, ....")


def test_tools_as_deep_as_no_tool_is_are_refused(tmp_path: Path) -> None:
    deep: Any = "end"
    for _ in range(80):
        deep = [deep]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASK], "tools": [deep]}))
    assert "row 1: the field 'tools' is nested more than 64 levels deep" in refusal(tmp_path / "a.jsonl")


FIELDS = ("prompt", "messages", "body.messages", "prompt.0", "turns", "a.b")
NAMES = [
    "prompt",
    "messages",
    "conversations",
    "turns",
    "body",
    "params",
    "custom_id",
    "modelInput",
    "instruction",
    "input",
    "history",
    "system",
]
PARTS = [
    "role",
    "from",
    "content",
    "value",
    "text",
    "type",
    "tools",
    "tool_calls",
    "function",
    "arguments",
    "user",
    "human",
    "assistant",
    "gpt",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from((*PARTS, '[{"role": "user"}]', "\ud800")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*NAMES, *PARTS)), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3) | VALUES, min_size=1, max_size=3),
    field=st.sampled_from(FIELDS),
)
def test_any_json_gives_prompts_or_a_refusal(rows: list[Any], field: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    try:
        found = read_prompts(str(tmp_path / "a.json"), field)
    except UsageError:
        return
    for prompt in found.texts:
        assert as_text(prompt).strip()
        assert json.dumps(prompt if isinstance(prompt, str) else prompt.to_json(), ensure_ascii=False, allow_nan=False).encode()
    assert len(found.rows) == len(found.texts)
    assert found.sha256


def test_the_documentation_names_every_format() -> None:
    text = (ROOT / "docs/explanation/profiles.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for known in FORMATS for name in (known.field, *known.also) if name != "history")
