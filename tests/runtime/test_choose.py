"""How tokens are chosen from logits: the arithmetic of OpenAI's penalties, and draws that a seed repeats."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from remoe_cli.errors import UsageError
from remoe_cli.runtime.choose import Noted, processors
from remoe_cli.runtime.sampling import GREEDY, Sampling

PROMPT = [0, 1, 1]
LOGITS = [1.0, 2.0, 3.0, -1.0]


def scores(sampling: Sampling, answer: list[int]) -> list[float]:
    made, _ = processors(sampling, len(PROMPT), len(LOGITS), torch.device("cpu"))
    changed: torch.Tensor = made(torch.tensor([[*PROMPT, *answer]]), torch.tensor([LOGITS]))
    return [round(float(each), 4) for each in changed[0]]


def test_greedy_changes_nothing() -> None:
    assert scores(GREEDY, [2, 2]) == LOGITS
    assert len(processors(Sampling(top_p=0.5, top_k=1, min_p=0.5, seed=1), 3, 4, torch.device("cpu"))[0]) == 0


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        # Of the answer only: the prompt's tokens 0 and 1 keep their logits.
        ({"presence_penalty": 0.5}, [1.0, 2.0, 2.5, -1.5]),
        ({"frequency_penalty": 0.5}, [1.0, 2.0, 2.0, -1.5]),
        ({"frequency_penalty": -0.5, "presence_penalty": 1.0}, [1.0, 2.0, 3.0, -1.5]),
        # Of prompt and answer; a negative logit grows more negative.
        ({"repetition_penalty": 2.0}, [0.5, 1.0, 1.5, -2.0]),
        ({"logit_bias": {0: 10.0, 3: -1.0}}, [11.0, 2.0, 3.0, -2.0]),
        ({"logit_bias": {3: 2.0}, "repetition_penalty": 2.0}, [0.5, 1.0, 1.5, 0.5]),
    ],
)
def test_penalties_and_biases(parameters: dict[str, Any], expected: list[float]) -> None:
    assert scores(Sampling(**parameters), [2, 2, 3]) == expected


def test_one_token_is_left_and_drawn_as_often_as_it_is_likely() -> None:
    made, _ = processors(Sampling(temperature=2.0, seed=5), 3, 4, torch.device("cpu"))
    drawn = Counter(int(made(torch.tensor([PROMPT]), torch.tensor([LOGITS])).argmax()) for _ in range(4000))
    likely = torch.softmax(torch.tensor(LOGITS) / 2.0, dim=-1)
    assert [drawn[token] / 4000 for token in range(4)] == pytest.approx(likely.tolist(), abs=0.03)
    left = made(torch.tensor([PROMPT]), torch.tensor([LOGITS]))
    assert int(torch.isfinite(left).sum()) == 1


def test_a_seed_repeats_whatever_else_draws_meanwhile() -> None:
    def draw(seed: int | None) -> list[int]:
        made, _ = processors(Sampling(temperature=5.0, seed=seed), 3, 4, torch.device("cpu"))
        tokens = []
        for _ in range(40):
            torch.rand(3)  # from torch's own generator
            tokens.append(int(made(torch.tensor([PROMPT]), torch.tensor([LOGITS])).argmax()))
        return tokens

    assert draw(-3) == draw(-3) != draw(4)
    assert draw(None) != draw(None)
    assert len({Sampling(seed=2**63 - 1).of_choice(index).seed for index in range(4)}) == 4


def test_extreme_temperatures_do_not_overflow() -> None:
    for temperature in (1e-5, 1e-4, 100.0):
        made, _ = processors(Sampling(temperature=temperature, seed=1), 3, 4, torch.device("cpu"))
        assert int(made(torch.tensor([PROMPT]), torch.tensor([[1e4, -1e4, 0.0, 9e3]])).argmax()) in ((0,) if temperature < 1 else range(4))
    assert Sampling(temperature=9e-6).greedy


def test_noted_logprobs_are_those_before_the_parameters() -> None:
    made, noted = processors(Sampling(logprobs=2, logit_bias={0: 50.0}, temperature=3.0, seed=1), 3, 4, torch.device("cpu"))
    assert isinstance(noted, Noted)
    chosen = int(made(torch.tensor([PROMPT]), torch.tensor([LOGITS])).argmax())
    expected = torch.tensor(LOGITS).log_softmax(-1)
    assert chosen == 0
    logprob, top = noted.of_token(0, chosen)
    assert logprob == pytest.approx(float(expected[0])) and [token for token, _ in top] == [2, 1]


def test_a_bias_of_a_token_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="'logit_bias' has the token id 4, which is not in the vocabulary"):
        processors(Sampling(logit_bias={4: 1.0}), 3, 4, torch.device("cpu"))
