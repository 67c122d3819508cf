"""OpenAI's own client, unchanged, against a main server of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from remoe_cli.errors import DeployError
from remoe_cli.runtime.api.common import fault_of
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.receipt import attach, failed_receipt
from tests.support.api_server import PRICES, serving, whole_model
from tests.support.by_hand import PROMPT, PROMPT_IDS, ByHand, by_hand

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
MODEL = "model"
USER: Any = [{"role": "user", "content": PROMPT}]
GREEDY: Any = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    return by_hand(tmp_path_factory.mktemp("made"), (), {"chat_template.jinja": CHAT})


@pytest.fixture(scope="module")
def url(made: ByHand) -> Iterator[str]:
    with serving(whole_model(Path(made.profile.record.model.path))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_greedy_answers_are_those_of_transformers_whole_and_streamed(client: openai.OpenAI, made: ByHand) -> None:
    answer = client.chat.completions.create(messages=USER, max_completion_tokens=16, **GREEDY)
    expected = words(made.tokens())
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 16, 36)
    receipt = answer.usage.model_extra and answer.usage.model_extra["remoe"]
    assert receipt["functions_called"] == 0 and "functions" not in receipt
    assert receipt["generated_tokens"] == 16 and receipt["cost"]["total_usd"] > 0 and receipt["finish_reasons"] == ["length"]
    with client.chat.completions.create(
        messages=USER, max_tokens=16, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    *texts, finish, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == expected
    assert texts[0].choices[0].delta.role == "assistant" and finish.choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 16
    assert last.usage.model_extra and last.usage.model_extra["remoe"]["generated_tokens"] == 16
    assert len({chunk.id for chunk in chunks}) == 1 and len(texts) == 17


def test_without_a_limit_an_answer_is_as_long_as_the_model_has_positions(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(messages=[{"role": "user", "content": words([1] * 500)}], **GREEDY).usage
    assert usage and usage.total_tokens == 512


def test_completions_take_texts_and_ids_outside_the_chat_template(client: openai.OpenAI, made: ByHand) -> None:
    prompts: list[Any] = [PROMPT, [PROMPT], list(PROMPT_IDS)]
    for prompt in prompts:
        answer = client.completions.create(prompt=prompt, max_tokens=8, logprobs=2, **GREEDY)
        assert answer.choices[0].text == words(made.tokens(8)) and answer.choices[0].logprobs
        logprobs = answer.choices[0].logprobs
        assert logprobs.tokens == [f"w{i}" for i in made.tokens(8)] and logprobs.text_offset and logprobs.text_offset[0] == 0
        assert logprobs.token_logprobs == [max(top.values()) for top in logprobs.top_logprobs or ()]
    streamed = client.completions.create(prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == words(made.tokens(16)), "16 tokens are the default"
    usage = client.completions.create(prompt="w1 w2", max_tokens=1, **GREEDY).usage
    assert usage and usage.prompt_tokens == 2


def test_a_chat_of_three_turns(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "w9"}]
    expected = 1
    for turn in range(3):
        messages.append({"role": "user", "content": f"w{turn + 1}"})
        expected += 1
        answer = client.chat.completions.create(messages=messages, max_tokens=4, **GREEDY)
        assert answer.usage and answer.usage.prompt_tokens == expected
        messages.append(answer.choices[0].message)  # the client's own object, as people do
        expected += 4


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=12, **more)
        assert answer.usage and answer.usage.completion_tokens == 12 * len(answer.choices)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    two = texts(seed=7, n=2)
    assert two == texts(seed=7, n=2) and two[0] != two[1] and texts(seed=7) == two[:1]
    assert texts(seed=8, n=2) != two and texts() != texts()
    assert texts(seed=7, temperature=0, n=2) == [texts(temperature=0)[0]] * 2
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model=MODEL, messages=USER, max_tokens=12, seed=7, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[0], streamed[1]] == two


def test_parameters_that_narrow_the_choice(client: openai.OpenAI, made: ByHand) -> None:
    greedy = words(made.tokens(8))

    def text(**more: Any) -> str | None:
        return client.chat.completions.create(model=MODEL, messages=USER, max_tokens=8, **more).choices[0].message.content

    assert text(seed=1) != greedy
    for narrow in ({"top_p": 1e-6}, {"temperature": 0.001}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert text(seed=1, **narrow) == greedy, narrow
    likeliest = made.tokens(1)[0]
    assert f"w{likeliest} " not in f"{text(temperature=0, logit_bias={str(likeliest): -100})} "
    assert text(temperature=0, logit_bias={"5": 100}) == words([5] * 8)
    two: Any = {"temperature": 0, "logit_bias": {"5": 60, "6": 60}}  # tokens that no other can beat
    assert text(**two, presence_penalty=-2.0) != text(**two)
    assert text(**two | {"logit_bias": {"5": 60, "6": 55}}) == words([5] * 8)
    assert "w6" in (text(**two | {"logit_bias": {"5": 60, "6": 55}}, frequency_penalty=2.0) or "")
    assert text(temperature=0, extra_body={"repetition_penalty": 100.0}) != greedy


def test_logprobs_are_the_models_own(client: openai.OpenAI, made: ByHand) -> None:
    import torch

    options: Any = {"messages": USER, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, "model": MODEL, "seed": 3, "temperature": 2}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.logprobs and whole.logprobs.content
    tokens = whole.logprobs.content
    ids = [int(each.token[1:]) for each in tokens]
    with torch.inference_mode():
        logits = made.model(torch.tensor([[*PROMPT_IDS, *ids]])).logits[0].log_softmax(-1)
    for step, each in enumerate(tokens):
        at = logits[len(PROMPT_IDS) + step - 1]
        assert each.logprob == pytest.approx(float(at[ids[step]]), abs=1e-4)
        assert [top.token for top in each.top_logprobs] == [f"w{int(i)}" for i in at.topk(3).indices]
        assert bytes(each.bytes or ()).decode() == each.token
    streamed = [
        each for chunk in client.chat.completions.create(**options, stream=True) for choice in chunk.choices
        for each in (choice.logprobs.content if choice.logprobs else None) or ()
    ]  # fmt: skip
    assert [(each.token, each.logprob) for each in streamed] == [(each.token, each.logprob) for each in tokens]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_across_tokens_ends_the_answer(client: openai.OpenAI, made: ByHand, streamed: bool) -> None:
    ids = made.tokens()
    whole = words(ids)
    stop = whole[whole.index(f"w{ids[4]}") + 1 :][:6]  # from within a token into the next
    options: Any = {"messages": USER, "max_tokens": 16, "stop": ["never", stop], **GREEDY}
    if streamed:
        chunks = list(client.chat.completions.create(**options, stream=True))
        text, finish = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


def generated(url: str) -> float:
    """How many tokens a server has generated."""
    lines = httpx.get(f"{url.rstrip('/')}/metrics", trust_env=False).text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm:generation_tokens_total")).split()[1])


def test_an_abandoned_stream_ends_at_the_next_token(client: openai.OpenAI, url: str) -> None:
    before = generated(url)
    with client.chat.completions.create(messages=USER, max_tokens=490, stream=True, **GREEDY) as stream:
        for _ in range(4):
            next(stream)
    while generated(url) == before:
        time.sleep(0.02)
    assert 3 <= generated(url) - before < 490


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "n": ({"n": 0}, "n"),
    "stop": ({"stop": [""]}, "stop"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "logit_bias": ({"logit_bias": {"w1": 1}}, "logit_bias"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "unsupported": ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
    "stored": ({"store": True}, "store"),
    "metadata": ({"metadata": {"run": "7"}}, "metadata"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "reasoning_effort"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "unknown": ({"extra_body": {"tempreture": 1}}, "tempreture"),
    "unknown, in capitals": ({"extra_body": {"Temperature": 1}}, "Temperature"),
    "repetition_penalty": ({"extra_body": {"repetition_penalty": 1e-40}}, "repetition_penalty"),
    "two lengths": ({"max_tokens": 5, "max_completion_tokens": 9}, "max_tokens"),
    "a role": ({"messages": [{"role": "wrong", "content": "w1"}]}, "messages"),
    "no text": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "w1", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0",
    ),
    "messages": ({"messages": []}, "messages"),
    "message": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "w1", "cache": 1}]}]}, "messages.0.content.0.cache"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_or_not_supported_is_named(client: openai.OpenAI, case: str, streamed: bool) -> None:
    more, param = WRONG[case]
    if "stream_options" in more and streamed:
        more = {"stream_options": {"include_usage": "yes"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": USER, "stream": streamed} | more)
    assert str(caught.value.param).startswith(param) and param.split(".")[0] in caught.value.message, caught.value.body
    assert caught.value.type == "invalid_request_error"


def test_other_errors_are_the_clients_own_classes(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=USER)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="w1")
    long: list[tuple[str, Callable[[], object]]] = [
        ("messages", lambda: client.chat.completions.create(model=MODEL, messages=USER, max_tokens=600)),
        ("prompt", lambda: client.completions.create(model=MODEL, prompt=[1] * 600)),
        ("input", lambda: client.responses.create(model=MODEL, input="w1 " * 600, max_output_tokens=1)),
    ]
    for param, ask in long:
        with pytest.raises(openai.BadRequestError, match="exceed the model's 512 positions") as caught:
            ask()
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="The parameter 'messages' is empty"):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=MODEL, prompt="w1 " * 3_000_000)
    assert large.value.status_code == 413
    for wrong in (b"", b"[]", b"{", b'{"model": "model", "messages": "\\ud83d"}'):
        answer = httpx.post(f"{url}/v1/chat/completions", content=wrong, headers={"content-type": "application/json"}, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_empty_input_is_no_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="input"):
        client.responses.create(model=MODEL, input=[])


def test_a_fault_of_our_own_is_logged_without_what_it_may_hold(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError(PROMPT)

    monkeypatch.setattr(MainFunction, "prompt_ids", broken)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=USER)
    assert "KeyError at" in caplog.text and "test_openai_client.py" in caplog.text
    assert PROMPT not in caplog.text


@pytest.mark.parametrize(("billed", "again"), [(True, "false"), (False, None)])
def test_what_was_billed_is_not_tried_again(billed: bool, again: str | None) -> None:
    error = DeployError("The GPU's memory is full.", "")
    if billed:
        attach(error, failed_receipt(PRICES, 1.0, ()))
    assert fault_of(error).status == 503 and fault_of(error).headers.get("x-should-retry") == again


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL and client.models.retrieve(MODEL) == model


def test_responses_whole_and_streamed(client: openai.OpenAI, made: ByHand) -> None:
    options: Any = {"model": MODEL, "input": PROMPT, "max_output_tokens": 16, "temperature": 0}
    answer = client.responses.create(**options, metadata={"run": "7"})
    assert answer.metadata == {"run": "7"}
    expected = words(made.tokens())
    assert (answer.output_text, answer.status) == (expected, "incomplete") and answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.usage and answer.usage.total_tokens == 36
    with client.responses.stream(**options) as stream:
        events: list[Any] = list(stream)
    assert events[-1].type == "response.incomplete"
    final = events[-1].response
    assert final.output_text == expected and final.usage and final.usage.output_tokens == 16
    assert final.usage.model_extra and final.usage.model_extra["remoe"]["generated_tokens"] == 16
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    again = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "w1"}, *answer.output, {"role": "user", "content": "w2"}], max_output_tokens=1
    )  # type: ignore[call-overload]
    assert again.usage.input_tokens == 18
    for refused in (lambda: client.responses.retrieve("r"), lambda: client.responses.cancel("r"), lambda: client.responses.delete("r")):
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            refused()
    for param, value in {"store": True, "previous_response_id": "r", "reasoning": {"effort": "low"}, "tools": [{"type": "x"}]}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**options | {param: value})
        assert str(caught.value.param).startswith(param)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses", "messages", "no name"])
def test_invocations_take_every_api_by_its_payload(url: str, made: ByHand, kind: str) -> None:
    """As SageMaker asks: all requests come to one path, and the model has no name there."""
    sampling: Any = {"temperature": 0}
    expected = words(made.tokens(4))
    payloads: dict[str, tuple[dict[str, Any], Any]] = {
        "chat": ({"model": "", "messages": USER, "max_tokens": 4}, lambda a: a["choices"][0]["message"]["content"]),
        "completions": ({"model": MODEL, "prompt": PROMPT, "max_tokens": 4}, lambda a: a["choices"][0]["text"]),
        "responses": ({"model": "", "input": PROMPT, "max_output_tokens": 4}, lambda a: a["output"][0]["content"][0]["text"]),
        "messages": (
            {"model": "", "anthropic_version": "2023-06-01", "messages": USER, "max_tokens": 4},
            lambda a: a["content"][0]["text"],
        ),
        "no name": ({"messages": USER, "max_new_tokens": 4}, lambda a: a["text"]),
    }
    payload, text = payloads[kind]
    answer = httpx.post(f"{url}/invocations", json=payload | sampling, trust_env=False, timeout=60)
    assert answer.status_code == 200 and text(answer.json()) == expected, answer.text
    wrong = httpx.post(f"{url}/invocations", json=payload | {"temperature": "warm"}, trust_env=False, timeout=60)
    assert wrong.status_code == 400 and "temperature" in wrong.text


def test_sagemakers_path_is_that_of_the_container(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        assert client.chat.completions.create(model="", messages=USER, max_tokens=1).choices[0].message.content


def test_what_was_done_is_counted(url: str, client: openai.OpenAI) -> None:
    def figures() -> dict[str, float]:
        lines = [line for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = figures()
    answer = client.chat.completions.create(messages=USER, max_tokens=5, n=2, **GREEDY)
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    of = '{model_name="model"}'
    assert grown[f"vllm:prompt_tokens_total{of}"] == 20 and grown[f"vllm:generation_tokens_total{of}"] == 10
    assert grown['vllm:request_success_total{finished_reason="length",model_name="model"}'] == 2
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert grown[f"vllm:{name}_seconds_count{of}"] == 1
    assert answer.usage and answer.usage.model_extra
    assert grown['remoe_cost_usd_total{part="main"}'] == pytest.approx(answer.usage.model_extra["remoe"]["cost"]["main_usd"])
    assert after[f"vllm:num_requests_running{of}"] == after[f"vllm:num_requests_waiting{of}"] == 0
    for path in ("/ping", "/health", "/ready"):
        assert httpx.get(f"{url}{path}", trust_env=False).json()["status"] == "ready"
