"""Requests from a file: how long they are, how often they come, how many find everything cold; and what is no such file."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remoe_cli.errors import UsageError
from remoe_cli.plan.problem.trace_traffic import KINDS, read_traffic
from remoe_cli.plan.problem.traffic import one_length
from tests.support.traces import AZURE, kinds, read


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


@pytest.mark.parametrize(("text", "pattern"), (BAD_ROWS | BAD_FILES).values(), ids=BAD_ROWS | BAD_FILES)
def test_a_bad_file_is_one_clear_sentence(text: str, pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=pattern) as raised:
        read(text, tmp_path / "requests.csv")
    assert str(tmp_path / "requests.csv") in raised.value.message and raised.value.hint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    with pytest.raises(UsageError, match=r"^There is no file .*/requests\.csv\.$") as raised:
        read_traffic(path)
    assert raised.value.hint == "Check the path."
    path.write_bytes(b"n_in,n_out\n\xff\xfe,9\n")
    with pytest.raises(UsageError, match=r"requests\.csv cannot be read"):
        read_traffic(path)


@pytest.mark.parametrize("lengths", [(0, 9), (9, 0)])
def test_no_length_is_below_one(lengths: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        one_length(*lengths)


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
            got = read_traffic(path)
        except UsageError as refused:
            complete = (str(path) in refused.message, bool(refused.hint))
            assert complete == (True, True)
            return
    assert 1 <= len(got.lengths) <= KINDS
    assert all(kind.share > 0 and kind.n_in >= 1 and kind.n_out >= 1 for kind in got.lengths)
    assert sum(kind.share for kind in got.lengths) == pytest.approx(1, rel=1e-9)
    assert got.per_hour is None or 0 < got.per_hour < math.inf
    assert all(0 <= gap < math.inf for gap in got.gaps_s)
    assert 0 <= got.cold_share(300.0) <= 1
