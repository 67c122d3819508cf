"""One answer while it is generated: its tokens, what chooses and ends them, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.logits_process import LogitsProcessorList

from remoe_cli.model.draft import Drafts
from remoe_cli.model.generation import visible
from remoe_cli.runtime.answer import NOTHING_SAVED, FinishReason, Generated, Piece, Saved, Stop, TokenLogprob, why_not_begun
from remoe_cli.runtime.choose import Noted
from remoe_cli.runtime.detokenize import Detokenizer
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.served_hits import DECODE, PREFILL, Hits
from remoe_cli.runtime.shares import Owed


@dataclass
class Stream:
    """Collects the tokens of an answer, and passes on whole characters without stop strings.

    Stop strings are looked for in the text with special tokens, as "<|im_end|>" is a usual one.

    skip_special   whether the text is without the tokenizer's special tokens
    at_stop        whether a stop string is in the answer
    """

    tokenizer: Any
    stop: Sequence[str]
    on_piece: Callable[[Piece], None]
    noted: Noted | None
    skip_special: bool = True
    start: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    at_stop: bool = False
    _shown: int = 0
    _visible: Detokenizer = field(init=False)
    _whole: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._visible = Detokenizer(self.tokenizer, self.skip_special)
        self._whole = Detokenizer(self.tokenizer, False)

    def put(self, token: int) -> None:
        self.times.append(time.perf_counter() - self.start)
        self.ids.append(token)
        if self.noted:
            self.logprobs.append(self._logprob(self.noted))
        self._visible.put(token)
        if self.stop:
            seen = max(0, len(self._whole.text) - max(map(len, self.stop)) + 1)
            self._whole.put(token)
            self.at_stop = self.at_stop or any(self._whole.whole.find(each, seen) >= 0 for each in self.stop)
        if not self._visible.pending:
            self._show(visible(self._visible.text[len(self.text) :], self.stop, ended=None))

    def finish(self, *, stopped: bool) -> None:
        """Pass on the rest; `stopped` tells whether a stop string has ended the answer."""
        self._show(visible(self._visible.whole[len(self.text) :], self.stop, ended=stopped))

    def first_of(self, strings: Sequence[str]) -> str | None:
        """Return which of some stop strings comes first in the answer, where one of all has ended it."""
        text = self._whole.whole
        return min((each for each in strings if each in text), key=text.find, default=None) if self.at_stop else None

    def _show(self, text: str) -> None:
        """Pass on what comes next of the text. No stop string begins before it, as its beginning would have been held back."""
        if text:
            self.on_piece(Piece(self.ids[-1], text, tuple(self.logprobs[self._shown :])))
            self.text, self._shown = self.text + text, len(self.logprobs)

    def _logprob(self, noted: Noted) -> TokenLogprob:
        token = self.ids[-1]
        logprob, top = noted.of_token(len(self.ids) - 1, token)
        return TokenLogprob(token, self.tokenizer.decode([token]), logprob, tuple((i, self.tokenizer.decode([i]), p) for i, p in top))


@dataclass(frozen=True)
class Inputs:
    """How a model takes the tokens of one sequence.

    given       what every forward pass gets
    positions   whether it gets positions
    cached      whether it gets a cache; else the model makes its own in the first pass
    """

    given: Mapping[str, Any]
    positions: bool
    cached: bool

    def cache(self, model: PreTrainedModel) -> Cache | None:
        """Make an empty cache, with the kinds of layers that this model has."""
        return DynamicCache(config=model.config.get_text_config(decoder=True)) if self.cached else None


@dataclass(eq=False)
class TokenSequence:
    """A prompt and its answer as far as it goes.

    inputs       of the model
    processors   change the logits; none where the likeliest token is taken
    ends         the token ids that end an answer
    stopped      asked after every token
    strings      the request's own stop strings
    cache        of this sequence alone, until it joins others
    read         how many of its tokens are in a cache
    error        why there is no answer
    invocations  the calls of all steps it took part in; parts: its own part of each; owed: what the parts' rounding left over
    main_s       its part of the main function's time
    hits         how often its tokens chose each expert; counted: of how many tokens, so that what is read again counts once
    saved        its part of calls that were not made (expert_cache.py)
    drafts       what it may try, and what became of it
    drafted      whether the pass of its next tokens has a draft; in_draft: so it had, for each token
    crowded      whether the main function has computed for others since its last token; shared: so it was, for each token
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    inputs: Inputs
    processors: LogitsProcessorList
    ends: frozenset[int]
    stopped: Callable[[], Stop | None]
    strings: Sequence[str]
    hits: Hits
    stream: Stream
    cache: Cache | None = None
    read: int = 0
    counted: int = 0
    error: Exception | None = None
    finish_reason: FinishReason | None = None
    invocations: list[Invocation] = field(default_factory=list)
    parts: list[Invocation] = field(default_factory=list)
    owed: Owed = field(default_factory=dict)
    main_s: float = 0.0
    saved: Saved = NOTHING_SAVED
    drafts: Drafts = field(default_factory=Drafts)
    drafted: bool = False
    in_draft: list[bool] = field(default_factory=list)
    crowded: bool = False
    shared: list[bool] = field(default_factory=list)
    invoked: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Return the prompt and the answer."""
        return [*self.prompt_ids, *self.stream.ids]

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def alone(self) -> bool:
        """Whether the main function has computed for nobody else meanwhile."""
        return not self.crowded and not any(self.shared)

    def count(self, layer: int, ids: npt.NDArray[np.integer]) -> None:
        """Count the experts that its next tokens chose in a layer, but not of tokens that are read again.

        Shapes: ids [tokens, k].
        """
        first = max(self.read, self.counted)
        fresh, prompt = ids[first - self.read :], max(0, len(self.prompt_ids) - first)
        for phase, part in ((PREFILL, fresh[:prompt]), (DECODE, fresh[prompt:])):
            if len(part):
                self.hits.add(phase, layer, part)

    def draft(self) -> list[int]:
        """Return tokens that may come after the last one of the answer, but none that would end it."""
        return self.drafts.next(self.tokens, self.max_new_tokens - len(self.stream.ids) - 1, self.ends)

    def learn(self, draft: Sequence[int], taken: int) -> None:
        """Take note of a pass with a draft, after which the answer has got so many tokens."""
        last = self.stream.ids[len(self.stream.ids) - taken :]
        self.drafts.learn(len(draft), sum(a == b for a, b in zip(draft, last, strict=False)))

    def choose(self, logits: Tensor) -> int:
        """Choose the next token. Shapes: logits [vocabulary], float32."""
        ids = torch.tensor([self.tokens], device=logits.device)
        return int(self.processors(ids, logits.unsqueeze(0)).argmax(dim=-1))

    def put(self, token: int) -> None:
        """Take a token into the answer, pass on its text, and end the answer where it has to end."""
        self.invoked.append(len(self.invocations))
        self.shared.append(self.crowded)
        self.crowded = False
        self.in_draft.append(self.drafted)
        self.stream.put(token)
        reason, count, at_stop_string = self.stopped(), len(self.stream.ids), self.stream.at_stop
        if at_stop_string or token in self.ends:
            self._finish("stop", at_stop_string)
        elif count >= self.max_new_tokens:
            self._finish("length", False)
        elif reason is not None:
            self._finish(reason, False)

    def end(self, reason: Stop) -> None:
        """End the answer where it is; without any token it is an error."""
        if self.stream.ids:
            self._finish(reason, False)
        else:
            self.error = why_not_begun(reason)

    def _finish(self, reason: FinishReason, at_stop_string: bool) -> None:
        self.stream.finish(stopped=at_stop_string)
        self.finish_reason = reason

    def generated(self) -> Generated:
        """Return the answer, which has ended."""
        assert self.finish_reason is not None
        return Generated(
            self.prompt_ids,
            tuple(self.stream.ids),
            self.stream.text,
            self.finish_reason,
            tuple(self.stream.times),
            tuple(self.invocations),
            tuple(self.invoked),
            tuple(self.stream.logprobs),
            self.stream.first_of(self.strings),
            shared=tuple(self.shared) if not self.alone else (),
            parts=tuple(self.parts) if not self.alone else None,
            main_s=self.main_s if not self.alone else None,
            hits=self.hits,
            in_draft=tuple(self.in_draft) if self.drafts.made.passes else (),
            drafted=self.drafts.made,
            saved=self.saved,
        )
