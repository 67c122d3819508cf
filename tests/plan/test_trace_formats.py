"""Traces under the names and in the units of those who publish them; requests that failed; and the note that says what was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.problem.trace_formats import FORMATS, recognise
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog
from tests.support.traces import AZURE, TABLE, jsonl, kinds, read


def twice(name: str, first: Any, second: Any, **cells: object) -> str:
    """Two JSON lines that differ in their time."""
    return jsonl({name: first, **cells}, {name: second, **cells})


def usage(n_in: int, generated: int) -> dict[str, object]:
    return {"prompt_tokens": n_in, "completion_tokens": generated, "total_tokens": n_in + generated}


LENGTHS = {"input_length": 100, "output_length": 11}
SPEND = {"call_type": "acompletion", "endTime": "later", "metadata": {"user": None}}
CREATED = {"id": "x", "object": "chat.completion", "choices": [{"index": 0}], "usage": usage(100, 11)}
BATCHED = {"custom_id": "x", "response": {"status_code": 200, "body": {"created": 5, "usage": usage(100, 11)}}, "error": None}
BENCHMARK = {
    **{"duration": 9.5, "completed": 2, "input_lens": [100, 100, 50], "output_lens": [11, 11, 0], "itls": [[0.1], [0.2], []]},
    **{"start_times": [1000.5, 1003.5, 0.0], "generated_texts": ["a", "b", ""], "errors": ["", "", "503"]},
}
METRICS = {name: {"value": n, "unit": "tokens"} for name, n in (("input_sequence_length", 100), ("output_sequence_length", 11))}
OTEL = {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 11}
# As they are published, with what the note says: two requests of 100 + 10 tokens, 3 s apart, and some that failed.
PUBLISHED = {
    "remoe": ("n_in,n_out,timestamp\n100,10,5\n100,10,8", "columns n_in, n_out, timestamp (s) used."),
    "Azure 2023": (
        f"{AZURE}\n2023-11-16 18:15:46.6805900,100,11\n2023-11-16 18:15:49.6805900,100,11",
        "columns ContextTokens, GeneratedTokens, TIMESTAMP (dates) used as in Azure LLM inference 2023 and 2024.",
    ),
    "Azure 2024": (f"{AZURE}\n2024-05-10 00:00:00+00:00,100,11\n2024-05-10 00:00:03.000000+00:00,100,11", "(dates) used as in Azure"),
    "Mooncake": (
        twice("timestamp", 27482, 30482, **LENGTHS, hash_ids=[0, 1]),
        "columns input_length, output_length, timestamp (ms) used as in Mooncake; hash_ids ignored.",
    ),
    "Bailian": (
        twice("timestamp", 61.125, 64.125, chat_id=1, parent_chat_id=-1, **LENGTHS, type="text", turn=1, hash_ids=[9]),
        "timestamp (s) used as in Qwen Bailian; chat_id, parent_chat_id, type, turn, hash_ids ignored.",
    ),
    "RAGPulse": (
        twice("timestamp", "27", "30", **LENGTHS, hash_ids={"user_input": [1], "history": []}, session_id="a"),
        "timestamp (s) used as in RAGPulse; ",
    ),
    "BurstGPT 1": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,100,11,111,Conversation log\n"
        "8,GPT-4,100,11,111,API log\n8,GPT-4,417,0,417,API log",
        "columns Request tokens, Response tokens, Timestamp (s) used as in BurstGPT; Model, Total tokens, Log Type ignored; "
        "1 of 3 left out, as they failed or have no prompt or no answer.",
    ),
    "BurstGPT 3": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "19440110.0,a-b,43,GPT-4,100,11,111,Conversation log\n19440113.0,,2,ChatGPT,100,11,111,API log",
        "Timestamp (s) used as in BurstGPT; ",
    ),
    "ServeGen": ("request_id,timestamp,input_tokens,output_tokens\n0,0.25,100,11\n1,3.25,100,11", "timestamp (s) used as in ServeGen; "),
    "LiteLLM": (
        json.dumps(
            [
                {"startTime": "2024-05-10T12:00:01.500Z", **usage(100, 11), **SPEND, "status": "success"},
                {"startTime": "2024-05-10T12:00:02.500Z", **usage(0, 0), **SPEND, "status": "failure"},
                {"startTime": "2024-05-10T12:00:04.500Z", **usage(100, 11), **SPEND, "status": "success"},
            ]
        ),
        "columns prompt_tokens, completion_tokens, status, startTime (dates) used as in LiteLLM spend logs; "
        "total_tokens, call_type, endTime, metadata.user ignored; 1 of 3 left out, ",
    ),
    "LiteLLM with the response": (
        twice("startTime", 1715342401.5, 1715342404.5, response={"usage": usage(100, 11)}, status="success"),
        "columns response.usage.prompt_tokens, response.usage.completion_tokens, status, startTime (s) used; ",
    ),
    "OpenAI chat": (
        twice("created", 1e9, 1e9 + 3, **CREATED) + "\n" + jsonl({"created": 1e9, "usage": None, "error": {"message": "overloaded"}}),
        "usage.prompt_tokens, usage.completion_tokens, error, created (s) used as in OpenAI responses; ",
    ),
    "OpenAI response": (
        twice("created_at", 1e9, 1e9 + 3, status="completed", error=None, usage={"input_tokens": 100, "output_tokens": 11}),
        "created_at (s) used as in OpenAI responses.",
    ),
    "OpenAI batch": (
        jsonl(
            {"custom_id": "y", "response": {"status_code": 429, "body": {}}, "error": None},
            {"custom_id": "z", "response": None, "error": {"code": "server_error"}},
        )
        + "\n"
        + jsonl(BATCHED, json.loads(json.dumps(BATCHED).replace("5", "8", 1))),
        "response.body.created (s) used as in OpenAI batch output; ",
    ),
    "Vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,11\n3.0,100,11", "arrived_at (s) used as in Vidur."),
    "vLLM": (
        json.dumps(BENCHMARK),
        "columns input_lens, output_lens, errors, start_times (s) used as in vLLM and SGLang benchmarks; ",
    ),
    "SplitwiseSim": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n0,2,0,0.5,1,100,11\n1,2,0,3.5,1,100,11",
        "arrival_timestamp (s) used as in SplitwiseSim; ",
    ),
    "LLMServingSim": (
        twice("arrival_time_ns", 0, 3_000_000_000, input_toks=100, output_toks=11),
        "arrival_time_ns (ns) used as in LLMServingSim.",
    ),
    "AIPerf": (
        twice("metadata", {"request_start_ns": 17598132 * 10**11}, {"request_start_ns": 17598132 * 10**11 + 3 * 10**9}, metrics=METRICS)
        + "\n"
        + jsonl({"metadata": {"request_start_ns": 0}, "metrics": {"error_isl": {"value": 550}}, "error": {"code": 499}}),
        "metadata.request_start_ns (ns) used as in AIPerf records; ",
    ),
    "OpenTelemetry": (
        twice("start_time", 0, 3, attributes=OTEL),
        "columns attributes.gen_ai.usage.input_tokens, attributes.gen_ai.usage.output_tokens, start_time (s) used.",
    ),
}


@pytest.mark.parametrize(("text", "note"), PUBLISHED.values(), ids=PUBLISHED)
def test_traces_as_they_are_published(text: str, note: str, tmp_path: Path) -> None:
    """Under their own names, in their own units, and generated tokens count the first; what failed is no request."""
    got = read(text, tmp_path / "trace")
    assert kinds(got) == [(1.0, 100, 10)]
    assert tuple(got.gaps_s) == pytest.approx((3,)) and got.per_hour == pytest.approx(1200)
    assert got.notes[0].startswith("trace: 2 requests over 3 s, 1,200 an hour; the longest of 100 prompt + 11 output tokens; columns ")
    assert note in got.notes[0]


def test_each_format_has_a_source_and_tells_itself_from_the_others() -> None:
    for form in FORMATS:
        columns = recognise((name, name) for name in (form.n_in[0], form.generated[0], *form.times, *form.known_by))
        assert columns.format is form and form.source


def test_traces_without_times(tmp_path: Path) -> None:
    """ServeGen's batch tasks and LLMPerf's responses: their durations are no times of arrival."""
    row = {"request_id": 0, "type": "text", "input_length": 61, "output_length": 2370, "duration": 14000}
    batch = read(jsonl(row, row), tmp_path / "batch")
    assert (kinds(batch), batch.per_hour) == ([(1.0, 61, 2369)], None) and "duration ignored" in batch.notes[0]
    response = {
        "error_code": None,
        "error_msg": "",
        "ttft_s": 0.1,
        "end_to_end_latency_s": 2.0,
        "number_output_tokens": 9,
        "number_input_tokens": 61,
    }
    assert kinds(read(jsonl(response), tmp_path / "llmperf")) == [(1.0, 61, 8)]


@pytest.mark.parametrize(
    ("name", "times", "unit"),
    [
        ("timestamp", (0, 60, 180), "s"),
        ("timestamp", (1.7e9, 1.7e9 + 60, 1.7e9 + 180), "s"),
        ("timestamp", (1700000000000, 1700000060000, 1700000180000), "ms"),
        ("created", (1700000000000000, 1700000060000000, 1700000180000000), "us"),
        ("time", (1700000000000000000, 1700000060000000000, 1700000180000000000), "ns"),
        ("timestamp_ms", (0, 60_000, 180_000), "ms"),
        ("Timestamp (ms)", (0, 60_000, 180_000), "ms"),
        ("arrival-time-us", (0, 60_000_000, 180_000_000), "us"),
        ("ts_ns", (0, 60_000_000_000, 180_000_000_000), "ns"),
        ("startTime", ("2024-05-10 23:59:00 UTC", "2024-05-11T00:00:00Z", "2024-05-11T02:02:00.0+02:00"), "dates"),
    ],
)
def test_units_of_time(name: str, times: tuple[object, ...], unit: str, tmp_path: Path) -> None:
    """By the column's name, or by the size of a time since 1970; whatever it is, the note says it."""
    got = read(f"n_in,n_out,{name}\n" + "".join(f"9,9,{time}\n" for time in times), tmp_path / "r.csv")
    assert tuple(got.gaps_s) == pytest.approx((60, 120), rel=1e-6)
    read_as = "r.csv: 3 requests over 3 min, 40 an hour; the longest of 9 prompt + 10 output tokens"
    assert got.notes[0] == f"{read_as}; columns n_in, n_out, {name} ({unit}) used."


