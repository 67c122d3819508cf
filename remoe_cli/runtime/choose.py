"""Choose each token of an answer from its logits, as the request's parameters say.

transformers' own processors do what they can do. Its sampling draws from torch's global generator, which cannot be seeded for one answer
of several; so `Choose` draws from a generator of the answer, and leaves one token that transformers' greedy decoding then takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from remoe_cli.errors import UsageError
from remoe_cli.runtime.sampling import Sampling


@dataclass
class Noted(LogitsProcessor):  # type: ignore[misc]
    """Notes the log-probabilities of the model itself, before the request's parameters change the logits.

    steps   for each token of the answer, log-probabilities of the whole vocabulary
    """

    top: int
    steps: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(torch.log_softmax(scores[0].float(), dim=-1))
        return scores

    def of_token(self, step: int, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Return a token's log-probability, and the likeliest tokens of its step with theirs.

        Each step is asked once.
        """
        logprobs, self.steps[step] = self.steps[step], torch.empty(0)
        values, ids = logprobs.topk(min(self.top, len(logprobs)))
        return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """Lowers logits of tokens that the answer has: the two penalties of OpenAI's API.

    transformers has none of them.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency, self._prompt = presence, frequency, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores)
        answer = input_ids[:, self._prompt :]
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: dict[int, float], like: torch.device) -> None:
        self._ids = torch.tensor(list(bias), device=like, dtype=torch.long)
        self._values = torch.tensor(list(bias.values()), device=like)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self._ids, self._values.expand(scores.shape[0], -1).to(scores.dtype))


class Choose(LogitsProcessor):  # type: ignore[misc]
    """Draws a token from the distribution, and leaves only that one.

    The generator is on the CPU, so a GPU draws the same.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float(), dim=-1)
        chosen = torch.multinomial(probabilities.cpu(), 1, generator=self._generator).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def processors(
    sampling: Sampling,
    prompt_tokens: int,
    vocabulary: int,
    device: torch.device,
    follow: Callable[[str, int], LogitsProcessor] | None = None,
) -> tuple[LogitsProcessorList, Noted | None]:
    """Make the processors of one answer, in vLLM's order.

    The second value notes log-probabilities, where they are asked for. `follow` makes the processor of a grammar (follow.Grammars).

    Raises: UsageError for a bias of a token that the model does not have, and what `follow` raises.
    """
    if wrong := next((token for token in sampling.logit_bias if not 0 <= token < vocabulary), None):
        raise UsageError(f"'logit_bias' has the token id {wrong}, which is not in the vocabulary.", f"Token ids are 0 to {vocabulary - 1}.")
    noted = None if sampling.logprobs is None else Noted(sampling.logprobs)
    made = LogitsProcessorList([noted] if noted else [])
    if sampling.grammar is not None and follow is not None:
        made.append(follow(sampling.grammar, prompt_tokens))
    if sampling.logit_bias:
        made.append(Bias(sampling.logit_bias, device))
    if sampling.repetition_penalty not in (None, 1.0):
        made.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        made.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, prompt_tokens))
    if sampling.greedy:
        return made, noted
    if sampling.temperature != 1:
        made.append(TemperatureLogitsWarper(float(sampling.temperature)))
    # vLLM's order: min_p before top_k and top_p
    if sampling.min_p:
        made.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    made.append(Choose(sampling.seed))
    return made, noted
