"""The passes that recorded answers would have taken with drafts: those that the main function then takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from remoe_cli.model.draft import MOST_TOKENS, Speculate
from remoe_cli.profile.acceptance import MEASURED, MOST_ROWS, answer_passes
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.sampling import Sampling
from tests.runtime.test_draft import PROMPTS, engine_of

# Tokens of a cycle, now and then of another one, so that some drafts are right, some for a while, and some not at all.
CYCLES = {3: 40.0, 4: 39.0, 5: 41.0, 6: 40.5}


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Engine, list[int]]]:
    made, widths = engine_of("mixtral"), list[int]()
    hook = made.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    yield made, widths
    hook.remove()


@pytest.mark.parametrize("speculate", ["auto", 1, 4, 10])
def test_answers_take_the_passes_that_are_counted(speculate: Speculate, engine: tuple[Engine, list[int]]) -> None:
    made, widths = engine
    counted, drafted = np.zeros(MOST_ROWS, dtype=int), 0
    for prompt in PROMPTS:
        del widths[:]
        answer = made.generate(prompt, 40, sampling=Sampling(logit_bias=CYCLES, temperature=0.9, seed=3), speculate=speculate)
        passes = answer_passes(prompt, answer.token_ids, 40, made.ends)[MEASURED.index(speculate)]
        assert np.bincount(np.array(widths[1:]) - 1, minlength=MOST_ROWS).tolist() == passes.tolist()
        counted, drafted = counted + passes, drafted + answer.drafted.tokens
    assert (counted[1:] @ np.arange(1, MOST_ROWS)) == drafted > 0 and np.count_nonzero(counted) > 1


def passes_of(prompt: Sequence[int], answer: Sequence[int], most: int = 99, ends: Sequence[int] = ()) -> dict[Speculate, dict[int, int]]:
    found = answer_passes(prompt, answer, most, ends)
    return {speculate: {rows: int(n) for rows, n in enumerate(row, 1) if n} for speculate, row in zip(MEASURED, found, strict=True)}


def test_passes_by_hand() -> None:
    repeated = passes_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 9])
    assert repeated[1] == {1: 1, 2: 3}  # one token, then pairs after the match of 1 and 2; the last draft is wrong
    assert repeated[4] == {1: 1, 5: 1}
    assert passes_of([1, 2, 3], [7, 8, 9])["auto"] == {1: 2}  # nothing repeats
    assert passes_of([1, 2, 3], [7])[10] == {}  # the only token is that of the prompt's pass


def test_drafts_stay_within_the_answer_s_room_and_before_what_ends_it() -> None:
    prompt, answer = [1, 2, 3, 4, 5, 1], [2, 3, 4]
    assert passes_of(prompt, answer)[4] == {5: 1} and passes_of(prompt, answer, most=3)[4] == {2: 1}
    assert passes_of(prompt, answer, ends=[4])[4] == {2: 1}


def test_all_lengths_that_are_measured_can_be_deployed() -> None:
    assert MEASURED[0] == "auto" and MEASURED[1:] == tuple(range(1, MOST_ROWS)) and MOST_ROWS - 1 <= MOST_TOKENS
