"""What a report takes: documents of receipts in every form in which they come, and one sentence for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.report import inputs
from remoe_cli.report.inputs import read_inputs
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.kept import Book, Ended
from remoe_cli.runtime.receipt import Loading, Prices, make_receipt
from tests.support.synthetic import plan_by_hand, synthetic_profile

RECEIPT: dict[str, Any] = {"prompt_tokens": 5, "generated_tokens": 4, "ttft_s": 0.2, "tpot_s": None, "total_s": 0.4}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"text": "x", "receipt": RECEIPT}) + "\n\n" + json.dumps(RECEIPT | {"a_new_field": 1}),
        json.dumps([{"receipt": RECEIPT}, RECEIPT]),
        json.dumps([RECEIPT, RECEIPT], indent=1),
        json.dumps({"error": {"kind": "Invoke", "receipt": RECEIPT}}) + "\n" + json.dumps({"receipt": RECEIPT}),
    ],
    ids=["lines", "list", "indented", "of a failed request"],
)
def test_receipts_are_read_in_each_form(text: str, tmp_path: Path) -> None:
    found = read_inputs([written(tmp_path / "a.jsonl", text)]).receipts
    assert found is not None and len(found.figures) == 2 and found.without == 0
    assert all(one.total_s == 0.4 and one.tpot_s is None and not one.is_cold for one in found.figures)


def test_documents_without_a_receipt_are_counted(tmp_path: Path) -> None:
    rows = [json.dumps(one) for one in ({"error": {"kind": "Usage", "message": "m"}}, {"receipt": RECEIPT | {"cold_starts": 3}})]
    found = read_inputs([written(tmp_path / "a.jsonl", "\n".join(rows)), written(tmp_path / "b.json", rows[1])]).receipts
    assert found is not None and (len(found.figures), found.without, len(found.paths)) == (2, 1, 2) and found.figures[0].is_cold


@pytest.fixture
def book(tmp_path: Path) -> Book:
    """The receipts of a loading and of two requests, with a line whose writer died between them and one at the end."""
    prices = Prices(
        catalog="example",
        main=MainPrices(rented=False, usd_per_s=2e-5, usd_per_request=0.0, usd_per_read=0.0),
        function=FunctionPrices(
            usd_per_gb_second=2e-5, usd_per_storage_gb_second=0.0, storage_free_mb=512.0, usd_per_call=2e-7, usd_per_read=0.0
        ),
    )
    answered = make_receipt(Generated((1, 2), (3, 4, 5), "", "length", token_times_s=(0.5, 0.6, 0.7), invocations=()), prices)
    book = Book(tmp_path / "receipts" / "local" / "mine")
    book.keep(
        Ended(
            "loading", make_receipt(Generated((1,), (2,), "", "length", token_times_s=(0.0,), invocations=()), prices, Loading(seconds=3.0))
        )
    )
    book.keep(Ended("answered", answered, user="Zo\u00eb\u2028"))
    path = book.folder / "receipts.jsonl"
    torn = path.read_bytes().splitlines()[1]
    torn = torn[: torn.index("\u00eb".encode()) + 1]  # within a character
    with path.open("ab") as file:
        file.write(torn)
    book.keep(Ended("answered", answered))
    with path.open("ab") as file:
        file.write(torn)
    return book


@pytest.mark.parametrize("name", ["", "receipts.jsonl"])
def test_kept_receipts_are_read_but_for_loadings_and_lines_whose_writer_died(name: str, book: Book) -> None:
    found = read_inputs([book.folder / name]).receipts
    assert found is not None and [one.total_s for one in found.figures] == [0.7, 0.7] and not any(one.is_cold for one in found.figures)
    assert found.without == 2 and found.paths == (book.folder / name,)
    assert found.warnings == (
        f"2 lines are left out, as they are no whole lines of this version of remoe, the first at {book.folder / 'receipts.jsonl'}:3.",
    )


def test_of_very_many_kept_receipts_the_last_are_shown(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MOST", 1)
    found = read_inputs([book.folder]).receipts
    assert found is not None and len(found.figures) == 1
    assert found.warnings[0] == f"Only the last 1 of 2 receipts in {book.folder} are shown."


def test_a_folder_without_a_receipt_of_a_request_is_refused(book: Book) -> None:
    path = book.folder / "receipts.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    for given in (path, book.folder):
        with pytest.raises(RemoeError, match="holds no receipt"):
            read_inputs([given])


def test_a_deployments_name_is_told_where_its_receipts_are(book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path))
    for name, is_one in (("mine", True), ("other", False), ("mine.json", False)):
        with pytest.raises(UsageError, match=f"There is no file or folder {name}") as raised:
            read_inputs([Path(name)])
        assert (raised.value.hint == f"The receipts of the deployment 'mine' are in {book.folder}: give that folder.") is is_one


def test_what_is_no_input_is_refused_in_a_sentence(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", plan_by_hand(()))
    write_json(tmp_path / "other.json", plan_by_hand(()))
    synthetic_profile(tmp_path / "p")
    refused = {
        "nothing": "There is no file or folder",
        "empty": "holds no receipt",
        "text": "row 1 is not a JSON document",
        "numbers": "row 1 is not a JSON object",
        "latin": "it is not UTF-8",
        "damaged": "the receipt in row 2 is damaged at 'ttft_s'",
    }
    for name, content in (("empty", b""), ("text", b"hello\n"), ("numbers", b"[1]"), ("latin", b'{"a": "\xe4"}')):
        (tmp_path / name).write_bytes(content)
    written(tmp_path / "damaged", json.dumps(RECEIPT) + "\n" + json.dumps(RECEIPT | {"ttft_s": "soon"}))
    for name, words in refused.items():
        with pytest.raises(RemoeError, match=words) as raised:
            read_inputs([tmp_path / name])
        assert raised.value.hint and name in raised.value.message
    for paths, words in (
        ([tmp_path / "plan.json", tmp_path / "other.json"], "is a second plan"),
        ([tmp_path / "p", tmp_path / "p"], "is a second profile"),
        ([], "nothing to report on"),
    ):
        with pytest.raises(RemoeError, match=words):
            read_inputs(paths)
