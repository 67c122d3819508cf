"""What draft tokens make of decode: how many passes a token takes, and how many rows a pass has.

The profile knows this of the answers that it recorded, for drafts of each length (profile/acceptance.py). The plan assumes that the answers
which it is for repeat as much.

Source: method.md, section 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from remoe_cli.model.draft import Speculate
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.profile.acceptance import MEASURED
from remoe_cli.profile.record import Profile


@dataclass(frozen=True)
class Drafting:
    """Decode passes of answers with drafts of one length.

    passes   passes for each token after the first: 1 without drafts
    rows     share of the passes that have 1, 2, .. rows; they sum to 1
    """

    passes: float = 1.0
    rows: tuple[float, ...] = (1.0,)

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


def drafting_of(profile: Profile, recorded: Ints | None = None, weights: Floats | None = None) -> Mapping[Speculate, Drafting]:
    """Read what drafts of each length would make of the recorded answers.

    It is empty where the profile does not know. `recorded` are some prompts, each of which counts by its weight, however long its answer
    is; by default all tokens count alike.
    """
    if "draft_passes" not in profile.arrays:
        return {}
    passes, tokens = profile.arrays["draft_passes"].astype(np.float64), profile.arrays["decode_tokens"].astype(np.float64)
    if recorded is not None and weights is not None:
        passes, tokens = passes[recorded], tokens[recorded]
        each = np.divide(weights, tokens, out=np.zeros(len(tokens)), where=tokens > 0)
        passes, tokens = passes * each[:, None, None], tokens * each
    whole, total = passes.sum(axis=0), float(tokens.sum())
    return {speculate: _drafting(by_rows, total) for speculate, by_rows in zip(MEASURED, whole, strict=True)} if total else {}


def _drafting(by_rows: Floats, tokens: float) -> Drafting:
    shares = by_rows / by_rows.sum()
    return Drafting(float(by_rows.sum()) / tokens, tuple(shares[: int(np.flatnonzero(shares)[-1]) + 1].tolist()))
