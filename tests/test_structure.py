"""The shape of the package: imports without a circle, and files that a reader can hold in the head."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

from tests.support.paths import ROOT

LONGEST_LINES = 400


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too; those for type checkers alone count as well, for a reader follows them all."""
    graph = grimp.build_graph("remoe_cli", cache_dir=None)
    try:
        tuple(TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).static_order())
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(error.args[1])}.")


def test_modules_are_short() -> None:
    counted = {
        file: len(file.read_text().splitlines()) for folder in ("remoe_cli", "tests", "docs") for file in (ROOT / folder).rglob("*.py")
    }
    assert {str(file.relative_to(ROOT)): lines for file, lines in counted.items() if lines > LONGEST_LINES} == {}
