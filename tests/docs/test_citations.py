"""Every citation of a section in code, data and documentation leads to a section that exists in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

METHOD = (ROOT / "docs/reference/method.md").read_text(encoding="utf-8")
PLANNING = (ROOT / "docs/explanation/planning.md").read_text(encoding="utf-8")
SECTIONS = {int(number) for number in re.findall(r"(?m)^## (\d+)\. ", METHOD)}
TITLES = set(re.findall(r"(?m)^## (.+)$", PLANNING))

PLANNING_CITATION = re.compile(r"planning\.md, section ['\"]([^'\"]+)['\"]")
NUMBERS = r"[Ss]ections? (\d+(?:(?:, | and | to )\d+)*)"
OLD_FORMS = re.compile(
    r"method,? sections?|planning,? (?:study|section)|serverless study|sections? [\d and,to]+ of (?:the|our) ", re.IGNORECASE
)
# Plans name this catalog by its digest, so its text stays as it is: "remoe's planning study" is the section of that title.
STUDY = "planning study"
NAME_THE_STUDY = ("remoe_cli/plan/catalog/data/paper.toml", "docs/explanation/planning.md")


def texts() -> list[Path]:
    """Files that may cite: code, data, tests and documentation, without this folder, which holds the forms themselves."""
    patterns = (
        "remoe_cli/**/*.py",
        "remoe_cli/**/*.toml",
        "tests/**/*.py",
        "docs/**/*.md",
        "docs/**/*.py",
        "*.md",
        "plans/*.md",
        "plans/*.sh",
    )
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if Path(__file__).parent not in path.parents)


def read(path: Path) -> str:
    """The file's text in one line, as a citation may go on in the next line, and in a comment's next line."""
    return re.sub(r"\s*\n\s*(?:# ?)?", " ", path.read_text(encoding="utf-8"))


def numbers(text: str) -> set[int]:
    """The numbers in a text such as "3, 4 and 6 to 9"."""
    ranges = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?: to (\d+))?", text)]
    return {number for first, last in ranges for number in range(first, last + 1)}


def wrong_citations(text: str, is_method: bool = False) -> list[str]:
    """What in `text` cites a section, an equation or a theorem that is not there, or cites in a form that no reader can follow."""
    wrong = [f"old form: {match[0]}" for match in OLD_FORMS.finditer(PLANNING_CITATION.sub("", text))]
    wrong += [f"no such section of method.md: {match[0]}" for match in re.finditer(NUMBERS, text) if not numbers(match[1]) <= SECTIONS]
    if re.search(NUMBERS, text) and "method.md" not in text and not is_method:
        wrong.append("cites numbered sections, and never says of method.md")
    wrong += [f"no such section of planning.md: {title}" for title in PLANNING_CITATION.findall(text) if title not in TITLES]
    wrong += [
        f"not in method.md: {match[0]}"
        for match in re.finditer(r"\b(?:equation|Theorem) \d+", text)
        if not re.search(rf"{match[0]}\b", METHOD)
    ]
    return wrong


def test_citations_lead_somewhere() -> None:
    assert any(STUDY in title.lower() for title in TITLES)
    wrong = {}
    for path in texts():
        name = str(path.relative_to(ROOT))
        text = read(path).replace(STUDY, "") if name in NAME_THE_STUDY else read(path)
        if found := wrong_citations(text, path.name == "method.md"):
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {'; '.join(found)}" for name, found in wrong.items())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("SPS (method.md, section 5)", 0),
        ("docs/reference/method.md, sections 6 to 9", 0),
        ("planning.md, section 'Columns'", 0),
        ("planning.md, section 'The planning study'", 0),
        ("equation 5 and Theorem 2", 0),
        ("method.md, section 13", 1),
        ("method.md, sections 3, 4 and 13", 1),
        ("LPT (section 9)", 1),
        ("method section 9", 2),
        ("planning study, section 1", 2),
        ("planning.md, section 'Nowhere'", 1),
        ("Theorem 3", 1),
        ("method.md, Section 14", 1),
        ("equation 55", 1),
        ('planning.md, section "Nowhere"', 1),
        ("method.md: section 3 of the method", 1),
    ],
)
def test_a_wrong_citation_is_found(text: str, count: int) -> None:
    assert len(wrong_citations(text)) == count


def test_the_method_has_its_twelve_sections() -> None:
    assert set(range(1, 13)) == SECTIONS
