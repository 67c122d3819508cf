"""The first line of a docstring is short enough to be read at a glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.paths import ROOT

LONGEST = 100  # columns of the sentence


def public_docstrings(node: ast.Module | ast.ClassDef, where: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the docstring of a module or class, and of what is public in it: functions, classes, methods, properties."""
    yield where, ast.get_docstring(node) or ""
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and not inner.name.startswith("_"):
            yield from public_docstrings(inner, f"{where}.{inner.name}")
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
            yield f"{where}.{inner.name}", ast.get_docstring(inner) or ""


def test_first_lines_are_short() -> None:
    docstrings = {
        where: text
        for file in sorted((ROOT / "remoe_cli").rglob("*.py"))
        for where, text in public_docstrings(ast.parse(file.read_text(encoding="utf-8")), str(file.relative_to(ROOT)))
    }
    assert len(docstrings) > 500
    assert {where: text.partition("\n")[0] for where, text in docstrings.items() if len(text.partition("\n")[0]) > LONGEST} == {}
