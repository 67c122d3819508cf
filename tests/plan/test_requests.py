"""Requests from a file: how long they are, how often they come, how many find everything cold; and what is no such file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import math
import os
import tempfile
import time
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remoe_cli.errors import UsageError
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem import trace_counts, trace_rows
from remoe_cli.plan.problem.requests import KINDS, Requests, one_length, read_requests
from remoe_cli.plan.problem.trace_formats import FORMATS, recognise
from tests.support.synthetic import plan_of, synthetic_profile, tiny_catalog

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def read(text: str, path: Path) -> Requests:
    path.write_text(text, encoding="utf-8")
    return read_requests(path)


def kinds(requests: Requests) -> list[tuple[float, int, int]]:
    return [(round(kind.share, 12), kind.n_in, kind.n_out) for kind in requests.lengths]


def test_a_trace_as_azure_publishes_them(tmp_path: Path) -> None:
    """Generated tokens count the first, timestamps have seven digits, and rows need not be in order of time."""
    rows = [
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:56.6805900,100,1",
        "2023-11-16 18:16:16.6805900,10,9",
        "2023-11-16 18:15:50.6805900,10,5",
    ]
    got = read("\ufeff" + "\r\n".join([AZURE, *rows]), tmp_path / "trace.csv")
    assert kinds(got) == [(0.25, 10, 4), (0.25, 10, 8), (0.25, 100, 1), (0.25, 374, 43)]
    assert tuple(got.gaps_s) == pytest.approx((4, 6, 20), abs=1e-6)
    assert got.per_hour == pytest.approx(3 / 30 * 3600)


def test_dates_are_utc_unless_they_say_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the hour at which clocks are changed too."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    rows = ["2023-10-29 00:30:00", "2023-10-29T03:30:00.25+02:00", "2023-10-29 02:30:00.5Z", "2023-10-29 03:30:00.75"]
    try:
        got = read("n_in,n_out,timestamp\n" + "".join(f"9,9,{row}\n" for row in rows), tmp_path / "r.csv")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert tuple(got.gaps_s) == (3600.25, 3600.25, 3600.25)


def test_lengths_with_weights(tmp_path: Path) -> None:
    got = read("n_in,n_out,weight\n20,5,1\n10,4,3\n", tmp_path / "r.csv")
    assert kinds(got) == [(0.75, 10, 4), (0.25, 20, 5)]
    assert (got.per_hour, got.gaps_s, got.cold_share(300)) == (None, (), 0.0)


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"n_in": 10, "n_out": 4, "timestamp": 0.5},
        {"prompt_tokens": 10, "generated_tokens": 5, "time": 7200.5},
        {"ContextTokens": "10", "GeneratedTokens": 5, "TIMESTAMP": "1970-01-01 01:00:00.5"},
    ]
    got = read("\n\n".join(map(json.dumps, rows)) + "\n", tmp_path / "r.jsonl")
    assert kinds(got) == [(1.0, 10, 4)]
    assert tuple(got.gaps_s) == (3600, 3600) and got.per_hour == 1


def test_kinds_are_equal_parts_by_length_with_their_means(tmp_path: Path) -> None:
    """Of 8 requests the two shortest prompts are the first kind, whatever their order; one of half the weight is two parts of four."""
    prompts = [80, 10, 50, 30, 20, 70, 40, 60]
    got = read("n_in,n_out\n" + "".join(f"{n},{n // 10}\n" for n in prompts), tmp_path / "a.csv")
    assert kinds(got) == [(0.25, 15, 2), (0.25, 35, 4), (0.25, 55, 6), (0.25, 75, 8)]  # 1.5, 3.5, .. to even
    heavy = read("n_in,n_out,weight\n10,1,1\n20,1,1\n30,1,4\n40,1,2\n", tmp_path / "b.csv")
    assert kinds(heavy) == [(0.25, 15, 1), (0.5, 30, 1), (0.25, 40, 1)]
    weighted = read("n_in,n_out,weight\n10,1,3\n50,9,1\n" + "100,1,4\n" * 3, tmp_path / "c.csv")
    assert kinds(weighted) == [(0.25, 20, 3), (0.75, 100, 1)]
    tenths = read("n_in,n_out,weight\n" + "".join(f"{10 * n},1,0.7\n" for n in range(1, 13)), tmp_path / "d.csv")
    assert kinds(tenths) == [(0.25, 20, 1), (0.25, 50, 1), (0.25, 80, 1), (0.25, 110, 1)]  # though such weights do not add up


def test_a_request_of_no_weight_is_none(tmp_path: Path) -> None:
    assert kinds(read("n_in,n_out,weight\n10,1,2\n90,9,0\n", tmp_path / "r.csv")) == [(1.0, 10, 1)]


def test_the_cold_share_of_a_trace_is_that_of_its_long_gaps(tmp_path: Path) -> None:
    got = read("n_in,n_out,timestamp\n" + "".join(f"9,9,{t}\n" for t in (0, 299, 599, 1000, 1001)), tmp_path / "r.csv")
    assert tuple(got.gaps_s) == (299, 300, 401, 1)
    assert got.cold_share(300) == 0.5 and got.cold_share(301) == 0.25 and got.cold_share(1000) == 0.0


def test_without_a_trace_requests_come_at_random() -> None:
    assert one_length(9, 9, per_hour=12).cold_share(300) == pytest.approx(math.exp(-1))
    assert one_length(9, 9, per_hour=120).cold_share(300) == pytest.approx(math.exp(-10))
    assert one_length(9, 9).cold_share(300) == 0.0


BAD_ROWS = {
    "no number": ("n_in,n_out\n9,9\nten,9\n", "row 2 has n_in 'ten'"),
    "empty": (f"{AZURE}\n2023-11-16 18:15:46,,44\n", "row 1 lacks the length of the prompt"),
    "no answer": ("n_in\n9\n", "row 1 lacks the length of the answer"),
    "other columns": ("a,b\n1,2\n", "row 1 lacks the length of the prompt"),
    "short row": ("n_in,n_out\n9,9\n9\n", "row 2 lacks the length of the answer"),
    "zero": ("n_in,n_out\n0,9\n", "row 1 has n_in '0', not a number of 1 or more"),
    "negative": ("n_in,n_out\n9,-1\n", "row 1 has n_out '-1'"),
    "endless": ("n_in,n_out\n1e9,9\n", "row 1 has n_in '1e9'"),
    "infinite": ("n_in,n_out\n9,9\n9,inf\n", "row 2 has n_out 'inf'"),
    "not a number": ("n_in,n_out,weight\n9,9,nan\n", "row 1 has weight 'nan', not a number of 0 or more"),
    "no time": ("n_in,n_out,timestamp\n9,9,1\n9,9,yesterday\n", "row 2 has the timestamp 'yesterday'"),
    "never": ("n_in,n_out,timestamp\n9,9,nan\n9,9,1\n", "row 1 has the timestamp 'nan'"),
    "for ever": ("n_in,n_out,timestamp\n9,9,1\n9,9,inf\n", "row 2 has the timestamp 'inf'"),
    "half a line": ('{"n_in": 9, "n_out": 9}\n{"n_in": 9,\n', "row 2 is not a JSON object"),
    "a list": ('{"n_in": 9, "n_out": 9}\n\n[9, 9]\n', "row 2 is not a JSON object"),
    "a list within": ('{"n_in": [9], "n_out": 9}\n', r"row 1 has n_in \[9\]"),
    "huge": ('{"n_in": 1%s, "n_out": 9}\n' % ("0" * 400), "row 1 has n_in 10"),
    "huge time": ('{"n_in": 9, "n_out": 9, "time": 1%s}\n' % ("0" * 400), "row 1 has the timestamp 10"),
    "deep": ('{"n_in": 9, "n_out": 9}\n{"a": %s\n' % ("[" * 100_000), "row 2 is not a JSON object"),
    "wide": ("n_in,n_out\n9,9\n9,%s\n" % ("9" * 200_000), "row 2 is not CSV"),
}
BAD_FILES = {
    "nothing": ("", "holds no requests"),
    "header": ("n_in,n_out\n", "holds no requests"),
    "some times": ("n_in,n_out,timestamp\n9,9,1\n9,9,\n", "1 of 2 rows have no timestamp"),
    "one time": ("n_in,n_out,timestamp\n9,9,1\n9,9,1\n", "the same timestamp"),
    "one instant": ("n_in,n_out,timestamp\n9,9,0\n9,9,1e-320\n", "the same timestamp"),
    "no weight": ("n_in,n_out,weight\n9,9,0\n8,8,0\n", "the weight 0"),
}


@pytest.mark.parametrize(("text", "said"), (BAD_ROWS | BAD_FILES).values(), ids=BAD_ROWS | BAD_FILES)
def test_a_bad_file_is_one_clear_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        read(text, tmp_path / "requests.csv")
    assert str(tmp_path / "requests.csv") in raised.value.message and raised.value.hint


@pytest.mark.parametrize("content", [None, b"n_in,n_out\n\xff\xfe,9\n"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"requests\.csv cannot be read"):
        read_requests(path)


@pytest.mark.parametrize("lengths", [(0, 9), (9, 0)])
def test_no_length_is_below_one(lengths: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        one_length(*lengths)


# Files as people have them


def jsonl(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows))


ROWS = ({"n_in": 10, "n_out": 4, "timestamp": 0}, {"n_in": 20, "n_out": 8, "timestamp": 60}, {"n_in": 20, "n_out": 8, "timestamp": 180})
TABLE = "n_in,n_out,timestamp\n10,4,0\n20,8,60\n20,8,180\n"
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
THIRDS = [(0.333333333333, 10, 4), (0.666666666667, 20, 8)]
TEXT = "first\u2028second\u0085third\x0cfourth\u2029fifth"  # ends of lines to Unicode, but not to a file
TEXTS_IN_ROWS = "".join(f"{json.dumps(row | {'prompt': TEXT}, ensure_ascii=False)}\n" for row in ROWS)
CELL = '"one\ntwo, ""three""\r\nfour"'
SHAPES = {
    "CSV": TABLE,
    "CSV of another system": TABLE.replace("\n", "\r\n"),
    "CSV of an old spreadsheet": TABLE.replace("\n", "\r"),
    "CSV without a last line end": TABLE.strip(),
    "CSV with blank lines": "\n\n" + TABLE.replace("\n", "\n\n") + ",,\n",
    "CSV with spaces": TABLE.replace(",", ", ").replace("\n", " \n"),
    "CSV with spaces before quotes": "".join(", ".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in TABLE.splitlines()),
    "CSV with carriage returns in cells": TABLE.replace("\n", ",one\rtwo\n").replace("one\rtwo", "prompt", 1),
    "CSV with semicolons": TABLE.replace(",", ";"),
    "CSV with a named delimiter": "sep=;\n" + TABLE.replace(",", ";"),
    "CSV with tabs": TABLE.replace(",", "\t"),
    "CSV with quotes": "".join(",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in TABLE.splitlines()),
    "CSV with decimal points": TABLE.replace("10,4,0", "10.0,4.0,0.0").replace("20,8", "20.0,8.0"),
    "CSV with text": TABLE.replace("\n", f",{TEXT}\n").replace(TEXT, "prompt", 1),
    "CSV with line ends in cells": TABLE.replace("\n", f",{CELL}\n").replace(CELL, "prompt", 1),
    "CSV with long cells": TABLE.replace("\n", f",{'long ' * 50_000}\n").replace("long " * 50_000, "prompt", 1),
    "CSV with other columns": TABLE.replace("\n", ",x\n"),
    "CSV with a longer row": TABLE.replace("10,4,0", "10,4,0,x,y"),
    "JSON lines": LINES,
    "JSON lines of another system": LINES.replace("\n", "\r\n"),
    "JSON lines with text": TEXTS_IN_ROWS,
    "JSON lines with blank lines": "\n\n" + LINES.replace("\n", "\n \n"),
    "JSON objects over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "JSON array": json.dumps(ROWS),
    "JSON array over several lines": json.dumps(ROWS, indent=1),
    "JSON array with text": "[" + TEXTS_IN_ROWS.strip().replace("}\n", "},\n") + "]\n",
    "JSON array in an object": json.dumps({"object": "list", "data": ROWS}),
    "JSON pages": jsonl({"data": [{"items": ROWS[:1]}, {"items": []}], "next": 1}, {"data": [{"items": ROWS[1:]}]}),
    "JSON lines with lists of objects": jsonl(*({**row, "results": [{"text": "a"}]} for row in ROWS)),
    "JSON object of columns": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gz"])
@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_one_trace_in_many_shapes(text: str, encoding: str, tmp_path: Path) -> None:
    """Lines end at a line feed and nowhere else; quotes, spaces, marks and compression change nothing."""
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(text.encode()) if encoding == "gz" else text.encode(encoding))
    got = read_requests(path)
    assert kinds(got) == THIRDS
    assert tuple(got.gaps_s) == (60, 120) and got.per_hour == 40
    assert "3 requests over 3 min, 40 an hour; " in got.notes[0]


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
    assert got.notes[0].startswith("trace: 2 requests over 3 s, 1,200 an hour; the longest of 100 + 10 tokens; columns ")
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
    assert (
        got.notes[0] == f"r.csv: 3 requests over 3 min, 40 an hour; the longest of 9 + 9 tokens; columns n_in, n_out, {name} ({unit}) used."
    )


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
    plan = plan_of(synthetic_profile(tmp_path / "profile"), tiny_catalog(), requests=requests)
    assert requests.notes[0] in plan.notes
    assert requests.notes[0].startswith("trace.csv: 3 requests over 3 min, 40 an hour; ")


# Limits


def test_the_columns_that_were_found_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"row 1 lacks the length of the prompt; columns found: conversations, id\.") as raised:
        read(
            jsonl({"id": "a", "conversations": [{"from": "human", "value": "hello"}]}).replace('"id": "a", ', "")[:-1] + ', "id": 1}',
            tmp_path / "r",
        )
    assert "n_in and n_out" in raised.value.hint
    with pytest.raises(UsageError, match=r"columns found: 10, 5, 0\."):
        read("10,5,0\n20,5,60\n", tmp_path / "r")


BROKEN = {
    "a quote that is never closed": (b'n_in,n_out,text\n9,9,"a\n8,8,b\n', "row 1 is not CSV: a quote is opened there and never closed"),
    "an array that is cut": (b'[{"n_in": 9, "n_out": 9},', "row 1 without its closing bracket"),
    "an array that is cut in a row": (b'[{"n_in": 9, "n_out": 9}, {"n_in"', "row 2 is not a JSON object"),
    "something after an array": (b'[{"n_in": 9, "n_out": 9}] x', "row 2 is not a JSON object"),
    "an array of numbers": (b"[9, 9]", "row 1 is not a JSON object"),
    "a deep array": (b"[" * 100_000, "row 1 is not a JSON object"),
    "deep objects": (b'{"a":' * 100_000, "row 1 is not a JSON object"),
    "deep data": (b'{"data":[' * 200 + b"{}" + b"]}" * 200, "row 1 lacks the length of the prompt"),
    "lists of two lengths": (b'{"n_in": [9, 9], "n_out": [9]}', "row 1 has 2 lengths of prompts and 1 of answers"),
    "a number of 5,000 digits": (b'{"n_in": ' + b"9" * 5000 + b', "n_out": 9}', "row 1 is not a JSON object"),
    "a thousand separator": (b'n_in,n_out\n"1,234",9\n', "row 1 has n_in '1,234', not a number"),
    "a decimal comma": (b"n_in;n_out;timestamp\n9;9;0\n9;9;1,5\n", "row 2 has the timestamp '1,5'"),
    "a binary file": (b"PK\x03\x04\xff\xfe\x00", "from its start on it is not text in UTF-8"),
    "bytes that are no text": (b"n_in,n_out\n" + b"9,9\n" * 9999 + b"\xff", "it is not text in UTF-8"),
    "a cut archive": (gzip.compress(os.urandom(9999))[:5000], "cannot be read"),
    "a damaged archive": (b"\x1f\x8bnothing of the kind", "cannot be read"),
    "zeros": (bytes(9999), "holds no requests"),
    "20,000 columns": (",".join(f"c{n}" for n in range(20_000)).encode() + b"\n", "has 20,000 columns"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_clear_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "requests"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        read_requests(path)
    assert str(path) in raised.value.message and raised.value.hint and raised.value.message.isprintable()
    assert len(raised.value.message) < 300 + len(str(path))


def test_a_row_of_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace_rows, "CSV_LIMIT", 5000)
    monkeypatch.setattr(trace_rows, "JSON_LIMIT", 5000)
    monkeypatch.setattr(trace_rows, "_CHUNK", 100)
    with pytest.raises(UsageError, match="row 2 is longer than 5,000 characters"):
        read("n_in,n_out,text\n9,9,\n9,9," + "x" * 5000, tmp_path / "r.csv")
    with pytest.raises(UsageError, match="row 2 is not CSV: field larger than field limit"):
        read('n_in,n_out,text\n9,9,\n9,9,"' + "x\n" * 5000, tmp_path / "r.csv")
    with pytest.raises(UsageError, match="row 2 is not a JSON object of at most 5,000 characters"):
        read(LINES[: LINES.index("\n")] + '{"text": "' + "x" * 9000, tmp_path / "r.jsonl")
    assert read(LINES, tmp_path / "r.jsonl").per_hour == 40  # rows across the ends of chunks


@pytest.mark.parametrize("text", [TABLE, TABLE + "9,ten,300\n"])
def test_the_limit_of_csv_for_others_is_left_as_it_was(text: str, tmp_path: Path) -> None:
    before = csv.field_size_limit(1234)
    try:
        with contextlib.suppress(UsageError):
            read(text, tmp_path / "r.csv")
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "csv.gz"])
def test_memory_does_not_grow_with_the_rows(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 bytes a row for its time; to hold every row takes 750 to 1,100."""
    monkeypatch.setattr(trace_counts, "_BATCH", 2**12)
    monkeypatch.setattr(trace_rows, "_CHUNK", 2**16)
    rows, path = 20_000, tmp_path / f"trace.{form}"
    if form.startswith("csv"):
        text = "n_in,n_out,timestamp\n" + "".join(f"{n % 97 + 1},{n % 7 + 1},{n}.5\n" for n in range(rows))
    else:
        text = ("\n", ",")[form == "json"].join(f'{{"n_in": {n % 97 + 1}, "n_out": {n % 7 + 1}, "timestamp": {n}}}' for n in range(rows))
        text = f"[{text}]" if form == "json" else text
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    del text
    read("n_in,n_out\n9,9\n", tmp_path / "first.csv")
    tracemalloc.start()
    try:
        got = read_requests(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(got.gaps_s) == rows - 1
    assert kept < 9 * rows + 50_000 and peak < 100 * rows


@pytest.mark.parametrize("batch", [1, 2, 3, 1000])
def test_requests_are_counted_in_batches_as_they_are_at_once(batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To the last bit, with weights that do not add up."""
    random = Random(7)
    rows = "".join(f"{random.randint(1, 9)},{random.randint(1, 3)},{random.choice([0.1, 0.7, 3])},{random.random()}\n" for _ in range(200))
    text = "n_in,n_out,weight,timestamp\n" + rows
    at_once = read(text, tmp_path / "r.csv")
    monkeypatch.setattr(trace_counts, "_BATCH", batch)
    batches = read(text, tmp_path / "r.csv")
    assert batches == at_once and tuple(batches.gaps_s) == tuple(at_once.gaps_s)
    parsed = sorted((int(n_in), int(n_out), float(weight)) for n_in, n_out, weight, _ in (row.split(",") for row in rows.splitlines()))
    assert at_once.lengths == in_memory(parsed)


def in_memory(requests: list[tuple[int, int, float]]) -> tuple[Lengths, ...]:
    """What kinds of requests are, with all rows at hand."""
    total, before = sum(weight for *_, weight in requests), 0.0
    parts: list[list[tuple[int, int, float]]] = [[] for _ in range(KINDS)]
    for request in requests:
        parts[min(KINDS - 1, int(before / total * KINDS + 1e-9))].append(request)
        before += request[2]
    shares: dict[tuple[int, int], float] = {}
    for part in filter(None, parts):
        held = sum(weight for *_, weight in part)
        n_in, n_out = (max(1, round(sum(row[at] * row[2] for row in part) / held)) for at in (0, 1))
        shares[n_in, n_out] = shares.get((n_in, n_out), 0.0) + held / total
    return tuple(Lengths(share=share, n_in=n_in, n_out=n_out) for (n_in, n_out), share in sorted(shares.items()))


# Any text


VALUES = st.one_of(
    st.sampled_from(["", "nan", "1e999", "-1", "0", "5e-324", "1e8", "2023-11-16 18:15:46.6805900", "2023-11-16", "0001-01-01", "x"]),
    st.integers(1, 99).map(str),
    st.floats().map(str),
)
NAMES = st.sampled_from(["n_in", "n_out", "weight", "timestamp", "ContextTokens", "GeneratedTokens", "TIMESTAMP", "x"])
TABLES = st.lists(st.lists(VALUES, min_size=2, max_size=5), min_size=1, max_size=6)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(1, 99), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=6,
)


def csv_text(names: list[str], rows: list[list[str]]) -> str:
    return "\n".join(",".join(row) for row in [names, *rows])


TEXTS = st.one_of(
    st.text(),
    st.builds(csv_text, st.just(["n_in", "n_out", "weight", "timestamp"]), TABLES),
    st.builds(csv_text, st.lists(NAMES, min_size=1, max_size=4), TABLES),
    st.lists(st.dictionaries(NAMES, JSONS, min_size=1), min_size=1, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows))),
)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="n_in,n_out,weight\n1,1,1\n2,1,0\n")
@example(text="n_in,n_out,weight\n1,1,1e8\n2,1,1e-320\n")
@example(text="n_in,n_out,timestamp\n1,1,-1e300\n1,1,1e300\n")
def test_any_text_ends_in_requests_or_a_usage_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            got = read_requests(path)
        except UsageError as refused:
            said = (str(path) in refused.message, bool(refused.hint))
            assert said == (True, True)
            return
    assert 1 <= len(got.lengths) <= KINDS
    assert all(kind.share > 0 and kind.n_in >= 1 and kind.n_out >= 1 for kind in got.lengths)
    assert sum(kind.share for kind in got.lengths) == pytest.approx(1, rel=1e-9)
    assert got.per_hour is None or 0 < got.per_hour < math.inf
    assert all(0 <= gap < math.inf for gap in got.gaps_s)
    assert 0 <= got.cold_share(300.0) <= 1
