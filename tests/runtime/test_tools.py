"""Tools and formats of answers, by OpenAI's and Anthropic's own clients, on a tiny model that calls a tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from remoe_cli.model import draft
from remoe_cli.runtime.grammar import json_grammar
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.sampling import Sampling
from tests.support.api_server import serving, whole_model
from tests.support.batching import guesses
from tests.support.by_hand import by_hand
from tests.support.chatml import save_chatml

USER: Any = [{"role": "user", "content": "One and two?"}]
SCHEMA: Any = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
CHOSEN: Any = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"], "additionalProperties": False}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("add", "take")]
ANTHROPIC_TOOLS: Any = [{"name": name, "input_schema": SCHEMA} for name in ("add", "take")]
RESPONSES_TOOLS: Any = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": False} for name in ("add", "take")]
ASKED: Any = {"model": "", "temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> MainFunction:
    return whole_model(save_chatml(tmp_path_factory.mktemp("chatml") / "model"))


@pytest.fixture(scope="module")
def url(main: MainFunction) -> Iterator[str]:
    with serving(main) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
        yield client


def test_a_call_whole_and_streamed_and_the_turn_after_it(client: openai.OpenAI, main: MainFunction) -> None:
    choice = client.chat.completions.create(messages=USER, tools=TOOLS, **ASKED).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me add.", "tool_calls") and choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function" and (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    with client.chat.completions.stream(messages=USER, tools=TOOLS, **ASKED) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert (streamed.message.content, streamed.finish_reason) == ("Let me add.", "tool_calls") and streamed.message.tool_calls
    assert [each.function.arguments for each in streamed.message.tool_calls] == [call.function.arguments]
    # The client's own message goes back, with the tool's result.
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    usage = client.chat.completions.create(messages=[*USER, choice.message, result], tools=TOOLS, **ASKED).usage
    shown = main.engine.tokenizer.apply_chat_template(
        [
            *USER,
            {"role": "assistant", "content": "Let me add.", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
            result,
        ],
        tools=TOOLS,
        add_generation_prompt=True,
        return_dict=True,
    )
    assert usage and usage.prompt_tokens == len(shown["input_ids"])


def test_arguments_come_in_pieces(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Joined they are those of an answer that is not streamed, also where its length ends it among them."""
    for most, pieces in ((200, ['{"a"', ": ", "1}"]), (6, ['{"a"', ": "])):
        joined, cut = "".join(pieces), most == 6
        chat: Any = ASKED | {"messages": USER, "tools": TOOLS, "max_tokens": most}
        choice = client.chat.completions.create(**chat).choices[0]
        assert choice.finish_reason == ("length" if cut else "tool_calls") and choice.message.tool_calls
        assert [each.function.arguments for each in choice.message.tool_calls] == [joined]
        deltas = [each for chunk in client.chat.completions.create(**chat, stream=True) for each in chunk.choices[0].delta.tool_calls or ()]
        assert [(each.index, bool(each.id), each.function.name) for each in deltas] == [(0, True, "add"), *[(0, False, None)] * len(pieces)]
        assert [each.function.arguments for each in deltas] == ["", *pieces]
        options: Any = {"model": "", "tools": RESPONSES_TOOLS, "temperature": 0, "max_output_tokens": most, "input": "One and two?"}
        item: Any = client.responses.create(**options).output[1]
        assert (item.arguments, item.status) == (joined, "incomplete" if cut else "completed")
        events: Any = list(client.responses.create(**options, stream=True))
        assert [each.delta for each in events if each.type == "response.function_call_arguments.delta"] == pieces
        (done,) = [each for each in events if each.type == "response.function_call_arguments.done"]
        last: Any = events[-1].response.output[1]
        assert done.arguments == last.arguments == joined and last.status == item.status
        messages: Any = {"model": "", "messages": USER, "tools": ANTHROPIC_TOOLS, "max_tokens": most, "extra_body": {"temperature": 0}}
        message = claude.messages.create(**messages)
        use: Any = message.content[1]
        assert (use.input, message.stop_reason) == ({"INVALID_JSON": joined}, "max_tokens") if cut else ({"a": 1}, "tool_use")
        parts: Any = [each for each in claude.messages.create(**messages, stream=True) if each.type == "content_block_delta"]
        assert [each.delta.partial_json for each in parts if each.delta.type == "input_json_delta"] == pieces


