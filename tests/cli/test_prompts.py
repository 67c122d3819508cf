"""What a command says about the prompts that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe_cli.cli.options import read_data


@pytest.mark.parametrize(("content", "message"), [("a\n\n \nb\n", "2 rows of"), ("a\n\nb\n", "1 row of"), ("a\nb\n", "")])
def test_rows_that_are_left_out_are_counted(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert read_data(str(tmp_path / "a.txt"), "prompt").texts == ("a", "b")
    error = capsys.readouterr().err
    assert (message in error) if message else not error
