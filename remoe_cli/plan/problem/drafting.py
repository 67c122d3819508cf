"""What draft tokens make of decode: passes for a token, rows of a pass, and work of an assistant.

The profile knows this of the answers that it recorded, for drafts of each length (profile/acceptance.py). The plan assumes that the answers
which it is for repeat as much, and that an assistant guesses as much of them.

Source: method.md, section 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from remoe_cli.model.draft import Speculate
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.document import Plan
from remoe_cli.profile.acceptance import MEASURED
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class Assisted:
    """Drafts of this length that an assistant makes where nothing is found in the text."""

    speculate: Speculate


Depth = Speculate | Assisted  # how many draft tokens a pass may have, and who makes them


def length_of(depth: Depth) -> Speculate:
    """Return how many draft tokens a pass may have, whoever makes them."""
    return depth.speculate if isinstance(depth, Assisted) else depth


def depth_of(plan: Plan) -> Depth:
    """Return the drafts that a plan was made for."""
    return plan.speculate if plan.assistant is None else Assisted(plan.speculate)


@dataclass(frozen=True)
class Drafting:
    """Decode passes of answers with drafts of one length.

    passes      passes for each token after the first: 1 without drafts
    rows        share of the passes that have 1, 2, .. rows; they sum to 1
    drafted     tokens that an assistant drafts for a pass, in the mean; caught_up: tokens that it reads for it beside these
    """

    passes: float = 1.0
    rows: tuple[float, ...] = (1.0,)
    drafted: float = 0.0
    caught_up: float = 0.0

    @property
    def most_rows(self) -> int:
        """Rows of the longest pass."""
        return len(self.rows)

    @property
    def mean_rows(self) -> float:
        """Mean rows of a pass.

        >>> Drafting(0.5, (0.5, 0.0, 0.5)).mean_rows
        2.0
        """
        return sum(rows * share for rows, share in enumerate(self.rows, 1))


NO_DRAFTS = Drafting()


def drafting_of(profile: Profile, recorded: Ints | None = None, weights: Floats | None = None) -> Mapping[Depth, Drafting]:
    """Read what drafts of each length would make of the recorded answers, with an assistant and without.

    It is empty where the profile does not know. `recorded` are some prompts, each of which counts by its weight, however long its answer
    is; by default all tokens count alike.
    """
    if "draft_passes" not in profile.arrays:
        return {}
    arrays = {name: profile.arrays[name].astype(np.float64) for name in _ARRAYS if name in profile.arrays}
    tokens = profile.arrays["decode_tokens"].astype(np.float64)
    if recorded is not None and weights is not None:
        tokens = tokens[recorded]
        each = np.divide(weights, tokens, out=np.zeros(len(tokens)), where=tokens > 0)
        arrays, tokens = {name: array[recorded] * each[:, None, None] for name, array in arrays.items()}, tokens * each
    whole, total = {name: array.sum(axis=0) for name, array in arrays.items()}, float(tokens.sum())
    if not total:
        return {}
    found: dict[Depth, Drafting] = {one: _drafting(by_rows, total) for one, by_rows in zip(MEASURED, whole["draft_passes"], strict=True)}
    if "assisted_passes" in whole:
        for one, by_rows, work in zip(MEASURED, whole["assisted_passes"], whole["assistant_tokens"], strict=True):
            drafted, caught_up = (work / by_rows.sum()).tolist()
            found[Assisted(one)] = _drafting(by_rows, total, drafted, caught_up)
    return found


_ARRAYS = ("draft_passes", "assisted_passes", "assistant_tokens")


def _drafting(by_rows: Floats, tokens: float, drafted: float = 0.0, caught_up: float = 0.0) -> Drafting:
    shares = by_rows / by_rows.sum()
    return Drafting(float(by_rows.sum()) / tokens, tuple(shares[: int(np.flatnonzero(shares)[-1]) + 1].tolist()), drafted, caught_up)
