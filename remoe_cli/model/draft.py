"""Draft tokens: how an answer may go on, found in the text so far or drafted by an assistant.

Code that is changed, a text that is summed up or written in other words: their answers repeat parts of the prompt. So what came after the
same last tokens before is a draft of the next ones. One forward pass takes all of a draft, and the answer accepts those tokens that it
would have had anyway (runtime/batch.py): a wrong draft costs rows of experts, and never changes a token. Where nothing is found, an
assistant drafts, if there is one (assistant.py). Imports no torch.

Source: A. Saxena, "Prompt Lookup Decoding", 2023; transformers' PromptLookupCandidateGenerator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

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
    """How many passes had a draft, the tokens of all drafts, and those of them that the answer accepted.

    assistant_...   the same of those that the assistant drafted
    """

    passes: int = 0
    tokens: int = 0
    accepted: int = 0
    assistant_passes: int = 0
    assistant_tokens: int = 0
    assistant_accepted: int = 0


NO_DRAFTS = Drafted()


class AnswerAssistant(Protocol):
    """What an assistant drafts for one answer (assistant.py)."""

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens of a prompt before anything is drafted."""

    def __call__(self, tokens: Sequence[int], most: int) -> list[int]:
        """Draft up to `most` tokens that come after some tokens."""


@dataclass
class Drafts:
    """The drafts of one answer: how many tokens each may have, and what became of them.

    assistant      drafts where nothing is found; None: nobody does
    acceptance     of what was found; assisted: of what the assistant drafted
    by_assistant   whether the last draft was the assistant's
    """

    speculate: Speculate = "off"
    assistant: AnswerAssistant | None = None
    acceptance: Acceptance = Acceptance()
    assisted: Acceptance = Acceptance()
    made: Drafted = NO_DRAFTS
    by_assistant: bool = False

    def _most(self, known: Acceptance, room: int) -> int:
        if self.speculate == "off":
            return 0
        return min(known.tokens if self.speculate == "auto" else self.speculate, room)

    def read(self, tokens: Sequence[int]) -> None:
        """Let the assistant, if there is one, read tokens of a prompt."""
        if self.assistant is not None:
            self.assistant.read(tokens)

    def next(
        self, tokens: Sequence[int], room: int, ends: Collection[int], find: Callable[[Sequence[int], int], list[int]] | None = None
    ) -> list[int]:
        """Return a draft of at most `room` tokens, none of which ends an answer.

        `find` looks drafts up, by default as `lookup` does.
        """
        self.by_assistant = False
        most = self._most(self.acceptance, room)
        draft = before_end((find or lookup)(tokens, most), ends) if most > 0 else []
        if draft or self.assistant is None or (most := self._most(self.assisted, room)) <= 0:
            return draft
        draft = before_end(self.assistant(tokens, most), ends)
        self.by_assistant = bool(draft)
        return draft

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of a pass: of so many draft tokens the answer has accepted so many."""
        made = (int(drafted > 0), drafted, accepted)
        self.made = Drafted(*map(sum, zip(self.made, made + (made if self.by_assistant else (0, 0, 0)), strict=True)))
        found, assisted = ((0, 0), (drafted, accepted)) if self.by_assistant else ((drafted, accepted), (0, 0))
        self.acceptance, self.assisted = self.acceptance.after(*found), self.assisted.after(*assisted)
