"""A part of the mutants of `make mutants`, which tries a million: every parser takes its inputs, and takes or refuses what is like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.parser import Parser
from tests.mutants.parsers import all_parsers
from tests.mutants.run import shares, try_all, verdict, watched

MUTANTS = 30_000  # of all parsers: half a minute of one core
SEED = 20261129
PARTS = 4


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return all_parsers(tmp_path_factory.mktemp("mutants"))


def test_every_parser_takes_its_own_inputs(parsers: dict[str, Parser]) -> None:
    assert len(parsers) > 40
    for name, parser in parsers.items():
        refused = [said for data in parser.valid if (said := verdict(parser, data)) != "taken"]
        assert len(refused) < len(parser.valid) and not any(refused), (name, refused)


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("ignore")
def test_mutants_are_taken_or_refused_in_one_sentence(part: int, parsers: dict[str, Parser]) -> None:
    with watched():
        for name, count in list(shares(parsers, MUTANTS).items())[part::PARTS]:
            tally = try_all(name, parsers[name], SEED, range(count))
            assert not tally.findings and tally.tried == count


def test_a_parser_that_fails_is_found(tmp_path: Path) -> None:
    def parse(data: bytes) -> int:
        return int(data)

    assert "raises ValueError" in verdict(Parser(parse, (b"1",), ()), b"x")
