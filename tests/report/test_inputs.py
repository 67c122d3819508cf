"""What a report takes: documents of receipts in every form in which they come, and one sentence for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.errors import RemoeError
from remoe_cli.report.inputs import read_inputs
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
