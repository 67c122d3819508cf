"""The picture of the architecture shows the packages that exist, in the order of the import contracts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
PICTURE = PAGE[PAGE.index("```text") : PAGE.index("```", PAGE.index("```text") + 3)]


def contracts() -> list[dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = settings["tool"]["importlinter"]["contracts"]
    return found


def layers(container: str = "remoe_cli") -> list[set[str]]:
    """Names on each layer of the contract for what is in `container`."""
    contract = next(each for each in contracts() if each["type"] == "layers" and each.get("containers") == [container])
    return [{name.strip() for name in re.split("[:|]", layer)} for layer in contract["layers"]]


def rows_of_picture() -> list[set[str]]:
    """Names in each box of the picture, from the top: all in a box of nothing but names, else the first word of each cell."""
    rows = []
    for box in re.split(r"(?m)^ \+-.*$", PICTURE):
        lines = [re.findall(r"\| +([^|]+?) +(?=\|)", line) for line in box.splitlines() if line.startswith(" |")]
        if lines and all(len(cells) == 1 and re.fullmatch(r"\w+(?:  \w+)+", cells[0]) for cells in lines):
            rows.append({name for cells in lines for name in cells[0].split()})
        elif lines:
            rows.append({cell.split()[0] for cell in lines[0]})
    return rows


def packages(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


def test_the_picture_has_every_package() -> None:
    shown = set[str]().union(*rows_of_picture())
    modules = {path.stem for path in (ROOT / "remoe_cli").glob("*.py")} - {"__init__", "__main__"}
    assert shown == packages(ROOT / "remoe_cli") | modules


def test_the_table_for_contributors_has_every_package() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (`remoe_cli/.*?) \| \w", table)
    assert {name for row in rows for name in re.findall(r"`remoe_cli/(\w+)/`", row)} == packages(ROOT / "remoe_cli")


def test_the_picture_is_in_the_order_of_the_contract() -> None:
    assert rows_of_picture()[: len(layers())] == layers()


def test_the_planners_rooms_are_in_the_order_of_their_contract() -> None:
    table = re.findall(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|", PAGE)
    shown = [set(re.findall(r"`(\w+)`", row)) for row in table]
    assert shown == [*layers("remoe_cli.plan"), {"verify"}]
    assert packages(ROOT / "remoe_cli/plan") <= set[str]().union(*shown)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE))))
def test_files_that_the_page_names_exist(path: str) -> None:
    assert (ROOT / "remoe_cli" / path).is_file() or (ROOT / path).is_file()
