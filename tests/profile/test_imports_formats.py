"""The table of routing formats is complete: every format has samples that its row reads, and a row in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.profile.imports.formats import FORMATS, Format, format_of
from remoe_cli.profile.imports.importer import import_routing
from tests.support import routing_files as made
from tests.support.routing_files import SPEC

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By format the samples of `every_format` that it recognises."""
    files = made.every_format(tmp_path_factory.mktemp("files"), made.make_ids())
    by_format: dict[str, list[Path]] = {}
    for file in files.values():
        by_format.setdefault(format_of(file).name, []).append(file)
    return by_format


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_a_format_has_samples_of_each_of_its_suffixes(known: Format, samples: dict[str, list[Path]]) -> None:
    assert {file.suffix for file in samples.get(known.name, [])} == set(known.suffixes), f"add samples of {known.name} to every_format"
    assert all(import_routing(file, SPEC).rows for file in samples[known.name])


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_a_format_has_a_row_in_the_documentation(known: Format) -> None:
    rows = [line.split("|")[1] for file in DOCS.rglob("*.md") for line in file.read_text().splitlines() if line.startswith("| `.")]
    assert any(all(f"`{suffix}`" in row for suffix in known.suffixes) for row in rows), f"document {known.name}: {known.holds}"


def test_names_and_suffixes_are_given_once() -> None:
    suffixes = [suffix for known in FORMATS for suffix in known.suffixes]
    assert len({known.name for known in FORMATS}) == len(FORMATS) and len(set(suffixes)) == len(suffixes)


def test_an_unknown_file_names_every_format(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("expert;layer\n")
    with pytest.raises(UsageError, match="its format is not known") as raised:
        import_routing(tmp_path / "x.csv", SPEC)
    assert all(text in raised.value.hint for known in FORMATS for text in (known.name, known.holds, *known.suffixes))
