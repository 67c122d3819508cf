"""Every prompt reader, and every way in which a source of prompts can be wrong."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remoe_cli.demo_data import PROMPTS
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.profile.prompts import PromptSet, read_prompts

TEXTS = ("How do tides work?", "Übersetze: 你好, Welt", 'She said "stop", then left.', "x" * 500, "\u2028 one line to us")
SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv", ".parquet")


def write(path: Path, texts: tuple[str, ...], field: str = "prompt") -> Path:
    match path.suffix:
        case ".jsonl" | ".json" | ".ndjson":
            path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
        case ".txt":
            path.write_bytes("".join(text + "\n" for text in texts).encode())
        case ".csv" | ".tsv":
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([("id", field), *enumerate(texts)])
        case ".parquet":
            pq.write_table(pa.table({"id": list(range(len(texts))), field: list(texts)}), path)
    return path


def refusal(source: Path | str, field: str = "prompt") -> str:
    with pytest.raises(UsageError) as caught:
        read_prompts(str(source), field)
    assert caught.value.hint
    assert str(source) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_reads_the_same_texts(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS)
    found = read_prompts(str(path))
    assert found == PromptSet(str(path), "prompt", TEXTS)
    assert found.sha256 == PromptSet("elsewhere", "other", TEXTS).sha256


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_another_field(suffix: str, tmp_path: Path) -> None:
    assert read_prompts(str(write(tmp_path / f"a{suffix}", TEXTS, "question")), "question").texts == TEXTS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_suffix_may_be_in_capitals(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS)
    assert read_prompts(str(path.rename(tmp_path / f"A{suffix.upper()}"))).texts == TEXTS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_blank_texts_are_no_prompts(suffix: str, tmp_path: Path) -> None:
    assert read_prompts(str(write(tmp_path / f"a{suffix}", ("one", "", " \t", "two")))).texts == ("one", "two")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_limit_counts_prompts_and_a_large_one_is_no_error(suffix: str, tmp_path: Path) -> None:
    source = str(write(tmp_path / f"a{suffix}", ("", *TEXTS)))
    assert read_prompts(source, limit=2).texts == TEXTS[:2]
    assert read_prompts(source, limit=99).texts == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": "two"}\n\xff\n'),
        ("a.txt", b"one\ntwo\n\xff\n"),
        ("a.csv", b"prompt\n\none\ntwo\n\xff\n"),
    ],
)
def test_the_limit_stops_the_reading(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read_prompts(str(path), limit=2).texts == ("one", "two")
    bad_line = content.split(b"\n").index(b"\xff") + 1
    assert f"row {bad_line}: not UTF-8" in refusal(path)


def test_the_limit_stops_the_reading_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [*(f"prompt {i}" for i in range(5000)), None]}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    second_group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = second_group.dictionary_page_offset or second_group.data_page_offset
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    assert len(read_prompts(str(path), limit=500).texts) == 500
    assert re.search(r"after row \d+: not readable as Parquet", refusal(path))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"limit of prompts is {limit}"):
        read_prompts(str(write(tmp_path / "a.txt", TEXTS)), limit=limit)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    for name, content in [
        ("a.txt", "one\r\ntwo\r\n"),
        ("a.csv", "prompt,id\r\none,1\r\ntwo,2\r\n"),
        ("a.jsonl", '{"prompt":"one"}\r\n{"prompt":"two"}'),
    ]:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_prompts(str(tmp_path / name)).texts == ("one", "two")


def test_a_csv_text_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt\n1,"a ""b"",\nc"\n\n2,d\n')
    assert read_prompts(str(tmp_path / "a.csv")).texts == ('a "b",\nc', "d")


def test_the_digest_sees_boundaries_and_order_and_never_changes() -> None:
    groups = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("ab", "c", ""), ('ab","c',), ("ab\x00c",)]
    assert len({PromptSet("s", "f", group).sha256 for group in groups}) == len(groups)
    known = PromptSet("s", "f", ("one", "zwölf")).sha256
    assert known == "a58f19f7aae7c915aa2e8a1b74e90f9cf07bb797cd82f6be28b4545acd277dc8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b" \n\n", "holds no prompts"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.csv", b"", "holds no prompts"),
        ("a.csv", b"id,prompt\n", "holds no prompts"),
        ("a.txt", b"fine\n\ncaf\xe9\n", "row 3: not UTF-8"),
        ("a.csv", b"prompt\ncaf\xe9\n", "row 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "row 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n["b"]\n', "row 3: a JSON list, not an object"),
        ("a.jsonl", b"[" * 200_000, "row 1: not JSON"),
        ("a.json", b'[\n{"prompt": "a"}\n}\n', "row 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n{"id": 1, "text": "b"}\n', "row 2 has no field 'prompt'; it has id, text"),
        ("a.jsonl", b"{}\n", "row 1 has no field 'prompt'; it has none"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ["b"]}\n', "row 2: the field 'prompt' is of type list, not text"),
        ("a.jsonl", b'{"prompt": null}\n', "row 1: the field 'prompt' is null, not text"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}\n', "row 1: the field 'prompt' holds half of a surrogate pair"),
        ("a.csv", b"\nid,text\n1,a\n", "has no field 'prompt'; it has id, text"),
        ("a.csv", b"id,prompt\n1,a\n2\n", "row 3: 1 values for the 2 columns"),
        ("a.csv", b"id,prompt\n1,a,b\n", "row 2: 3 values for the 2 columns"),
        ("a.csv", b'id,prompt\n1,"a\na"\n2,"b\nc\n', "row 4: not CSV"),
        ("a.csv", b'id,prompt\n1,"a"b\n', "row 2: not CSV"),
        ("a.parquet", b"", "not readable as Parquet"),
        ("a.parquet", b"PAR1 no table PAR1", "not readable as Parquet"),
        ("a.xlsx", b"prompt\na\n", "has the unknown suffix '.xlsx'"),
        ("prompts", b"a\n", "has the unknown suffix ''"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "text": ["a"]}, "has no field 'prompt'; it has id, text"),
        ({"prompt": ["a"] * 300 + [None]}, "row 301: the field 'prompt' is null"),
        ({"prompt": [1, 2]}, "row 1: the field 'prompt' is of type int"),
        ({"prompt": [["a"]]}, "row 1: the field 'prompt' is of type list"),
        ({"prompt": pa.array([], pa.string())}, "holds no prompts"),
        ({"prompt": pa.array([b"ok", b"\xff"]).view(pa.string())}, "after row 1: not readable as Parquet"),
    ],
)
def test_parquet_that_is_not_prompts(columns: dict[str, object], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert message in refusal(tmp_path / "a.parquet")


def test_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("a")
    with pytest.raises(UsageError) as caught:
        read_prompts(str(tmp_path / "a.xlsx"))
    assert all(suffix in caught.value.hint for suffix in SUFFIXES)


@pytest.mark.parametrize(
    "source", ["nothere.txt", "folder/prompts.jsonl", "/a/b/c", "../x/y", "", "a\x00b", "x" * 5000, "a/b/c", "http://a.b/c"]
)
def test_no_such_file_never_asks_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="There is no file"):
        read_prompts(source)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["owner/name.jsonl", "owner/name"])
def test_what_is_on_disk_wins_over_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    Path("owner").mkdir()
    Path(name).write_text('{"prompt": "local"}\n')
    if name.endswith(".jsonl"):
        assert read_prompts(name).texts == ("local",)
    else:
        assert "unknown suffix" in refusal(name)


def check_outcome(path: Path) -> None:
    """Nothing but prompts or a refusal comes of a file; any other exception passes through and fails the test."""
    outcome: PromptSet | RemoeError
    try:
        outcome = read_prompts(str(path))
    except RemoeError as error:
        outcome = error
    match outcome:
        case PromptSet(texts=texts):
            assert texts
            assert all(text.strip() and text.encode("utf-8") for text in texts)
            assert re.fullmatch("[0-9a-f]{64}", outcome.sha256)
        case RemoeError(message=message, hint=hint):
            assert message
            assert hint


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=100).map(lambda body: b"PAR1" + body + len(body).to_bytes(4, "little") + b"PAR1"),
        st.binary(max_size=100).map(lambda body: b'prompt,"id"\n' + body),
        st.text(max_size=100).map(lambda body: json.dumps({"prompt": body}).encode() + b"\n" + body.encode("utf-8", "replace")),
    ),
)
def test_garbage_gives_prompts_or_a_refusal(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    check_outcome(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_parquet_file_gives_prompts_or_a_refusal(damage: list[tuple[int, int]], tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    content = bytearray(path.read_bytes())
    for place, byte in damage:
        content[place % len(content)] = byte
    path.write_bytes(content)
    check_outcome(path)


# The prompts of the demonstration.


def _demo() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def test_the_demo_has_forty_prompts_in_each_of_eight_topics() -> None:
    rows = _demo()
    topics = ("code", "mathematics", "translation", "facts", "dialogue", "summaries", "writing", "reasoning")
    assert Counter(row["topic"] for row in rows) == dict.fromkeys(topics, 40)
    assert [row["id"] for row in rows] == [f"{topic}-{number:02}" for topic in topics for number in range(1, 41)]
    assert all(row.keys() == {"id", "topic", "prompt"} for row in rows)
    assert read_prompts(str(PROMPTS)).texts == tuple(row["prompt"] for row in rows)


def test_the_demo_prompts_have_5_to_120_words_and_differ() -> None:
    rows = _demo()
    words = {row["id"]: re.findall(r"\w+", row["prompt"].lower()) for row in rows}
    assert all(5 <= len(row["prompt"].split()) <= 120 for row in rows)
    assert min(len(words[row["id"]]) for row in rows if row["topic"] == "summaries") >= 40
    triples = {key: set(zip(text, text[1:], text[2:], strict=False)) for key, text in words.items()}
    alike = {(a, b): len(triples[a] & triples[b]) / max(1, min(len(triples[a]), len(triples[b]))) for a, b in combinations(triples, 2)}
    assert max(alike.values()) < 0.4, max(alike, key=lambda pair: alike[pair])
    openings = Counter(tuple(text[:4]) for text in words.values())
    assert max(openings.values()) <= 4, openings.most_common(3)
