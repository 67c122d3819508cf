"""Answers that follow a grammar (grammar.py), by llguidance.

A token that the grammar does not allow next gets the logit -inf, before anything else is done to the logits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from remoe_cli.artifacts import escaped
from remoe_cli.errors import UsageError

# llguidance makes a state for each remainder of `multipleOf`, which its own limits do not count: seconds for a hundred thousand.
_MULTIPLE = re.compile(r'"multipleOf": ?([-+0-9.eE]+)')
_MOST_STEPS = 10_000
_PLACE = re.compile(r"^at \d+\(\d+\): |^\d+\(\d+\): ")


class GrammarError(UsageError):
    """A grammar that cannot be followed, for a reason of its own or of the model's."""

    @property
    def kind(self) -> str:
        return "Usage"


@dataclass(frozen=True)
class Grammars:
    """The grammars of one model: its tokenizer, and its tokens that end an answer."""

    tokenizer: Any
    vocabulary: int
    ends: Sequence[int]

    def check(self, grammar: str) -> None:
        """Raise GrammarError for a grammar that is wrong, or has what is not supported."""
        if any(_steps(found[1]) > _MOST_STEPS for found in _MULTIPLE.finditer(grammar)):
            raise GrammarError(f"'multipleOf' is a number of more than {_MOST_STEPS} steps.", "Leave it out, or give a rounder one.")
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if wrong:
            raise GrammarError(_words(messages[0]), "Leave it out, or write the schema without it.")

    def follow(self, grammar: str, prompt_tokens: int) -> Follow:
        """Begin an answer that follows a grammar; raises what `check` raises."""
        self.check(grammar)
        return Follow(LLMatcher(self._tokens, grammar, log_level=0), prompt_tokens)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """Raises: GrammarError for a model whose tokenizer has no bytes of tokens, or that has no token that ends an answer."""
        if not self.ends:
            raise GrammarError("This model has no token that ends an answer, so an answer cannot follow a grammar.", "Leave it out.")
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        try:
            if backend is None:
                raise ValueError("it is not of the tokenizers library")
            return LLTokenizer(backend.to_str(), n_vocab=self.vocabulary, eos_token=list(self.ends))
        except BaseException as error:  # a panic of Rust's, such as for tokens of hundreds of bytes, is no Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            reason = _words(str(error))
            raise GrammarError(f"This model's tokenizer cannot follow a grammar: {reason}", "Leave it out.") from None


class Follow(LogitsProcessor):  # type: ignore[misc]
    """Leaves the tokens with which one answer goes on by its grammar."""

    def __init__(self, matcher: LLMatcher, prompt_tokens: int) -> None:
        self._matcher, self._seen = matcher, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raises: GrammarError for a grammar that has become too complex on the way."""
        taken = input_ids[0, self._seen :].tolist()
        self._seen += len(taken)
        if not self._matcher.consume_tokens(taken) or self._matcher.is_error():
            raise GrammarError(_words(self._matcher.get_error()), "Ask for simpler JSON.")
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[: scores.shape[1]]
        mask = torch.from_numpy(allowed == 0).to(scores.device)
        return scores.masked_fill(mask, -torch.inf)


def _steps(number: str) -> int:
    """Return a number without its decimal point, as far as nine digits.

    >>> [_steps(each) for each in ("0.01", "2500", "1e-300", "12.34", "1e300")]
    [1, 2500, 1, 1234, 1000000000]
    """
    _, digits, exponent = Decimal(number).normalize().as_tuple()
    return int("".join(map(str, digits[:9])) + "0" * min(9, max(0, int(exponent))))


def _words(message: str) -> str:
    """Return what llguidance says without the place in a grammar that the client has not written."""
    first = message.strip().partition("\n")[0]
    return f"{escaped(_PLACE.sub('', first), 400).removesuffix('.')}." if first else "It cannot be followed."
