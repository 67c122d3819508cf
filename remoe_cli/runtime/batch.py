"""Continuous batching: sequences join and leave between any two steps.

A step reads a part of one prompt, and then makes the next token of every sequence whose prompt is read, in one forward pass. So the rows
of all of them in one layer go to an expert function in one invocation. A prompt is read alone: as a whole where nobody else waits, else
in parts of at most 256 tokens, the prompts in turn, so that no stream stops for long and no prompt waits for a much longer one.

A sequence may try a draft in a step (draft.py): the pass takes its draft tokens too, and each of them whose place gets the same token
anyway stays. So several tokens of an answer share one call of a function in a layer. What the others have left in the cache is taken back.

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

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from remoe_cli.model.batch_cache import can_continue, crop, croppable, join, keep, remember
from remoe_cli.plan.mains import PROMPT_PART_TOKENS
from remoe_cli.runtime.answer import Stop, deadline_of
from remoe_cli.runtime.device import full_memory_named
from remoe_cli.runtime.dispatch import Array, Dispatcher
from remoe_cli.runtime.sequence import TokenSequence
from remoe_cli.runtime.shares import divide_call, divide_saved

_log = logging.getLogger(__name__)  # without a handler, its warnings go to stderr: the log of a main function
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
                self.dispatcher.start_ahead(len(tokens))
                sequence.cache = sequence.inputs.cache(self.model)
            part = PROMPT_PART_TOKENS if others and can_continue(self.model, sequence.cache) else len(tokens)
            with self._pass([sequence], others) as chosen:
                logits = self._forward([sequence], [tokens[start : start + part]], sequence.cache, None)
                sequence.drafts.read(tokens[: start + part])
            _count([sequence], chosen, [part])
            sequence.read = min(len(tokens), start + part)
            sequence.counted = max(sequence.counted, sequence.read)
            if sequence.read < len(tokens):
                self.reading.append(sequence)
                return []
            _choose([sequence], logits, [[]])
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
        """Make the next token of every sequence whose prompt is read, and those of its draft that stay."""
        sequences, longest = self.decoding, max(each.read for each in self.decoding)
        mask = None
        try:
            drafts = self._drafts(sequences)
            width = 1 + max(map(len, drafts))
            if any(each.read < longest for each in sequences):
                padding = torch.tensor([longest - each.read for each in sequences], device=self.model.device)
                mask = (torch.arange(longest + width, device=self.model.device) >= padding.unsqueeze(1)).long()
            tokens = [_filled([each.stream.ids[-1], *draft], width) for each, draft in zip(sequences, drafts, strict=True)]
            counts = [1 + len(draft) for draft in drafts]
            with self._pass(sequences, len(self) > 1, counts, width) as chosen:
                logits = self._forward(sequences, tokens, self.cache, mask, width, counts)
        except Exception as error:
            if len(sequences) == 1:
                self.decoding, self.cache = [], None
                sequences[0].error = error
                return sequences
            _log.warning("A step of %d requests failed with %s; each of them does it again alone.", len(sequences), type(error).__name__)
            self._begin_again(sequences)
            return []
        taken = _choose(sequences, logits, drafts)
        _count(sequences, chosen, taken)
        for each, count in zip(sequences, taken, strict=True):
            each.read += count
            each.counted = max(each.counted, each.read)
        left = [each for each in sequences if each.ended]
        rows = [row for row, each in enumerate(sequences) if not each.ended]
        self.decoding = [sequences[row] for row in rows]
        if not self.decoding or self.cache is None:
            self.cache = None
        elif left or width > 1:
            self._keep(rows, [width - taken[row] for row in rows] if width > 1 else None)
        return left

    def _drafts(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Make a draft for each sequence, if what is wrong of it can be taken back."""
        if not croppable(self.cache):
            return [[]] * len(sequences)
        with full_memory_named(_PLAN_LONGER):
            drafts = [each.draft() for each in sequences]
        remember(self.cache, all_tokens=any(drafts))
        return drafts

    def _keep(self, rows: list[int], dropped: list[int] | None) -> None:
        """Keep the rows of the cache that are of `decoding`, after a pass without the last tokens of each (None: with all)."""
        assert self.cache is not None
        longest = max(each.read for each in self.decoding)
        try:
            with full_memory_named(_PLAN_LONGER):
                if dropped is None:
                    keep(self.cache, rows, longest)
                else:
                    crop(self.cache, rows, dropped, longest)
        except Exception as error:
            _log.warning("The cache could not be cut (%s); %d requests are read again.", type(error).__name__, len(self.decoding))
            self._begin_again(self.decoding)

    def _forward(
        self,
        sequences: Sequence[TokenSequence],
        tokens: list[list[int]],
        cache: Cache | None,
        mask: Tensor | None,
        last: int = 1,
        filled_to: Sequence[int] = (),
    ) -> Tensor:
        """Run the model on the next tokens of each sequence; a cache that the model has made itself is the sequence's.

        `filled_to`: how many of its tokens each sequence really has, where some are filled up.

        Shapes: returns the logits of the `last` tokens, [sequences, last, vocabulary] in float32.
        """
        inputs, device = sequences[0].inputs, self.model.device
        named = dict(inputs.given)
        if "logits_to_keep" in named:
            named["logits_to_keep"] = last
        if inputs.positions:
            starts = torch.tensor([[each.read] for each in sequences], device=device)
            # What fills a row up is at its last token's place: one further on might be beyond the model's positions.
            counts = torch.tensor([[count] for count in filled_to or [len(tokens[0])] * len(sequences)], device=device)
            named["position_ids"] = starts + torch.arange(len(tokens[0]), device=device).minimum(counts - 1)
        if cache is not None:
            named["past_key_values"] = cache
        ids = torch.tensor(tokens, device=device)
        made = self.model.prepare_inputs_for_generation(
            ids, attention_mask=mask, is_first_iteration=not sequences[0].read, next_sequence_length=len(tokens[0]), **named
        )
        out = self.model(**made, return_dict=True)
        if cache is None:
            sequences[0].cache = out.past_key_values
        logits: Tensor = out.logits[:, -last:].to(copy=True, dtype=torch.float32)
        return logits

    @contextmanager
    def _pass(
        self, sequences: Sequence[TokenSequence], crowded: bool, tokens: Sequence[int] = (1,), width: int = 1
    ) -> Iterator[list[tuple[int, Array]]]:
        """Bill a forward pass to its sequences, also one that fails; yields what its tokens have chosen in each layer.

        Each sequence has so many `tokens` in it, and is filled up to `width`, for which no expert computes.
        """
        dispatcher = self.dispatcher
        dispatcher.stopped = lambda: _stopped(sequences)
        dispatcher.deadline_s = max(deadline_of(each.stopped) for each in sequences)
        if min(tokens) < width:
            places = torch.arange(width, device=self.model.device)
            dispatcher.filling = (places >= torch.tensor(tokens, device=self.model.device).unsqueeze(1)).reshape(-1, 1)
        chosen: list[tuple[int, Array]] = []
        # A copy: the next layer may use the same memory.
        dispatcher.seen = lambda layer, ids: chosen.append((layer, ids.copy()))
        try:
            with full_memory_named(_PLAN_LONGER):
                yield chosen
        except Exception:
            dispatcher.settle()
            raise
        finally:
            dispatcher.filling = None
            if crowded:
                for each in (*sequences, *self.reading, *self.decoding):
                    each.crowded = True
            self._bill(sequences, tokens, chosen)

    def _bill(self, sequences: Sequence[TokenSequence], tokens: Sequence[int] = (1,), chosen: Sequence[tuple[int, Array]] = ()) -> None:
        """Divide calls by rows, and time by the tokens that each sequence has in the pass; `chosen` is what these have chosen."""
        now_s = time.perf_counter()
        for each, count in zip(sequences, tokens, strict=True):
            each.main_s += (now_s - self._since_s) * count / sum(tokens)
        self._since_s = now_s
        for each, saved in zip(sequences, divide_saved(self.dispatcher.take_saved(), [each.owed for each in sequences]), strict=True):
            each.saved += saved
        sent = self._sent(len(sequences), chosen) if len(sequences) > 1 else {}
        for call in self.dispatcher.take():
            rows = sent.get(call.function, [0] * len(sequences))
            parts = [call] if len(sequences) == 1 else divide_call(call, rows, [each.owed for each in sequences])
            for each, part, mine in zip(sequences, parts, rows, strict=True):
                if mine or not any(rows):
                    each.invocations.append(call)
                    each.parts.append(part)

    def _sent(self, sequences: int, chosen: Sequence[tuple[int, Array]]) -> dict[str, list[int]]:
        """Count the rows that each sequence of a pass has sent to each function: those of experts that were not at hand."""
        sent: dict[str, list[int]] = {}
        for layer, ids in chosen:
            at_hand = self.dispatcher.at_hand.get(layer, ())
            for function in self.dispatcher.remote.get(layer, ()):
                experts = [expert for expert in function.experts if expert not in at_hand]
                sent[function.name] = np.isin(ids, experts).reshape(sequences, -1).sum(axis=1).tolist()
        return sent


