"""The how-to on reading a plan shows what the command prints, and explains each line. REMOE_WRITE_GOLDEN=1 writes the output anew."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from remoe_cli.artifacts import read_json
from remoe_cli.cli import app
from remoe_cli.plan.document import BaselineName, Plan
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES
from remoe_cli.plan.explain.rows import summary_rows
from tests.support.paths import ROOT

PAGE = ROOT / "docs/how-to/read-a-plan.md"
SHOWN = "plans/deepseek-v2-lite-aws.json"
PLANS = sorted((ROOT / "plans").glob("*.json"))


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints. The age of prices grows from day to day."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["remoe", "plan", "show", SHOWN])
    assert app.run() == 0
    text = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    return re.sub(r"\d[\d,]* days old", "N days old", text).rstrip() + "\n"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = printed(capsys, monkeypatch)
    page, block = PAGE.read_text(encoding="utf-8"), re.compile(r"(?ms)(^```text\n)(.*?)(^```$)")
    if os.environ.get("REMOE_WRITE_GOLDEN"):
        page = block.sub(lambda found: found[1] + output + found[3], page)
        PAGE.write_text(page, encoding="utf-8")
    shown = block.search(page)
    assert shown and shown[2] == output, "REMOE_WRITE_GOLDEN=1 writes it anew; look at the difference"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_each_line_of_a_plan_is_explained(path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {name for name, _ in summary_rows(read_json(path, Plan))} | {"note", "requests"}
    assert [name for name in sorted(names) if f"\n| {name} |" not in page] == []


def test_each_alternative_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in BaselineName:
        title = BASELINE_TITLES[name].partition(" (")[0]
        title = re.sub(r"^quantised model in .*", "quantised model in ..", title)
        assert f"\n| {title} |" in page, title
