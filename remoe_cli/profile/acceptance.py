"""How many forward passes an answer would take with draft tokens, found in its recorded tokens.

An answer has the same greedy tokens with drafts as without. So the passes that it would have taken with drafts follow from its tokens:
they are looked up and checked here as the main function does it (model/draft.py, runtime/batch.py), and the model does not run again. An
assistant reads each answer once (`Assistant.guesses`): what it would draft at any place goes on as it guesses there, until a guess is not
the answer's token. Only numbers are kept: for each length of drafts, how many passes would have had so many rows.

Shapes: D lengths of drafts (`MEASURED`), W rows of a pass, from 1 to `MOST_ROWS`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from remoe_cli.model.draft import AUTO_TOKENS, Drafts, Speculate, lookup

Passes = npt.NDArray[np.int32]
MEASURED: tuple[Speculate, ...] = ("auto", *range(1, AUTO_TOKENS + 1))  # what `draft_passes` is measured for
MOST_ROWS = 1 + AUTO_TOKENS


def answer_passes(prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> Passes:
    """Count the decode passes of one answer by their rows, for each length of drafts.

    The first token of the answer is that of the prompt's pass. An answer of one token has no decode passes.

    Shapes: [D, W].
    """
    return _passes(prompt, answer, max_new_tokens, ends, None)[0]


def assisted_passes(
    prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int, ends: Collection[int], guesses: Sequence[int], positions: int | None
) -> tuple[Passes, Passes]:
    """Count the same where an assistant drafts if nothing is found, and the work of the assistant.

    `guesses` are its tokens after the prompt, after one token of the answer, and so on, as far as it can read; it has so many `positions`.
    The work are tokens that it drafts, and tokens that it reads beside one in each pass: those that others have made since its last draft.
    A draft is taken to go on to its full length after a wrong guess, which seldom ends sooner.

    Shapes: [D, W] and [D, 2].
    """
    return _passes(prompt, answer, max_new_tokens, ends, _Replay(len(prompt), answer, guesses, positions))


def _passes(
    prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int, ends: Collection[int], replay: _Replay | None
) -> tuple[Passes, Passes]:
    tokens, known = [*prompt, *answer], dict[int, list[int]]()

    def find(seen: Sequence[int], most: int) -> list[int]:
        if len(seen) not in known:  # a shorter draft is the beginning of this one
            known[len(seen)] = lookup(seen, AUTO_TOKENS)
        return known[len(seen)][:most]

    passes, work = np.zeros((len(MEASURED), MOST_ROWS), dtype=np.int32), np.zeros((len(MEASURED), 2), dtype=np.int32)
    for row, speculate in enumerate(MEASURED):
        assistant = replay and _Replay(replay.prompt_tokens, replay.answer, replay.guesses, replay.positions)
        drafts, done = Drafts(speculate, assistant), 1
        while done < len(answer):
            draft = drafts.next(tokens[: len(prompt) + done], max_new_tokens - done - 1, ends, find)
            accepted = _alike(draft, answer[done:])
            passes[row, len(draft)] += 1
            drafts.learn(len(draft), accepted)
            done = min(len(answer), done + accepted + 1)
        work[row] = assistant.work if assistant else 0
    return passes, work


@dataclass
class _Replay:
    """What an assistant would draft for an answer that is known, and its work.

    held   tokens of prompt and answer that are in its cache
    work   tokens drafted, and tokens read beside one in each pass
    """

    prompt_tokens: int
    answer: Sequence[int]
    guesses: Sequence[int]
    positions: int | None
    held: int = 0
    work: list[int] = field(default_factory=lambda: [0, 0])

    def read(self, tokens: Sequence[int]) -> None:
        """Do nothing: reading the prompt is no work of a decode pass."""

    def __call__(self, tokens: Sequence[int], most: int) -> list[int]:
        done = len(tokens) - self.prompt_tokens
        most = most if self.positions is None else min(most, self.positions - len(tokens))
        if most < 1 or done >= len(self.guesses):
            return []
        right = _alike(self.guesses[done:], self.answer[done:])
        draft = [*self.guesses[done : done + right + 1]][:most]
        draft += draft[-1:] * (most - len(draft))
        self.work[0] += most
        self.work[1] += len(tokens) - max(self.held, self.prompt_tokens) - 1
        self.held = len(tokens) + min(right, most - 1)
        return draft


def _alike(draft: Sequence[int], answer: Sequence[int]) -> int:
    """Count the first tokens of a draft that are those of the answer."""
    return next((place for place, (a, b) in enumerate(zip(draft, answer, strict=False)) if a != b), min(len(draft), len(answer)))
