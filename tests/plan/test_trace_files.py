"""Files of requests in all shapes that people have, and what is none: limits, errors, and the memory that reading takes."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.document import Lengths
from remoe_cli.plan.problem import trace_counts, trace_rows
from remoe_cli.plan.problem.trace_traffic import KINDS, read_traffic
from tests.support.traces import TABLE, jsonl, kinds, read

# Shapes


ROWS = ({"n_in": 10, "n_out": 4, "timestamp": 0}, {"n_in": 20, "n_out": 8, "timestamp": 60}, {"n_in": 20, "n_out": 8, "timestamp": 180})
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
    got = read_traffic(path)
    assert kinds(got) == THIRDS
    assert tuple(got.gaps_s) == (60, 120) and got.per_hour == 40
    assert "3 requests over 3 min, 40 an hour; " in got.notes[0]


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
    "deep data": (b'{"data":[' * 200 + b"{}" + b"]}" * 200, "row 1 is nested too deeply"),
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
        read_traffic(path)
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
        got = read_traffic(path)
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


def test_true_is_no_number_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n_in": true, "n_out": 4}\n')
    with pytest.raises(UsageError, match="row 1 has n_in True, not a number of 1 or more"):
        read_traffic(path)