def test_the_choice_of_a_tool(client: openai.OpenAI) -> None:
    def message(**more: Any) -> Any:
        options: Any = ASKED | {"temperature": 1, "seed": 3, "messages": USER, "tools": TOOLS} | more
        return client.chat.completions.create(**options).choices[0].message

    plain = client.chat.completions.create(messages=USER, **ASKED)
    none = client.chat.completions.create(messages=USER, tools=TOOLS, tool_choice="none", **ASKED)
    assert none.usage and plain.usage and none.usage.prompt_tokens == plain.usage.prompt_tokens, "what is not shown is not called"
    assert none.choices[0].message.tool_calls is None and "<tool_call>" in (none.choices[0].message.content or "")
    required = message(tool_choice="required", parallel_tool_calls=False)
    assert [each.function.name for each in required.tool_calls] == ["add"] and required.content is None
    for seed in range(2):
        named = message(tool_choice={"type": "function", "function": {"name": "take"}}, seed=seed)
        (call,) = named.tool_calls
        assert call.function.name == "take" and json.loads(call.function.arguments)["a"] in (1, 2)
    strict = [each | {"function": each["function"] | {"strict": True, "parameters": CHOSEN}} for each in TOOLS]
    for seed in range(2):  # the model says {"a": 1}, which the schema does not allow
        chosen = message(tools=strict, seed=seed, temperature=0, parallel_tool_calls=False)
        assert chosen.content == "Let me add." and set(json.loads(chosen.tool_calls[0].function.arguments)) == {"b"}


@pytest.mark.parametrize("streamed", [False, True])
def test_json_by_a_schema(client: openai.OpenAI, streamed: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": CHOSEN, "strict": True}}
    options: Any = {"model": "", "messages": USER, "seed": 1, "max_tokens": 400}
    made = client.chat.completions.create(**options, n=2, response_format=wanted, stream=streamed)
    texts = ["", ""]
    for chunk in made if streamed else [made]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if streamed else choice.message).content or ""
    assert [set(json.loads(text)) for text in texts] == [{"b"}] * 2
    assert {type(json.loads(text)["b"]) for text in texts} == {bool}
    if streamed:
        return
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": CHOSEN}}
    answer = client.responses.create(model="", input="x", text=text, max_output_tokens=400)
    assert set(json.loads(answer.output_text)) == {"b"} and answer.text and answer.text.format and answer.text.format.type == "json_schema"


def test_any_json_object(client: openai.OpenAI, main: MainFunction) -> None:
    options: Any = ASKED | {
        "messages": USER,
        "response_format": {"type": "json_object"},
        "logit_bias": {main.engine.tokenizer.convert_tokens_to_ids("}"): 50},
    }
    text = client.chat.completions.create(**options).choices[0].message.content
    assert isinstance(json.loads(text or ""), dict)