def test_times_of_no_unit_are_refused(tmp_path: Path) -> None:
    """Nanoseconds since a program's start, of two hours: no seconds, and their size tells no unit."""
    with pytest.raises(UsageError, match=r"timestamps go from 0 to 7\.2e\+12, which are no seconds") as raised:
        read("n_in,n_out,timestamp\n9,9,0\n9,9,7200000000000\n", tmp_path / "r.csv")
    assert "timestamp_ms" in raised.value.hint


FAILURES = {
    "status": ["failure", "Failed", "error", "500", 404, 429.0, "HTTP/1.1 503 Service Unavailable", "timeout", "timed_out", "cancelled"],
    "status_code": [500, "302"],
    "error": ["overloaded", {"code": 1}, True],
    "error_code": [429],
    "success": [False, "false", 0, "0"],
    "was_cancelled": [True, "true"],
}
SUCCESSES = {
    "status": ["success", "ok", "200", 200, 201.0, "completed", "200 OK", "", None, "no_error", "incomplete"],
    "error": ["", None, {}, [], False, "null", "none", "no error"],
    "error_code": [0, "0", None],
    "success": [True, "true", 1, None],
    "was_cancelled": [False, "false"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FAILURES.items() for value in values])
def test_a_failed_request_is_left_out_and_counted(name: str, value: object, tmp_path: Path) -> None:
    """Its lengths may be missing or wrong."""
    got = read(jsonl({"n_in": 9, "n_out": 5, name: None}, {"n_in": 0, "n_out": None, name: value}), tmp_path / "r.jsonl")
    assert kinds(got) == [(1.0, 9, 5)]
    assert got.notes[0].endswith("; 1 of 2 left out, as they failed or have no prompt or no answer.")
    with pytest.raises(UsageError, match="holds no requests that were answered: all 1 failed"):
        read(jsonl({"n_in": 9, "n_out": 5, name: value}), tmp_path / "r.jsonl")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SUCCESSES.items() for value in values])
