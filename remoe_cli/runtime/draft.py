"""Draft tokens by prompt lookup: how an answer may go on, read in the prompt and in the answer so far.

Code that is changed, a text that is summed up or written in other words: their answers repeat parts of the prompt. So the tokens that came
after the same last tokens before are a draft of the next ones. One forward pass tries all of a draft, and the answer keeps those tokens
that it would have had anyway (batch.py): a wrong draft costs rows of experts, and never changes a token.

Source: A. Saxena, "Prompt Lookup Decoding", 2023; transformers' PromptLookupCandidateGenerator.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

# How many draft tokens a pass may try: a number, as many as pay, or none.
Speculate = Literal["auto", "off"] | int
MOST_TOKENS = 32
_LONGEST_MATCH, _SHORTEST_MATCH = 8, 2
_AUTO_TOKENS = 10
_WORTH = 0.3  # the least chance that a token of a draft is kept
_FORGET = 0.9  # of what an answer tells about its drafts, kept from pass to pass
_PRIOR_KEPT, _PRIOR_TRIED = 1.2, 2.0  # as if so many of so many tokens had been kept before: the first draft has two


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """Return the tokens that came after the latest of the longest matches of the last tokens.

    A match is of 2 to 8 tokens; without one there is no draft. Tokens that repeat go on repeating.

    >>> lookup([1, 2, 3, 4, 9, 2, 3], most=3)
    [4, 9, 2]
    >>> lookup([5, 6, 5, 6, 5, 6], most=5)
    [5, 6, 5, 6, 5]
    >>> lookup([1, 2, 3, 4], most=3)
    []
    """
    held = np.asarray(tokens)
    ends = np.flatnonzero(held[:-1] == held[-1]) if most > 0 else held[:0]
    length = 1
    while len(ends) and length < _LONGEST_MATCH:
        longer = ends[ends >= length]
        longer = longer[held[longer - length] == held[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if not len(ends) or length < _SHORTEST_MATCH:
        return []
    after = int(ends[-1]) + 1
    period = len(held) - after
    return [int(held[after + place % period]) for place in range(most)]


@dataclass(frozen=True)
class Acceptance:
    """What became of an answer's drafts lately, in tokens; the longer ago, the less it counts.

    kept    were the answer's own
    tried   kept, or the first of a draft that was not: those after it tell nothing
    """

    kept: float = _PRIOR_KEPT
    tried: float = _PRIOR_TRIED

    def after(self, drafted: int, kept: int) -> Acceptance:
        """Return what is known after a pass, with a draft or without one."""
        tried = kept + (kept < drafted)
        return Acceptance(
            _PRIOR_KEPT + _FORGET * (self.kept - _PRIOR_KEPT) + kept, _PRIOR_TRIED + _FORGET * (self.tried - _PRIOR_TRIED) + tried
        )

    @property
    def tokens(self) -> int:
        """How many draft tokens pay: as long as each is kept with a chance of 0.3 at least, and 10 at most.

        >>> Acceptance().tokens, Acceptance().after(2, 0).after(1, 0).after(1, 0).tokens
        (2, 0)
        """
        share = self.kept / self.tried
        return min(_AUTO_TOKENS, math.floor(math.log(_WORTH) / math.log(share))) if share < 1 else _AUTO_TOKENS


class Drafted(NamedTuple):
    """How many passes had a draft, the tokens of all drafts, and those of them that the answer kept."""

    passes: int = 0
    tokens: int = 0
    kept: int = 0


NO_DRAFTS = Drafted()


@dataclass
class Drafts:
    """The drafts of one answer: how many tokens each may have, and what became of them."""

    speculate: Speculate = "off"
    acceptance: Acceptance = Acceptance()
    made: Drafted = NO_DRAFTS

    def next(self, tokens: Sequence[int], room: int, ends: Collection[int]) -> list[int]:
        """Return a draft of at most `room` tokens, none of which ends an answer."""
        most = self.acceptance.tokens if self.speculate == "auto" else 0 if self.speculate == "off" else self.speculate
        draft = lookup(tokens, min(most, room))
        return draft[: next((place for place, token in enumerate(draft) if token in ends), None)]

    def learn(self, drafted: int, kept: int) -> None:
        """Take note of a pass: of so many draft tokens the answer has kept so many."""
        passes, tokens, all_kept = self.made
        self.made = Drafted(passes + (drafted > 0), tokens + drafted, all_kept + kept)
        self.acceptance = self.acceptance.after(drafted, kept)
