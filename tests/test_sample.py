"""What `make test` leaves out, `make test-all` runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tests.support.sample import ONE_IN, sampled


@dataclass(frozen=True)
class One:
    """A test with one marker."""

    nodeid: str
    marker: str = ""

    def get_closest_marker(self, name: str) -> object | None:
        return name == self.marker or None


def test_of_a_sweep_one_case_in_four_and_of_each_night_none() -> None:
    plain = [One(f"f.py::test_a[{case}]") for case in range(8)]
    sweeps = [One(f"f.py::test_{name}[{case}]", "sweep") for name in "bcdefgh" for case in range(2 * ONE_IN)]
    taken = [*sampled([*plain, *sweeps, One("f.py::test_long", "nightly")])]
    assert taken[: len(plain)] == plain
    counted = Counter(test.nodeid.partition("[")[0] for test in taken[len(plain) :])
    assert set(counted.values()) == {2} and len(counted) == 7
    assert len({test.nodeid.partition("[")[2] for test in taken[len(plain) :]}) > 2  # not the same cases of each
