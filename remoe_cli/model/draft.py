"""Draft tokens by prompt lookup: how an answer may go on, read in the prompt and in the answer so far.

Code that is changed, a text that is summed up or written in other words: their answers repeat parts of the prompt. So what came after the
same last tokens before is a draft of the next ones. One forward pass takes all of a draft, and the answer accepts those tokens that it
would have had anyway (runtime/batch.py): a wrong draft costs rows of experts, and never changes a token. Imports no torch.

Source: A. Saxena, "Prompt Lookup Decoding", 2023; transformers' PromptLookupCandidateGenerator.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from remoe_cli.errors import UsageError

MOST_TOKENS = 32
# How many draft tokens a pass may have: as many as pay, none, or a number.
Speculate = Literal["auto", "off"] | Annotated[int, Field(ge=1, le=MOST_TOKENS)]
_WORDS: dict[str, Speculate] = {"auto": "auto", "off": "off"}
_LONGEST_MATCH, _SHORTEST_MATCH = 8, 2
AUTO_TOKENS = 10  # most tokens of a draft whose length is chosen as the answer goes
_WORTH = 0.2  # the least chance with which the last token of a draft is accepted
_FORGET = 0.9  # what an answer tells about its drafts counts so much less after each pass
_PRIOR_ACCEPTED, _PRIOR_TRIED = 0.8, 1.0  # as if so much of a token had been accepted before: the first draft has seven


def is_off(speculate: object) -> bool:
    """Tell whether a setting is left out of a document (`Field(exclude_if=is_off)`)."""
    return speculate == "off"


def speculate_of(text: str, most: int = MOST_TOKENS) -> Speculate:
    """Read the option --speculate; raises UsageError for what is none of its values.

    >>> speculate_of("auto"), speculate_of("8")
    ('auto', 8)
    """
    if text in _WORDS:
        return _WORDS[text]
    if text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= most:
        return int(text)
    raise UsageError(f"--speculate is {text!r:.100}, not 'auto', 'off' or a number of tokens.", f"Numbers are 1 to {most}.")


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """Return the tokens that came after the first of the longest matches of the last tokens.

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
    after = int(ends[0]) + 1
    period = len(held) - after
    return [int(held[after + place % period]) for place in range(most)]


def before_end(draft: list[int], ends: Collection[int]) -> list[int]:
    """Cut a draft before its first token that would end an answer."""
    return draft[: next((place for place, token in enumerate(draft) if token in ends), None)]


@dataclass(frozen=True)
class Acceptance:
    """What became of an answer's drafts lately, in tokens.

    tried   accepted, or the first of a draft that was not: those after it tell nothing
    """

    accepted: float = _PRIOR_ACCEPTED
    tried: float = _PRIOR_TRIED

    def after(self, drafted: int, accepted: int) -> Acceptance:
        """Return what is known after a pass, with a draft or without one."""
        tried = accepted + (accepted < drafted)
        return Acceptance(
            _PRIOR_ACCEPTED + _FORGET * (self.accepted - _PRIOR_ACCEPTED) + accepted,
            _PRIOR_TRIED + _FORGET * (self.tried - _PRIOR_TRIED) + tried,
        )

    @property
    def tokens(self) -> int:
        """As many draft tokens as are all accepted with a chance of 0.2 at least, and 10 at most.

        >>> Acceptance().tokens, Acceptance().after(7, 7).tokens, Acceptance().after(7, 0).after(2, 0).tokens
        (7, 10, 1)
        """
        share = self.accepted / self.tried
        return min(AUTO_TOKENS, math.floor(math.log(_WORTH) / math.log(share))) if share < 1 else AUTO_TOKENS


class Drafted(NamedTuple):
    """How many passes had a draft, the tokens of all drafts, and those of them that the answer accepted."""

    passes: int = 0
    tokens: int = 0
    accepted: int = 0


NO_DRAFTS = Drafted()


@dataclass
class Drafts:
    """The drafts of one answer: how many tokens each may have, and what became of them."""

    speculate: Speculate = "off"
    acceptance: Acceptance = Acceptance()
    made: Drafted = NO_DRAFTS

    def most(self, room: int) -> int:
        """Return how many tokens the next draft may have, where the answer has room for so many."""
        if self.speculate == "off":
            return 0
        return min(self.acceptance.tokens if self.speculate == "auto" else self.speculate, room)

    def next(self, tokens: Sequence[int], room: int, ends: Collection[int]) -> list[int]:
        """Return a draft of at most `room` tokens, none of which ends an answer."""
        return before_end(lookup(tokens, most), ends) if (most := self.most(room)) > 0 else []

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of a pass: of so many draft tokens the answer has accepted so many."""
        passes, tokens, of_all = self.made
        self.made = Drafted(passes + (drafted > 0), tokens + drafted, of_all + accepted)
        self.acceptance = self.acceptance.after(drafted, accepted)
