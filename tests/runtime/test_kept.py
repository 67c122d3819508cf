"""Receipts that are kept: by whom, for whom, how large, and what is not lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.kept import Book, Ended, Kind, Unreadable, book_of
from remoe_cli.runtime.main_function import MainFunction, Request
from remoe_cli.runtime.observed import observe
from remoe_cli.runtime.receipt import make_receipt
from remoe_cli.runtime.served_hits import Hits
from remoe_cli.runtime.shares import Owed, divide_call
from tests.support.api_server import PRICES, whole_model
from tests.support.by_hand import PROMPT_IDS, by_hand

CALL = Invocation("f", 700, 700, 0.01, 5.0, 6, 1, 1024, None, 0, compute_s=0.002, experts=2, rows=3)


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> MainFunction:
    folder = tmp_path_factory.mktemp("model")
    by_hand(folder, ())
    return whole_model(folder / "model")


def long_answer(tokens: int = 400, calls: int = 16) -> Generated:
    invoked = tuple(calls * (i + 1) for i in range(tokens))
    times = tuple(0.1 * (i + 1) for i in range(tokens))
    return Generated((1, 2), (3,) * tokens, "", "length", times, (CALL,) * (calls * tokens), invoked, hits=Hits(tuple(range(16)), 64))


def test_every_end_of_a_request_is_kept(main: MainFunction, tmp_path: Path) -> None:
    book = Book(tmp_path / "r")
    keeping = replace(main, keep=book.keep)
    asked = Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=4, user="ann")
    keeping.answer(asked)
    asks = iter([None, None, "cancelled"])
    keeping.answer(asked, stopped=lambda: next(asks, "cancelled"))  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError):
        keeping.answer(asked.model_copy(update={"max_new_tokens": 10**6}))
    kinds: list[tuple[Kind, str | None]] = [(line.kind, line.user) for line in book.receipts()]
    assert kinds == [("answered", "ann"), ("cancelled", "ann"), ("failed", "ann")]
    of_answers = {line.id for line in book.receipts() if line.kind != "failed"}
    assert {line.id for line in book.observations()} == of_answers


def test_an_answer_is_not_lost_where_its_receipt_cannot_be_kept(
    main: MainFunction, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r").write_text("years of work")
    with caplog.at_level(logging.WARNING):
        answer = replace(main, keep=Book(tmp_path / "r").keep).answer(Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=4))
    assert len(answer.token_ids) == 4 and (tmp_path / "r").read_text() == "years of work"
    (record,) = caplog.records
    assert "The receipt of a request could not be kept" in record.getMessage() and "is a file, not a folder" in record.getMessage()


def test_lines_that_cannot_be_read_are_counted_and_the_others_read(tmp_path: Path) -> None:
    book, receipt = Book(tmp_path / "r"), make_receipt(long_answer(3), PRICES)
    for _ in range(2):
        book.keep(Ended("answered", receipt))
    path = book.folder / "receipts.jsonl"
    other = json.loads(path.read_text().splitlines()[0]) | {"schema_version": "remoe.kept-receipt/99"}
    with path.open("a") as file:
        file.write(json.dumps(other) + '\n{"kind": 3}\n{"schema_version": "remoe.kept-rec')
    unreadable = Unreadable()
    assert [line.receipt for line in book.receipts(unreadable=unreadable)] == [receipt] * 2
    assert unreadable.warning == f"3 lines are left out, as they are no whole lines of this version of remoe, the first at {path}:3."


def test_only_what_ended_since_then_is_read(tmp_path: Path) -> None:
    book, before = Book(tmp_path / "r"), datetime.now(UTC)
    book.keep(Ended("answered", make_receipt(long_answer(3), PRICES)))
    assert len(list(book.receipts(before))) == 1 and not list(book.receipts(before + timedelta(hours=1)))


def test_what_a_request_told_is_bounded(tmp_path: Path) -> None:
    """However long an answer is: the sizes that the module states."""
    long, short = observe([long_answer()], "r"), observe([long_answer(5)], "r")
    assert len(long.tokens) == 8 and sum(len(calls) for _, calls in long.tokens) == 128 and len(long.first) == 16
    assert len(long.computing) == 64 and set(long.computing) == {(2, 3, 1024, 0.002)}
    assert [calls for _, calls in short.tokens] == [((1400, 0.01, 0.005, 0.002),) * 16] * 4
    many = observe([replace(long_answer(8, calls=400), hits=Hits(tuple(range(58)), 256))], "r")
    (busy, *_) = in_a_batch([replace(CALL, rows=8)] * 2000, 2)
    full = observe([busy], "r")
    assert len(full.shared) == 256
    book = Book(tmp_path / "r")
    for each in (long, many, full):
        book.keep(Ended("answered", make_receipt(long_answer(3), PRICES), observed=each))
    sizes = [len(line) for line in (book.folder / "observations.jsonl").read_text().splitlines()]
    assert sizes[2] < 20_000 and sizes[0] < 20_000 + 2 * 2 * 16 * 64 + 2000 and sizes[1] < 20_000 + 2 * 2 * 58 * 256 + 2000


def test_a_cold_start_is_told_apart() -> None:
    cold = replace(CALL, init_ms=300.0, cold_tries=1, elapsed_s=0.5)
    made = Generated((1,), (2, 3), "", "length", (1.0, 2.0), (CALL, cold, CALL), (2, 3))
    told = observe([made], "r")
    assert told.cold == ((0.5, 0.3, 0.005),) and len(told.first) == 1 and len(told.computing) == 2 and told.prefill == ()


def in_a_batch(calls: Sequence[Invocation], answers: int) -> list[Generated]:
    """Answers of two tokens, the second of which they make together, with these calls."""
    owed: list[Owed] = [{} for _ in range(answers)]
    parts = list(zip(*(divide_call(call, [1] * answers, owed) for call in calls), strict=True))
    whole = Generated((1,), (2, 3), "", "length", (1.0, 2.0), (CALL, *calls), (1, 1 + len(calls)), shared=(False, True))
    return [replace(whole, parts=(CALL, *mine)) for mine in parts]


def test_a_call_that_several_requests_share_is_told_once() -> None:
    calls = [replace(CALL, init_ms=300.0, cold_tries=1, rows=8, experts=8), *[replace(CALL, rows=8, experts=number) for number in range(6)]]
    told = [observe([each], "r") for each in in_a_batch(calls, 4)]
    assert sum(len(each.cold) for each in told) == 1
    shared = [computed for each in told for computed in each.computing if computed[1] == 8]
    assert sorted(experts for experts, *_ in shared) == list(range(6))
    assert [len(each.first) for each in told] == [1] * 4
    # Their own times are valid: without them a busy server would tell of large calls only, those of prompts.
    assert sum(len(each.shared) for each in told) == 6 and not any(each.tokens for each in told)
    assert set(told[0].shared) <= {(1400, 0.01, 0.005, 0.002)} and "shared" not in observe([long_answer(5)], "r").model_dump()


def test_books_of_accounts_and_targets_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path))
    folders = {book_of("local", "m").folder, book_of("aws", "1-us-east-1", "m").folder, book_of("aws", "2-us-east-1", "m").folder}
    assert len(folders) == 3 and all(folder.is_relative_to(tmp_path / "receipts") for folder in folders)
