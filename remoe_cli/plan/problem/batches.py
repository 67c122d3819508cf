"""Decode steps of several requests at once: which experts their tokens use together.

Requests that are served together are strangers to each other, so the tokens of one step are drawn from the recorded tokens independently.
All combinations of tokens are far too many. So M steps are drawn, in a way that a second program can repeat: for each place in a step,
every M-th part of the recorded tokens, in the order of their sets of experts, gives one token, each place another one. The parts are dealt
out to the steps by a permutation of numpy's RandomState, whose numbers never change, with the place as its seed. So each expert has as many
rows in the mean as the profile says, to an M-th of the tokens.

Source: method.md, section 11.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.problem.hits import Pattern

DRAWN = 1024  # tokens in all steps together
LEAST_STEPS = 64
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
