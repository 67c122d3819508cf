"""Requests that are answered in one batch, by tiny models in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from remoe_cli.model.draft import Speculate
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.runtime.answer import Generated, Stop
from remoe_cli.runtime.device import describe
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.sampling import GREEDY, Sampling
from remoe_cli.runtime.sequence import TokenSequence
from remoe_cli.runtime.served_hits import Hits
from tests.support.families import VOCAB_SIZE, build

DRAW = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(2, VOCAB_SIZE, (n,), generator=DRAW).tolist() for n in (5, 23, 40, 11)]


@cache
def engine_of(family: str) -> Engine:
    """An engine with all experts of a tiny model, whose token i is the word wi."""
    return engine_around(build(family))


def engine_around(model: PreTrainedModel) -> Engine:
    """An engine with all experts of a model."""
    local = {layer.layer: {e: e for e in range(layer.experts)} for layer in expert_layers(model)}
    return engine_with(model, Dispatcher(None, local, {}, ThreadPoolExecutor(1)))


def engine_with(model: PreTrainedModel, dispatcher: Dispatcher) -> Engine:
    """An engine of a model and what computes its experts."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, layers = PreTrainedTokenizerFast(tokenizer_object=words), list(expert_layers(model))
    uncounted = partial(Hits, [layer.layer for layer in layers], max(layer.experts for layer in layers))
    return Engine(model, tokenizer, dispatcher, attach(model, dispatcher), (), describe(model.device), uncounted)


def guesses(answers: Sequence[Generated]) -> Callable[[Sequence[int], int], list[int]]:
    """A lookup (model/draft.py) that gives drafts of every length up to the most, half of them with a wrong token in some place."""
    draw = random.Random(0)

    def guess(tokens: Sequence[int], most: int) -> list[int]:
        right = next(
            whole[len(tokens) :][: draw.randint(0, max(0, most))]
            for each in answers
            if (whole := [*each.prompt_token_ids, *each.token_ids])[: len(tokens)] == list(tokens)
        )
        if right and draw.random() < 0.5:
            place = draw.randrange(len(right))
            right[place] = (right[place] + 1) % VOCAB_SIZE
        return right

    return guess


@dataclass
class Asked:
    """One request: the step before which it joins, and what it asks for."""

    step: int
    prompt: Sequence[int]
    tokens: int = 12
    sampling: Sampling = GREEDY
    speculate: Speculate = "off"
    stopped: Callable[[], Stop | None] = lambda: None


def together(engine: Engine, asked: Sequence[Asked], notes: list[list[int]] | None = None) -> list[TokenSequence]:
    """Answer requests in one batch. `notes` gets the number of tokens that each has after each step."""
    batch, step, made = engine.batch(), 0, dict[int, TokenSequence]()
    while len(made) < len(asked) or len(batch):
        for number, each in enumerate(asked):
            if each.step == step:
                made[number] = engine.sequence(
                    each.prompt, each.tokens, stopped=each.stopped, sampling=each.sampling, speculate=each.speculate
                )
                batch.add(made[number])
        batch.step()
        step += 1
        if notes is not None:
            notes.append([len(made[number].stream.ids) if number in made else 0 for number in range(len(asked))])
    return [made[number] for number in range(len(asked))]