def _filled(tokens: list[int], width: int) -> list[int]:
    """Fill a row of tokens up to a width, by its last one."""
    return tokens + tokens[-1:] * (width - len(tokens))


def _count(sequences: Sequence[TokenSequence], chosen: Sequence[tuple[int, Array]], taken: Sequence[int]) -> None:
    """Count what the tokens of a pass chose that each sequence has taken further."""
    for layer, ids in chosen:
        for each, mine, count in zip(sequences, ids.reshape(len(sequences), -1, ids.shape[-1]), taken, strict=True):
            each.count(layer, mine[:count])


def _stopped(sequences: Sequence[TokenSequence]) -> Stop | None:
    """Return why a pass has to end, which it has not while one of its sequences goes on."""
    reasons = [each.stopped() for each in sequences]
    return reasons[0] if all(reason == "time-limit" for reason in reasons) else None


def _choose(sequences: Sequence[TokenSequence], logits: Tensor, drafts: Sequence[list[int]]) -> list[int]:
    """Choose tokens for each sequence as far as its draft is right; one that cannot take them fails alone.

    Returns how many tokens each has got, for which as many of its tokens in the pass were needed.

    Shapes: logits [sequences, tokens, vocabulary].
    """
    likeliest, taken = logits.argmax(dim=-1).tolist(), []
    for row, (each, draft) in enumerate(zip(sequences, drafts, strict=True)):
        each.drafted, place = bool(draft), 0
        try:
            while True:
                token = each.choose(logits[row, place]) if each.processors else likeliest[row][place]
                place += 1
                each.put(token)
                if each.ended or place > len(draft) or token != draft[place - 1]:
                    break
        except Exception as error:
            each.error = error
        each.learn(draft, place)
        taken.append(place)
    return taken
