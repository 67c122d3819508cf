"""A display of progress that keeps what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from remoe_cli.progress import Report


@dataclass
class Display:
    """Keeps the titles of the stages and all that is reported of prompts; passes on the whole numbers, which are of written batches."""

    on_written: Callable[[int, int], None]
    titles: list[str] = field(default_factory=list)
    reported: list[float] = field(default_factory=list)

    @contextmanager
    def __call__(self, title: str, *, of_bytes: bool = False) -> Iterator[Report]:
        self.titles.append(title)
        yield self._report

    def _report(self, done: float, total: float | None, what: str = "") -> None:
        self.reported.append(done)
        if isinstance(done, int) and isinstance(total, int):
            self.on_written(done, total)
