"""Every test that the page on reliability names exists, and every check has a test or says that it has none."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/explanation/reliability.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in row.strip("| \n").split(" | ")] for row in re.findall(r"(?m)^\| \d+ \|.*$", PAGE)]
NAMED = sorted(set(re.findall(r"`(tests/\S+?::\w+)`", PAGE)))


def test_every_check_has_a_test_or_says_that_it_has_none() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 25
    for row in ROWS:
        assert len(row) == 4 and ("`tests/" in row[3] or "not yet" in row[3]), row


@pytest.mark.parametrize("name", NAMED)
def test_named_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
