"""How the tokens of an answer are chosen: the parameters of a request. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

TOP_LOGPROBS = 20  # as OpenAI's chat API has it
STOPS = 16
GRAMMAR_CHARACTERS = 262_144
CHOICES = 16
_LEAST_TEMPERATURE = 1e-5  # as in vLLM; logits divided by less would overflow


class Sampling(BaseModel):
    """Parameters by the names of vLLM. The default is greedy decoding.

    temperature          below 1e-5 chooses the likeliest token; the parameters down to `seed` then change nothing
    top_k                0 keeps all tokens
    seed                 the same seed, prompt and parameters give the same answer on the same machine; None draws one
    presence_penalty     subtracted once from the logit of each token that the answer has
    frequency_penalty    subtracted for each time that the answer has it
    repetition_penalty   divides positive logits of tokens of prompt and answer, and multiplies negative ones; None keeps the model's own
    logit_bias           added to logits, by token id
    logprobs             how many of the likeliest tokens are listed with each token; None lists nothing
    stop                 texts that end the answer, besides the model's own
    grammar              that the answer follows (runtime/grammar.py); None lets it be any text
    skip_special_tokens  whether special tokens are left out of the text
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)  # logits divided by less would overflow
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=STOPS)
    grammar: str | None = Field(default=None, max_length=GRAMMAR_CHARACTERS)
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature < _LEAST_TEMPERATURE

    def of_choice(self, index: int) -> Sampling:
        """Return the parameters of one of several answers to a request: each has a seed of its own."""
        return self if self.seed is None or not index else self.model_copy(update={"seed": (self.seed + index + 2**63) % 2**64 - 2**63})


GREEDY = Sampling()
