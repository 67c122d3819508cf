"""Decode steps of several rows: which experts the tokens of requests or drafts use together.

Requests that are served together are strangers to each other, so the tokens of one step are drawn from the recorded tokens independently.
All combinations of tokens are far too many. So M steps are drawn, in a way that a second program can repeat: for each place in a step,
every M-th part of the recorded tokens, in the order of their sets of experts, gives one token, each place another one. The parts are dealt
out to the steps by a permutation of numpy's RandomState, whose numbers never change, with the place as its seed. So each expert has as many
rows in the mean as the profile says, to an M-th of the tokens.

The tokens of a draft are no strangers: they follow each other in one answer. So where the profile has consecutive tokens, the rows of a
request in a step are consecutive ones, from a place that is drawn likewise; after the last token of a prompt come those of the next one.
Wrong draft tokens are taken to be routed like right ones. Without consecutive tokens all rows are drawn independently.

Source: method.md, sections 11 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.hits import Pattern

DRAWN = 1024  # tokens in all steps together
LEAST_STEPS = 64
DRAFTED_STEPS = 512  # drawn steps whose requests have drafts
WIDTH_SEEDS = 2**16  # the first seed of the permutations that deal out the rows of a request; those of places are smaller
GOLDEN = 0.6180339887498949  # by so much of its part each place takes a later token; no simple fraction, so none lies between two tokens
Rows = npt.NDArray[np.int16]


def drawn_rows(pattern: Pattern, experts: int, tokens: int) -> Rows:
    """Count the rows of each expert of a layer in each drawn step of so many tokens.

    Shapes: int16 [E, M].
    """
    sets, weights = pattern
    steps = max(LEAST_STEPS, DRAWN // tokens)
    reached = np.cumsum(weights)
    rows, every = np.zeros((experts + 1, steps), dtype=np.int16), np.arange(steps)
    for place in range(tokens):
        part = np.random.RandomState(place).permutation(steps)
        drawn = sets[np.searchsorted(reached, (part + GOLDEN * (place + 1) % 1) / steps * reached[-1], side="right")]
        for slot in drawn.T:
            rows[slot, every] += 1  # a skipped slot (-1) counts in the last row, which is left out
    return rows[:-1]


@dataclass(frozen=True)
class Consecutive:
    """The recorded tokens of all layers in their order.

    trace        int64 [T, L, k]
    weights      [T], or None where all count alike
    even_share   share of the tokens that k neighbouring experts compute instead, from every expert alike
    """

    trace: Ints
    weights: Floats | None = None
    even_share: float = 0.0


def drafted_rows(
    pattern: Pattern, consecutive: Consecutive | None, layer: int, experts: int, requests: int, widths: tuple[float, ...]
) -> Rows:
    """Count the rows of each expert of a layer in each drawn step of so many requests with drafts.

    `widths` are the shares of passes in which a request has 1, 2, .. rows.

    Shapes: int16 [E, M].
    """
    rows, every = np.zeros((experts + 1, DRAFTED_STEPS), dtype=np.int16), np.arange(DRAFTED_STEPS)
    reached = np.cumsum(widths)
    for request in range(requests):
        dealt = np.random.RandomState(WIDTH_SEEDS + request).permutation(DRAFTED_STEPS)
        width = 1 + np.minimum(np.searchsorted(reached, (dealt + GOLDEN) / DRAFTED_STEPS * reached[-1], side="right"), len(widths) - 1)
        for row in range(int(width.max())):
            here = every[width > row]
            if consecutive is None:
                drawn = pattern[0][_of_weight(_drawn_at(request * len(widths) + row), np.cumsum(pattern[1]))[here]]
            else:
                drawn = _following(consecutive, layer, experts, _drawn_at(request)[here], row)
            for slot in drawn.T:
                rows[slot, here] += 1
    return rows[:-1]


def _drawn_at(place: int) -> Floats:
    """Draw a point within each of the equal parts of 0 to 1, one for each step."""
    at: Floats = (np.random.RandomState(place).permutation(DRAFTED_STEPS) + GOLDEN * (place + 1) % 1) / DRAFTED_STEPS
    return at


def _of_weight(at: Floats, reached: Floats) -> Ints:
    """Find which of some things with these cumulated weights a point from 0 to 1 falls on."""
    found: Ints = np.searchsorted(reached, at * reached[-1], side="right")
    return found


def _following(tokens: Consecutive, layer: int, experts: int, at: Floats, row: int) -> Ints:
    """List the experts of the token that comes so many rows after each drawn one.

    Shapes: `at` [N]; [N, k].
    """
    trace, even = tokens.trace[:, layer], tokens.even_share
    recorded = at < 1 - even
    weights = np.ones(len(trace)) if tokens.weights is None else tokens.weights
    first = _of_weight(at[recorded] / (1 - even), np.cumsum(weights)) if recorded.any() else np.zeros(0, dtype=np.int64)
    found = np.empty((len(at), trace.shape[1]), dtype=np.int64)
    found[recorded] = trace[(first + row) % len(trace)]
    if not recorded.all():
        start = np.floor(((at[~recorded] - (1 - even)) / even + GOLDEN * row) % 1 * experts).astype(np.int64)
        found[~recorded] = (start[:, None] + np.arange(trace.shape[1])) % experts
    return found
