"""What the planner's words promise wherever they are printed."""

from __future__ import annotations

import ast

from tests.support.paths import ROOT


def test_no_text_counts_an_answer_without_its_first_token() -> None:
    """`n_out` leaves the first token out, which a person who reads "15 tokens" cannot know."""
    printed = [
        f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(part.value)}"
        for file in sorted((ROOT / "remoe_cli").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.JoinedStr) and " tokens" in ast.unparse(node)
        for part in node.values
        if isinstance(part, ast.FormattedValue) and (text := ast.unparse(part.value)).endswith(("n_out", "n_out[at]", "n_out)"))
        if not text.startswith("request_tokens(")
    ]
    assert printed == []
