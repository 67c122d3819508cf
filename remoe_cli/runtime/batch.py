"""Continuous batching: sequences join and leave between any two steps.

A step reads a part of one prompt, and then makes the next token of every sequence whose prompt is read, in one forward pass. So the rows
of all of them in one layer go to an expert function in one invocation. A prompt is read alone: as a whole where nobody else waits, else
in parts of at most 256 tokens, the prompts in turn, so that no stream stops for long and no prompt waits for a much longer one.

A step of several sequences that fails is done again by each alone, from its tokens: so a call that fails ends the answers that need it,
and no others.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from remoe_cli.model.batch_cache import can_continue, join, keep
from remoe_cli.runtime.answer import Stop, deadline_of
from remoe_cli.runtime.device import full_memory_named
from remoe_cli.runtime.dispatch import Array, Dispatcher
from remoe_cli.runtime.sequence import TokenSequence
from remoe_cli.runtime.shares import divide_call

_log = logging.getLogger(__name__)  # without a handler, its warnings go to stderr: the log of a main function
_CHUNK_TOKENS = 256
_PLAN_LONGER = "Plan again for requests as long as those that come (--n-in, --n-out, --requests): the plan then has a GPU that holds them."


@dataclass
class Batch:
    """The sequences that a model is working on.

    reading    whose prompts are not read to their end, next first
    decoding   the others, in the order of their rows in `cache`
    """

    model: PreTrainedModel
    dispatcher: Dispatcher
    reading: deque[TokenSequence] = field(default_factory=deque)
    decoding: list[TokenSequence] = field(default_factory=list)
    cache: Cache | None = None
    _since_s: float = 0.0
    _rows: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reading) + len(self.decoding)

    def add(self, sequence: TokenSequence) -> None:
        if not len(self):
            self._since_s = time.perf_counter()
        self.reading.append(sequence)

    def step(self) -> list[TokenSequence]:
        """Go one step further, and return the sequences that have ended or failed, which leave."""
        left: list[TokenSequence] = []
        with torch.inference_mode():
            if self.reading:
                left += self._read(self.reading.popleft())
            if self.decoding:
                left += self._decode()
        if left and not len(self):  # calls that nobody waited for, or that a failed pass has left, are billed to the last
            self.dispatcher.settle()
            self._bill(left[-1:])
        return left

    def _read(self, sequence: TokenSequence) -> list[TokenSequence]:
        """Read a part of a prompt; after the last one the sequence has a token more."""
        tokens, start = sequence.tokens, sequence.read
        others = len(self) > 0
        try:
            if (start or others) and (reason := sequence.stopped()):
                sequence.end(reason)
                return [sequence]
            if not start:
                sequence.cache = sequence.inputs.cache(self.model)
            part = _CHUNK_TOKENS if others and can_continue(self.model, sequence.cache) else len(tokens)
            with self._pass([sequence], others):
                logits = self._forward([sequence], [tokens[start : start + part]], sequence.cache, None)
            sequence.read = min(len(tokens), start + part)
            sequence.counted = max(sequence.counted, sequence.read)
            if sequence.read < len(tokens):
                self.reading.append(sequence)
                return []
            _choose([sequence], logits)
        except Exception as error:
            sequence.error = error
        if sequence.ended:
            sequence.cache = None
            return [sequence]
        joining, sequence.cache = sequence.cache, None
        if self.cache is None:
            self.cache = joining
        else:
            assert joining is not None
            try:
                with full_memory_named(_PLAN_LONGER):
                    join(self.cache, max(each.read for each in self.decoding), joining, sequence.read)
            except Exception as error:  # there is no memory for one more: it has none, and the others' cache may be half joined
                sequence.error = error
                self._begin_again(self.decoding)
                return [sequence]
        self.decoding.append(sequence)
        return []

    def _begin_again(self, sequences: list[TokenSequence]) -> None:
        """Let sequences be read again, each from its tokens: what was in the batch's cache is not used any more."""
        self.decoding, self.cache = [], None
        for each in sequences:
            each.read = 0
        self.reading.extend(sequences)

    def _decode(self) -> list[TokenSequence]:
        """Make the next token of every sequence whose prompt is read."""
        sequences, longest = self.decoding, max(each.read for each in self.decoding)
        mask = None
        if any(each.read < longest for each in sequences):
            padding = torch.tensor([longest - each.read for each in sequences], device=self.model.device)
            mask = (torch.arange(longest + 1, device=self.model.device) >= padding.unsqueeze(1)).long()
        try:
            with self._pass(sequences, len(self) > 1):
                logits = self._forward(sequences, [each.stream.ids[-1:] for each in sequences], self.cache, mask)
        except Exception as error:
            if len(sequences) == 1:
                self.decoding, self.cache = [], None
                sequences[0].error = error
                return sequences
            _log.warning("A step of %d requests failed with %s; each of them does it again alone.", len(sequences), type(error).__name__)
            self._begin_again(sequences)
            return []
        for each in sequences:
            each.read += 1
            each.counted = max(each.counted, each.read)
        _choose(sequences, logits)
        left = [each for each in sequences if each.ended]
        if left:
            rows = [row for row, each in enumerate(sequences) if not each.ended]
            self.decoding = [sequences[row] for row in rows]
            if self.decoding and self.cache is not None:
                self._keep(rows)
            else:
                self.cache = None
        return left

    def _keep(self, rows: list[int]) -> None:
        """Keep the rows of the cache that are of `decoding`."""
        assert self.cache is not None
        try:
            with full_memory_named(_PLAN_LONGER):
                keep(self.cache, rows, max(each.read for each in self.decoding))
        except Exception as error:
            _log.warning("The cache could not be cut (%s); %d requests are read again.", type(error).__name__, len(self.decoding))
            self._begin_again(self.decoding)

    def _forward(self, sequences: Sequence[TokenSequence], tokens: list[list[int]], cache: Cache | None, mask: Tensor | None) -> Tensor:
        """Run the model on the next tokens of each sequence; a cache that the model has made itself is the sequence's.

        Shapes: returns the logits of the last tokens, [sequences, vocabulary] in float32.
        """
        inputs, device = sequences[0].inputs, self.model.device
        named = dict(inputs.given)
        if inputs.positions:
            starts = torch.tensor([[each.read] for each in sequences], device=device)
            named["position_ids"] = starts + torch.arange(len(tokens[0]), device=device)
        if cache is not None:
            named["past_key_values"] = cache
        ids = torch.tensor(tokens, device=device)
        made = self.model.prepare_inputs_for_generation(
            ids, attention_mask=mask, is_first_iteration=not sequences[0].read, next_sequence_length=len(tokens[0]), **named
        )
        out = self.model(**made, return_dict=True)
        if cache is None:
            sequences[0].cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits

    @contextmanager
    def _pass(self, sequences: Sequence[TokenSequence], crowded: bool) -> Iterator[None]:
        """Bill a forward pass to its sequences, also one that fails."""
        dispatcher = self.dispatcher
        dispatcher.stopped = lambda: _stopped(sequences)
        dispatcher.deadline_s = max(deadline_of(each.stopped) for each in sequences)
        chosen: list[tuple[int, Array]] = []
        dispatcher.seen = partial(self._see, sequences, chosen)
        try:
            with full_memory_named(_PLAN_LONGER):
                yield
            _count(sequences, chosen)
        except Exception:
            dispatcher.settle()
            raise
        finally:
            if crowded:
                for each in (*sequences, *self.reading, *self.decoding):
                    each.crowded = True
            self._bill(sequences)

    def _bill(self, sequences: Sequence[TokenSequence]) -> None:
        """Divide calls by rows, and time equally, as each sequence of a step has one token in it or is alone."""
        now_s = time.perf_counter()
        for each in sequences:
            each.main_s += (now_s - self._since_s) / len(sequences)
        self._since_s = now_s
        for call in self.dispatcher.take():
            rows = self._rows.get(call.function, [0] * len(sequences))
            parts = [call] if len(sequences) == 1 else divide_call(call, rows, [each.owed for each in sequences])
            for each, part, mine in zip(sequences, parts, rows, strict=True):
                if mine or not any(rows):
                    each.invocations.append(call)
                    each.parts.append(part)
        self._rows.clear()

    def _see(self, sequences: Sequence[TokenSequence], chosen: list[tuple[int, Array]], layer: int, ids: Array) -> None:
        """Keep what the tokens of a pass chose in a layer, and count the rows that each sequence sends to its functions.

        Shapes: ids [tokens, k] of one sequence, or [sequences, k].
        """
        chosen.append((layer, ids.copy()))  # the next layer may use the same memory
        if len(sequences) > 1:
            for function in self.dispatcher.remote.get(layer, ()):
                self._rows[function.name] = np.isin(ids, function.experts).sum(axis=1).tolist()


def _count(sequences: Sequence[TokenSequence], chosen: Sequence[tuple[int, Array]]) -> None:
    """Count what the tokens of a pass chose, when it has not failed."""
    for layer, ids in chosen:
        for row, each in enumerate(sequences):
            each.count(layer, ids if len(sequences) == 1 else ids[row : row + 1])


def _stopped(sequences: Sequence[TokenSequence]) -> Stop | None:
    """Return why a pass has to end, which it has not while one of its sequences goes on."""
    reasons = [each.stopped() for each in sequences]
    return reasons[0] if all(reason == "time-limit" for reason in reasons) else None


def _choose(sequences: Sequence[TokenSequence], logits: Tensor) -> None:
    """Choose a token for each sequence; one that cannot take it fails alone."""
    likeliest = logits.argmax(dim=-1).tolist()
    for row, each in enumerate(sequences):
        try:
            each.put(each.choose(logits[row]) if each.processors else likeliest[row])
        except Exception as error:
            each.error = error