def test_a_request_that_succeeded_is_one(name: str, value: object, tmp_path: Path) -> None:
    got = read(jsonl({"n_in": 9, "n_out": 5, name: value}), tmp_path / "r.jsonl")
    assert kinds(got) == [(1.0, 9, 5)] and "left out" not in got.notes[0]


def test_an_answer_of_one_token_is_a_request(tmp_path: Path) -> None:
    """Nothing comes after its first token; a plan is for one further token at least, and the note says so."""
    for text in ("n_in,n_out\n9,0\n50,3\n", f"{AZURE}\n2024-05-10,9,1\n2024-05-11,50,4\n"):
        got = read(text, tmp_path / "r.csv")
        assert kinds(got) == [(0.5, 9, 1), (0.5, 50, 3)]
        assert got.notes[0].endswith("; 1 answer of one token counted as two.")
    got = read("n_in,n_out\n" + "".join(f"{n},{n % 2 * 5}\n" for n in range(10, 18)), tmp_path / "r.csv")
    assert [kind.n_out for kind in got.lengths] == [3, 3, 3, 3]  # the means of 1 and 5
    assert got.notes[0].endswith("; 4 answers of one token counted as two.")


def test_rows_that_sum_up_requests_are_refused(tmp_path: Path) -> None:
    """Their tokens are no request's: OpenAI's usage of an organization, LiteLLM's daily spend."""
    bucket = {"object": "bucket", "start_time": 1, "results": [{"input_tokens": 1000, "output_tokens": 500, "num_model_requests": 5}]}
    with pytest.raises(UsageError, match="row 1 sums up 5 requests"):
        read(json.dumps({"object": "page", "data": [bucket]}), tmp_path / "usage.json")
    with pytest.raises(UsageError, match="row 1 sums up 2,000 requests"):
        read("date,prompt_tokens,completion_tokens,api_requests\n2024-05-10,9999,9999,2000\n", tmp_path / "spend.csv")


def test_the_note_names_columns_safely_and_not_all(tmp_path: Path) -> None:
    names = ["n_in", "n_out", "\x1b]52;c;evil", "x" * 300, *(f"c{number}" for number in range(20))]
    note = read(",".join(names) + "\n" + ",".join("9" * len(names)) + "\n", tmp_path / "a\x1b[2Jb.csv").notes[0]
    assert note.isprintable() and len(note) < 400
    assert note.endswith(r"\x1b]52;c;evil, " + "x" * 57 + "..., c0, c1, c2, c3, c4, c5, 14 more ignored.")


def test_the_note_reaches_the_plan(tmp_path: Path) -> None:
    requests = read(TABLE, tmp_path / "trace.csv")
    plan = plan_of(synthetic_profile(tmp_path / "profile"), tiny_catalog(), traffic=requests)
    assert requests.notes[0] in plan.notes
    assert requests.notes[0].startswith("trace.csv: 3 requests over 3 min, 40 an hour; ")