def test_responses_call_tools_and_go_on(client: openai.OpenAI) -> None:
    options: Any = {"model": "", "tools": RESPONSES_TOOLS, "temperature": 0, "max_output_tokens": 200}
    answer = client.responses.create(input="One and two?", **options)
    assert [item.type for item in answer.output] == ["message", "function_call"] and answer.output_text == "Let me add."
    call: Any = answer.output[1]
    assert (call.name, json.loads(call.arguments), call.status) == ("add", {"a": 1}, "completed")
    with client.responses.stream(input="One and two?", **options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert "response.function_call_arguments.done" in [event.type for event in events]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    turns: Any = [{"role": "user", "content": "One and two?"}, *answer.output, output]
    again = client.responses.create(input=turns, **options)
    assert again.usage and answer.usage and again.usage.input_tokens > answer.usage.input_tokens
    named = client.responses.create(input="x", **options | {"tool_choice": {"type": "function", "name": "take"}, "temperature": 1})
    assert [item.name for item in named.output if item.type == "function_call"] == ["take"]


def test_messages_call_tools_and_go_on(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "", "max_tokens": 200, "tools": ANTHROPIC_TOOLS, "extra_body": {"temperature": 0}}
    answer = claude.messages.create(messages=USER, **options)
    assert answer.stop_reason == "tool_use" and [block.type for block in answer.content] == ["text", "tool_use"]
    use: Any = answer.content[1]
    assert (use.name, use.input) == ("add", {"a": 1})
    with claude.messages.stream(messages=USER, **options) as stream:
        final = stream.get_final_message()
    assert [block.to_dict() | {"id": 0} for block in final.content] == [block.to_dict() | {"id": 0} for block in answer.content]
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "3"}], "is_error": True}
    turns: Any = [*USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    again = claude.messages.create(messages=turns, **options)
    assert again.usage.input_tokens > answer.usage.input_tokens + 3
    counted = claude.messages.count_tokens(model="", messages=turns, tools=ANTHROPIC_TOOLS)
    assert counted.input_tokens == again.usage.input_tokens
    for choice, names in (({"type": "tool", "name": "take"}, {"take"}), ({"type": "any"}, {"add", "take"})):
        forced = claude.messages.create(messages=USER, **options | {"tool_choice": choice | {"disable_parallel_tool_use": True}})
        assert {block.name for block in forced.content if block.type == "tool_use"} <= names and forced.stop_reason == "tool_use"


def bad(**changes: Any) -> Any:
    return [TOOLS[0] | {"function": TOOLS[0]["function"] | changes}]


def past(call: Any) -> Any:
    return {"role": "assistant", "tool_calls": [call]}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "two of a name": ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2", "two tools have the name 'add'"),
    "a name": ({"tools": bad(name="a b")}, "tools.0.function.name", "pattern"),
    "another kind": ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "type"),
    "not among them": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "not among the tools",
    ),
    "none there": ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    "strict": ({"tools": bad(strict=True, parameters={"not": {}})}, "tools.0", "not"),
    "needed": ({"tools": bad(parameters={"uniqueItems": True}), "tool_choice": "required"}, "tools.0", "uniqueItems"),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": {"if": {}}}}}}},
        "response_format.json_schema.schema",
        "if",
    ),
    "steps": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 9999991}}}},
        "response_format.json_schema.schema",
        "more than 10000 steps",
    ),
    "a format": ({"response_format": {"type": "grammar"}}, "response_format", "grammar"),
    "arguments": (
        {"messages": [*USER, past({"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}})]},
        "messages.1.tool_calls.0.function.arguments",
        "no JSON object",
    ),
    "a call": ({"messages": [*USER, past({"name": "f"})]}, "messages.1.tool_calls.0", "no call"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_or_not_supported_is_named(client: openai.OpenAI, case: str) -> None:
    more, param, why = WRONG[case]
    with pytest.raises(openai.BadRequestError, match=why) as caught:
        client.chat.completions.create(**ASKED | {"messages": USER} | more)
    assert str(caught.value.param).startswith(param), caught.value.body


def test_a_model_that_takes_no_tools_says_so(tmp_path: Any) -> None:
    made = by_hand(tmp_path, (), {"chat_template.jinja": "{% for m in messages %}{{ m.content }} {% endfor %}"})
    with serving(whole_model(tmp_path / "model")) as url, openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:  # fmt: skip
        said: Any = [{"role": "user", "content": "w1"}]
        past: Any = [{"role": "tool", "content": "w2"}]
        for more, param, why in (
            ({"tools": TOOLS}, "tools", "takes no tools"),
            ({"messages": [*said, *past]}, "messages", "takes no tools"),
            ({"response_format": {"type": "json_object"}}, "response_format", "no token that ends an answer"),
        ):
            with pytest.raises(openai.BadRequestError, match=why) as caught:
                client.chat.completions.create(**ASKED | {"messages": said} | more)
            assert caught.value.param == param
        assert made.model


def test_drafts_change_nothing_of_json(main: MainFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar goes on by accepted tokens only, also where a draft has tokens that it does not allow."""
    ids, sampling = main.engine.text_ids("One and two?"), Sampling(grammar=json_grammar(SCHEMA), temperature=1.0, seed=5)
    plain = main.engine.generate(ids, 120, sampling=sampling)
    monkeypatch.setattr(draft, "lookup", guesses([plain]))
    made = main.engine.generate(ids, 120, sampling=sampling, speculate=6)
    assert (made.token_ids, made.text, made.finish_reason) == (plain.token_ids, plain.text, "stop")
    assert json.loads(made.text)["a"] in (1, 2) and 2 < made.drafted.accepted < made.drafted.tokens
