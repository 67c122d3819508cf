"""Files as people have them: compressed, in other encodings, arrays, pipes, large cells; and that no more is read than needed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.profile.prompts import files, read_prompts
from tests.profile.test_prompts import TEXTS, refusal, write

TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_programs_make_of_text(suffix: str, encoding: str, packed: bool, tmp_path: Path) -> None:
    """A byte order mark, other encodings, and gzip; each with texts that hold what other programs take for line ends."""
    path = write(tmp_path / f"a{suffix}", TEXTS)
    content = path.read_bytes().decode().encode(encoding)
    path.unlink()
    path = tmp_path / f"a{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_prompts(str(path)).texts == TEXTS


def test_gzip_is_seen_in_the_content(tmp_path: Path) -> None:
    """Some programs unpack what they download and keep the name, or the other way round."""
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"prompt": "one"}\n') + gzip.compress(b'{"prompt": "two"}\n'))
    assert read_prompts(str(tmp_path / "a.jsonl")).texts == ("one", "two")
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"prompt": "one"}\n')
    assert read_prompts(str(tmp_path / "b.jsonl.gz")).texts == ("one",)


@pytest.mark.parametrize("cut", [3, 20, -4])
def test_gzip_that_is_cut_off(cut: int, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": os.urandom(60).hex()}) + "\n" for _ in range(5000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:cut])
    assert "it is damaged or cut off" in refusal(tmp_path / "a.jsonl.gz")


def test_gzip_that_is_damaged(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b'{"prompt": "one"}\n' * 10_000))
    content[-6] ^= 0xFF  # of the checksum
    (tmp_path / "a.json.gz").write_bytes(content)
    assert "it is damaged or cut off" in refusal(tmp_path / "a.json.gz")


def test_utf16_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ntwo".encode("utf-16")[:-1])
    assert "not UTF-16" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_lines_end_at_line_feeds_only(suffix: str, end: str, tmp_path: Path) -> None:
    text = f"one{end}line"
    path = tmp_path / f"a{suffix}"
    row = json.dumps({"prompt": text}, ensure_ascii=False) if suffix in (".jsonl", ".json") else text
    path.write_bytes(("prompt\n" * (suffix in (".csv", ".tsv")) + row + "\n").encode())
    assert read_prompts(str(path)).texts == (text,)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_cell_may_be_long_and_have_lines(suffix: str, tmp_path: Path) -> None:
    text = 'a "word"\r\n' * 200_000
    with (tmp_path / f"a{suffix}").open("w", newline="") as file:
        csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows([("id", "prompt"), (1, text), (2, "b")])
    limit = csv.field_size_limit()
    assert read_prompts(str(tmp_path / f"a{suffix}")).texts == (text, "b")
    assert csv.field_size_limit() == limit


SMALL = 1 << 18  # the limit of a row, for these tests


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "start", "more"),
    [
        ("a.txt", b"", b"x"),
        ("a.jsonl", b'{"prompt": "', b"x"),
        ("a.json", b'[{"prompt": "', b"x"),
        ("a.json", b'[{"a": [', b"1,"),
        ("a.json", b"{\n", b'"a": 1,\n'),
        ("a.json", b'[{"role": "user", "content": ""}', b',{"role": "user", "content": ""}'),
        ("a.csv", b"prompt\n", b"x"),
        ("a.csv", b'prompt\n"', b"x\n"),
        ("a.csv", b"prompt\n", b'"x\n",'),
    ],
)
def test_a_row_without_end_takes_little_memory(
    name: str, start: bytes, more: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes out of a small compressed file."""
    monkeypatch.setattr(files, "_MOST", SMALL)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(start + more * (64 * SMALL // len(more)), 1))
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than" in message or "larger than field limit" in message
    assert peak < 32 * SMALL, peak


def streamed(path: Path, rows: int, text: str) -> None:
    """An array whose end is not JSON, so that reading to its end fails."""
    row = json.dumps({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]})
    with path.open("w") as file:
        file.write("[\n" + (row + ",\n") * rows + "} no JSON")


@pytest.mark.parametrize("text", ["Why?", "x" * 200_000])
def test_an_array_is_streamed(text: str, tmp_path: Path) -> None:
    rows = 8_000_000 // (2 * len(text) + 100)
    streamed(tmp_path / "a.json", rows, text)
    read_prompts(str(tmp_path / "a.json"), limit=1)  # imports
    tracemalloc.start()
    try:
        assert read_prompts(str(tmp_path / "a.json"), limit=10).texts == (text,) * 10
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6, peak
    assert f"row {rows + 1}: not JSON" in refusal(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}', "row 2: not JSON (Expecting ',' or ']' after an element)"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "row 2: not JSON (Expecting ',' or ']' after an element)"),
        ('[{"prompt": "a"},]', "row 2: not JSON (Expecting value)"),
        ('[{"prompt": "a"}] x', "row 2: not JSON (Expecting value)"),
        ('[{"prompt": "a"}, {"prompt": "b]', "row 2: not JSON (Unterminated string"),
        ('[{"prompt": "a"}, 7]', "row 2: a JSON int, not an object"),
        ('[{"prompt": "a"}, ["b"]]', "row 2: a JSON list, not an object"),
        ("[]", "holds no prompts"),
        ("[", "row 1: not JSON"),
        ('{\n"prompt": "a"\n"id": 1}', "row 1: not JSON (Expecting ',' delimiter)"),
        ('{"a": ' * 100_000, "row 1: not JSON (nested too deeply"),
        ("[" * 100_000, "row 1: not JSON (nested too deeply"),
        ('[{"prompt": ' + "9" * 5000 + "}]", "row 1: not JSON"),
    ],
)
def test_arrays_that_are_no_json(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert message in refusal(tmp_path / "a.json")


def test_values_are_found_wherever_the_pieces_of_a_stream_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remoe_cli.profile.prompts import json_rows

    monkeypatch.setattr(json_rows, "_CHUNK", 1)
    texts = ('"\\', "é\u2028", "{[", "true", "\U0001f600")
    for content in (
        json.dumps([{"prompt": text, "n": [1.5e3, None, True]} for text in texts]),
        json.dumps([*texts], ensure_ascii=False, indent=2),
    ):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert read_prompts(str(tmp_path / "a.json")).texts == texts


def piped(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'{"prompt": "one"}\n{"prompt": "two"}\n', ("one", "two")),
        (b' [{"prompt": "one"}, {"prompt": "two"}]', ("one", "two")),
        (b'["one", "two"]', ("one", "two")),
        (b"one\ntwo\n", ("one", "two")),
        (b"[INST] one\n[INST] two", ("[INST] one", "[INST] two")),
        ("\ufeffzwölf".encode(), ("zwölf",)),
        (gzip.compress(b"one\n", mtime=0), ("one",)),
    ],
)
def test_standard_input_is_json_or_text(content: bytes, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    piped(content, monkeypatch)
    found = read_prompts("-")
    assert (found.source, found.texts) == ("standard input", texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input holds no prompts"), (b"\xff\n", "standard input, row 1: not UTF-8"), (b"PAR1...", "standard input is Parquet")],
)
def test_standard_input_that_is_wrong(content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(content, monkeypatch)
    with pytest.raises(UsageError, match=message):
        read_prompts("-")


def test_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="There is no standard input"):
        read_prompts("-")


def test_a_named_pipe_is_a_stream(tmp_path: Path) -> None:
    """What a shell makes of <(command)."""
    os.mkfifo(tmp_path / "63")
    writer = threading.Thread(target=(tmp_path / "63").write_text, args=('{"prompt": "one"}\n',))
    writer.start()
    assert read_prompts(str(tmp_path / "63")).texts == ("one",)
    writer.join()


def test_a_file_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    opened: Callable[..., Any] = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_all_prompts_together_have_a_limit(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file of a few kilobytes says one text many times."""
    from pyarrow import Table, parquet

    from remoe_cli.profile import prompts

    monkeypatch.setattr(prompts, "_MOST_BYTES", 4 << 20)
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt":
        path.write_text("a\n" * 30_000)
    else:
        parquet.write_table(
            Table.from_pydict({"prompt": ["x" * 100_000] * 50}), path, compression="zstd", dictionary_pagesize_limit=1 << 20
        )
        assert path.stat().st_size < 4096
    with pytest.raises(UsageError, match="with it the prompts take more than 4 MiB, which is the most") as raised:
        prompts.read_prompts(str(path))
    assert "--limit" in raised.value.hint
    assert len(prompts.read_prompts(str(path), limit=5).texts) == 5
