"""How many forward passes an answer would take with draft tokens, found in its recorded tokens.

An answer has the same greedy tokens with drafts as without. So the passes that it would have taken with drafts follow from its tokens:
they are looked up and checked here as the main function does it (model/draft.py, runtime/batch.py), and no model runs. Only numbers are
kept: for each length of drafts, how many passes would have had so many rows.

Shapes: D lengths of drafts (`MEASURED`), W rows of a pass, from 1 to `MOST_ROWS`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from remoe_cli.model.draft import AUTO_TOKENS, Drafts, Speculate, before_end, lookup

Passes = npt.NDArray[np.int32]
MEASURED: tuple[Speculate, ...] = ("auto", *range(1, AUTO_TOKENS + 1))  # what `draft_passes` is measured for
MOST_ROWS = 1 + AUTO_TOKENS


def answer_passes(prompt: Sequence[int], answer: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> Passes:
    """Count the decode passes of one answer by their rows, for each length of drafts.

    The first token of the answer is that of the prompt's pass. An answer of one token has no decode passes.

    Shapes: [D, W].
    """
    tokens, known = [*prompt, *answer], dict[int, list[int]]()
    passes = np.zeros((len(MEASURED), MOST_ROWS), dtype=np.int32)
    for row, speculate in enumerate(MEASURED):
        drafts, done = Drafts(speculate), 1
        while done < len(answer):
            if done not in known:  # a shorter draft is the beginning of this one
                known[done] = lookup(tokens[: len(prompt) + done], AUTO_TOKENS)
            draft = before_end(known[done][: max(0, drafts.most(max_new_tokens - done - 1))], ends)
            accepted = _alike(draft, answer[done:])
            passes[row, len(draft)] += 1
            drafts.learn(len(draft), accepted)
            done = min(len(answer), done + accepted + 1)
    return passes


def _alike(draft: Sequence[int], answer: Sequence[int]) -> int:
    """Count the first tokens of a draft that are those of the answer."""
    return next((place for place, (a, b) in enumerate(zip(draft, answer, strict=False)) if a != b), min(len(draft), len(answer)))
