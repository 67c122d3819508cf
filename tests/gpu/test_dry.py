"""`make test-gpu` without a GPU: what is made, started and compared there works, so that a GPU's time is not lost on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as table
from tests.gpu import speed, tokens
from tests.support import split


@pytest.fixture(autouse=True)
def one_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FAMILIES", ("qwen2_moe",))
    placements = {name: speed.PLACEMENTS[name] for name in ("GPU, CPU and functions", "transformers' offloading")}
    monkeypatch.setattr(table, "PLACEMENTS", placements)


@pytest.mark.nightly
def test_the_dry_form_runs_whole(tmp_path: Path) -> None:
    found = {row.what: row for row in table.rows("cpu", tmp_path)}
    compared = [row for what, row in found.items() if "tokens" in what]
    assert [row.ok for row in compared] == [True, True]
    assert found["GPU, CPU and functions: TTFT, TPOT"].value.endswith("ms")
    assert found["transformers' offloading"].value == table.NOT_RUN
    assert not [what for what, row in found.items() if row.ok is False]


def test_other_tokens_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = split.load

    def damaged(*arguments: object, **more: object) -> object:
        model = load(*arguments, **more)  # type: ignore[arg-type]
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(-1)
        return model

    monkeypatch.setattr(split, "load", damaged)
    assert [row.ok for row in tokens.rows("cpu", tmp_path)] == [False, False]
