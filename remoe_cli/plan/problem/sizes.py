"""The lengths of single requests, and which of them are the longest.

What a request takes of any hard limit grows with its prompt and with its answer. So a limit that holds for every request on the Pareto
front of both lengths holds for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints


class Size(NamedTuple):
    """The length of one request: prompt tokens, and tokens generated after the first."""

    n_in: int
    n_out: int

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return self.n_in + self.n_out


@dataclass(frozen=True, eq=False)
class Sizes:
    """The different lengths of some requests.

    n_in, n_out   int64 [P]: prompt tokens, and tokens generated after the first
    share         float64 [P]: share of the requests, above 0
    longest       the Pareto front, where the lengths are means of bins; else it is found among them
    """

    n_in: Ints
    n_out: Ints
    share: Floats
    longest: tuple[Size, ...] = ()

    @cached_property
    def front(self) -> tuple[Size, ...]:
        """The Pareto front, by rising prompts: no other request is at least as long in both."""
        if self.longest:
            return self.longest
        order = np.lexsort((-self.n_out, -self.n_in))
        answers = self.n_out[order]
        longer = answers > np.maximum.accumulate(np.concatenate(([-1], answers[:-1])))
        return tuple(Size(int(self.n_in[at]), int(self.n_out[at])) for at in order[longer][::-1])

    def rows(self) -> Iterator[tuple[float, int, int]]:
        """Iterate over (share, n_in, n_out)."""
        return zip(self.share.tolist(), self.n_in.tolist(), self.n_out.tolist(), strict=True)

    def prompt_at(self, share: float) -> int:
        """Find the prompt length that a share of the requests does not exceed."""
        order = np.argsort(self.n_in, kind="stable")
        reached = np.cumsum(self.share[order])
        return int(self.n_in[order[min(len(order) - 1, int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))))]])

    @property
    def ends(self) -> tuple[Size, ...]:
        """The requests with the longest answer, the most tokens and the longest prompt, each once."""
        return tuple(dict.fromkeys((self.front[0], max(self.front, key=lambda size: size.tokens), self.front[-1])))


def sizes_of(lengths: tuple[tuple[float, int, int], ...]) -> Sizes:
    """Make sizes of (share, n_in, n_out).

    >>> sizes_of(((0.25, 10, 9), (0.25, 30, 1), (0.25, 20, 5), (0.25, 20, 4))).front
    (Size(n_in=10, n_out=9), Size(n_in=20, n_out=5), Size(n_in=30, n_out=1))
    """
    share, n_in, n_out = zip(*lengths, strict=True)
    return Sizes(np.array(n_in, dtype=np.int64), np.array(n_out, dtype=np.int64), np.array(share, dtype=np.float64))
