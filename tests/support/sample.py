"""Which tests `make test` runs: all but those of each night, and of the cases of a sweep one in four."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol
from zlib import crc32

ONE_IN = 4


class Test(Protocol):
    """What pytest collects, as far as this looks at it."""

    nodeid: str

    def get_closest_marker(self, name: str) -> object | None: ...


def sampled(tests: Iterable[Test]) -> Iterator[Test]:
    """Yield the tests to run.

    Sweeps over the same cases begin with different ones, so that together they try more of them. It is always the same sample.
    """
    seen = Counter[str]()
    for test in tests:
        function = test.nodeid.partition("[")[0]
        if test.get_closest_marker("nightly"):
            continue
        if test.get_closest_marker("sweep"):
            seen[function] += 1
            if (seen[function] + crc32(function.encode())) % ONE_IN:
                continue
        yield test
