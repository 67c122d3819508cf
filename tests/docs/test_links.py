"""Relative links of the documentation lead to files, and their anchors to headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def pages() -> list[Path]:
    return sorted(path for pattern in ("*.md", "docs/**/*.md", "plans/*.md", ".github/**/*.md") for path in ROOT.glob(pattern))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading: "certified, and how" is #certified-and-how."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, wanted in LINK.findall(text):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {name}"
        assert target.is_relative_to(ROOT), f"{page.name} links to {name}, which is not in the repository"
        if wanted:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            assert wanted in {anchor(heading) for heading in headings}, f"{page.name} links to #{wanted} of {target.name}"


def test_every_page_of_docs_is_linked_from_another() -> None:
    linked = {(page.parent / name).resolve() for page in pages() for name, _ in LINK.findall(page.read_text(encoding="utf-8")) if name}
    folders = {target for target in linked if target.is_dir()}
    assert [page for page in (ROOT / "docs").rglob("*.md") if page not in linked and page.parent not in folders] == []
