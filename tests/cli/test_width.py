"""What is printed for people is as wide as the terminal, or as COLUMNS says."""

from __future__ import annotations

import ast
import io
import re
import sys

import pytest

from remoe_cli.cli import infer, output
from remoe_cli.deploy.console import Overview
from remoe_cli.errors import UsageError
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.receipt import make_receipt
from tests.cli.test_infer import PRICES
from tests.support.paths import ROOT

TEXT = "The traffic is unknown, so give --requests-per-hour, for cold starts are not in the cost without it, however many there are."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 72])
def test_a_long_text_wraps_under_its_label_and_breaks_no_word(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    output.labelled("note", TEXT)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= columns
    assert lines[0].startswith(f"{'note':<{output.LABEL}}The") and all(line.startswith(" " * output.LABEL) for line in lines[1:])
    assert " ".join(line[output.LABEL :] for line in lines) == TEXT


def test_without_a_terminal_a_line_has_100_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # what the size is asked of
    output.paragraph(TEXT)
    assert output.width() == 100 and 90 < max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_a_narrow_table_breaks_the_first_column_and_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    output.table("Alternatives", ("", "runs on", "cost"), [("the whole model on a GPU that is rented", "ml.g4dn.xlarge", "$1,086,000")])
    shown = capsys.readouterr().out
    assert "ml.g4dn.xlarge" in shown and "$1,086,000" in shown and max(map(len, shown.splitlines())) <= 48


def test_the_title_of_a_narrow_table_stays_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("Receipt, at the prices of catalog 'local'", ("", "USD"), [("cost", "1")])
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "Receipt, at the prices of catalog 'local'"


def test_an_error_wraps_on_a_terminal_and_is_one_line_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(output, "_mode", output._Mode())
    error = UsageError(TEXT, TEXT)
    for stream, lines in ((io.StringIO(), 2), (Terminal(), 8)):
        monkeypatch.setattr(sys, "stderr", stream)
        output.fail(error)
        printed = stream.getvalue().splitlines()
        assert len(printed) == lines
        if lines > 2:
            assert max(map(len, printed)) <= 50
            assert sum(line.startswith(("error: ", "  hint: ")) for line in printed) == 2


def test_what_stands_above_a_table_wraps_under_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output.show_overview(Overview((), above=("demo (local): running", f"  {TEXT}")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo (local): running" and lines[1].startswith("  The traffic") and lines[2].startswith("    ")
    assert max(map(len, lines)) <= 80 and " ".join(map(str.strip, lines[1:])) == TEXT


def test_sentences_are_wrapped_wherever_they_are_printed() -> None:
    """`output.line` is for tables, commands, and paths, which are copied; a sentence is a paragraph."""
    unwrapped = [
        f"{file.name}:{node.lineno} {ast.unparse(node)[:80]}"
        for file in sorted((ROOT / "remoe_cli" / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "output.line"
        if not {"output.LABEL", "story.shown", "each", "arn", "folder", "out"} & set(re.findall(r"[\w.]+", ast.unparse(node)))
        if sum(len(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)) >= 20
    ]
    assert unwrapped == []


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_receipt_fits_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    generated = Generated((1,), (2, 3), "text", "length", (0.1, 0.11), ())
    receipt = make_receipt(generated, PRICES).model_copy(
        update={"main_load_s": 2.0, "hedges": 3, "fallbacks": 2, "starts_ahead": 4, "saved_calls": 5, "saved_usd": 1e-6, "unreported": 1}
    )
    infer.show_receipt(receipt.model_dump(mode="json"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


@pytest.mark.parametrize("columns", [34, 54, 100])
def test_a_table_cuts_no_figure_and_breaks_no_word_at_any_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spare columns go first; where that is not enough, each row is printed as lines."""
    monkeypatch.setenv("COLUMNS", str(columns))
    row = ("the whole model on ml.g4dn.xlarge", "2026-11-30", "$0.000433", "12,345,678.9", "$1,086,000")
    output.table("Alternatives", ("", "day", "functions", "GB-s", "in all"), [row], ("GB-s",))
    shown = capsys.readouterr().out
    kept = [*row[0].split(), *(cell for cell in row[1:] if columns in (34, 100) or cell != "12,345,678.9")]
    assert {*kept} <= {*shown.split()} and max(map(len, shown.splitlines())) <= columns
    assert ("columns have no room for: GB-s. --json has everything." in " ".join(shown.split())) is (columns == 54)
    assert ("  GB-s: 12,345,678.9\n" in shown) is (columns == 34)
