"""The tables of README.md and plans/README.md say what the shipped plans say."""

from __future__ import annotations

import pytest

from docs.measure.plans_table import IN_README, PLANS, SHIPPED, money_row, row
from tests.support.paths import ROOT


def test_every_shipped_plan_has_a_row() -> None:
    assert {path.stem for path in PLANS.glob("*.json")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_row_of_a_plan(name: str) -> None:
    assert row(name) in (ROOT / "plans" / "README.md").read_text().splitlines(), "run python docs/measure/plans_table.py"


@pytest.mark.parametrize("name", IN_README)
def test_the_row_of_money(name: str) -> None:
    assert money_row(name) in (ROOT / "README.md").read_text().splitlines(), "run python docs/measure/plans_table.py"
