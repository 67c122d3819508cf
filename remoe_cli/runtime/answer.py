"""One generated answer, as the engine returns it. Imports no torch, for those who only read receipts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, Literal

from remoe_cli import bounded
from remoe_cli.errors import DeployError
from remoe_cli.model.draft import NO_DRAFTS, Drafted
from remoe_cli.runtime.invoke import Invocation, Sample
from remoe_cli.runtime.served_hits import Hits

# Why an answer ended before the model or its length ended it: nobody waits for it, or the time there is for it is over.
Stop = Literal["cancelled", "time-limit"]
FinishReason = Literal["stop", "length"] | Stop
TokenCalls = tuple[float, tuple[Sample, ...]]  # seconds of a token, and its calls


def why_not_begun(reason: Stop | None) -> DeployError | None:
    """Return the error of a request that ends before its first token; None where it goes on."""
    match reason:
        case "cancelled":
            return DeployError("The main function is ending.", "Ask again.")
        case "time-limit":
            return DeployError(
                "There was no time left to answer when the request's turn came.",
                "Ask again when fewer requests wait or all is warm.",
            )
    return None


@dataclass(frozen=True)
class Until:
    """The `stopped` of an answer that ends at an event, or when `time.monotonic()` passes `limit_s`."""

    limit_s: float
    cancelling: tuple[Event, ...] = ()

    def __call__(self) -> Stop | None:
        if any(event.is_set() for event in self.cancelling):
            return "cancelled"
        return "time-limit" if time.monotonic() > self.limit_s else None


def deadline_of(stopped: Callable[[], Stop | None]) -> float:
    """Return when an answer has to be there, by `time.monotonic()`.

    Calls get a part of the time until then.
    """
    return stopped.limit_s if isinstance(stopped, Until) else math.inf


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own log-probability of one token, before the request's parameters change it.

    text   of the token alone; a token that is a part of a character has U+FFFD
    top    the likeliest tokens of that step, with their texts and log-probabilities
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model asks for.

    arguments   JSON as text; it is not complete where the answer ended in it
    """

    id: str
    name: str
    arguments: str

    @property
    def parsed(self) -> dict[str, Any] | None:
        """Return the arguments; None where they are no JSON object."""
        try:
            found = bounded.parse_json(self.arguments, finite=True)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call of a tool.

    call          as far as it goes
    delta         what of its arguments is new
    first, last   whether the call begins, and ends, with this piece
    """

    call: ToolCall
    delta: str
    first: bool
    last: bool


@dataclass(frozen=True)
class Piece:
    """A piece of text as it becomes whole, or of a call of a tool.

    token_id     the token that completed it
    choice       which answer to the request it belongs to, where there are several
    logprobs     of all tokens since the piece before, where they were asked for
    call         where the request asks for calls to be read
    """

    token_id: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0
    call: CallPiece | None = None


@dataclass(frozen=True)
class Saved:
    """Calls that were not made, as their experts were at hand (expert_cache.py).

    usd   what they would have cost
    """

    calls: int = 0
    usd: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.calls + other.calls, self.usd + other.usd)


NOTHING_SAVED = Saved()


@dataclass(frozen=True)
class Generated:
    """What the engine generated for one prompt.

    token_times_s   seconds from the start of generation to each token
    invocations     all invocations of expert functions, in the order of their answers
    invoked         how many of them were over when each token was there
    logprobs        of each token, where they were asked for
    stop_string     the request's stop string that ended the answer
    joined_at       where the tokens of further answers begin (`together`)
    shared          for each token, whether the main function computed for other requests meanwhile; empty where it never did
    parts           what this answer pays of each invocation, where others were shared with it; None: all
    main_s          what it pays of the main function's time; None: all
    hits            how often its tokens chose each expert (runtime/served_hits.py); None where nobody counted
    in_draft        for each token, whether it is of a pass with a draft; empty where no pass had one
    drafted         what became of the drafts (model/draft.py)
    saved           the answer's part of calls that were not made
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    token_times_s: tuple[float, ...]
    invocations: tuple[Invocation, ...]
    invoked: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_string: str | None = None
    joined_at: tuple[int, ...] = ()
    shared: tuple[bool, ...] = ()
    parts: tuple[Invocation, ...] | None = None
    main_s: float | None = None
    hits: Hits | None = field(default=None, compare=False, repr=False)
    in_draft: tuple[bool, ...] = ()
    drafted: Drafted = NO_DRAFTS
    saved: Saved = NOTHING_SAVED

    @property
    def billed(self) -> tuple[Invocation, ...]:
        """List what the answer pays of its calls (runtime/shares.py)."""
        return self.invocations if self.parts is None else self.parts

    @property
    def paid_s(self) -> float:
        """Return the seconds of the main function that the answer pays."""
        return (self.token_times_s or (0.0,))[-1] if self.main_s is None else self.main_s

    @property
    def further(self) -> tuple[TokenCalls, ...]:
        """List the tokens after the first whose calls were all warm and tried once.

        They tell what a call takes. Tokens that were made while others were, or several in one pass, do not.
        """
        tokens = []
        for i in range(1, len(self.invoked)):
            if not self.is_sample(i):
                continue
            calls = self.invocations[self.invoked[i - 1] : self.invoked[i]]
            if all(call.plain for call in calls):
                tokens.append((self.token_times_s[i] - self.token_times_s[i - 1], tuple(call.sample for call in calls)))
        return tuple(tokens)

    def is_sample(self, token: int) -> bool:
        """Tell whether a token was made alone: beside no other request, and not in a pass with a draft."""
        return not any(kinds[token] for kinds in (self.shared, self.in_draft) if kinds)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time of a token after the first of its answer; None when there is no such token."""
        starts = [0, *self.joined_at]
        spans = [self.token_times_s[a:b] for a, b in zip(starts, [*self.joined_at, len(self.token_times_s)], strict=True)]
        n = sum(len(span) - 1 for span in spans)
        return sum(span[-1] - span[0] for span in spans) / n if n else None


def together(made: Sequence[Generated]) -> Generated:
    """Join several answers to one prompt, which were generated one after another, for one receipt.

    >>> one = Generated((1,), (2, 3), "ab", "stop", (0.5, 0.75), ())
    >>> both = together([one, one])
    >>> both.token_times_s, both.ttft_s, both.tpot_s
    ((0.5, 0.75, 1.25, 1.5), 0.5, 0.25)
    """
    ids: list[int] = []
    times: list[float] = []
    joined_at: list[int] = []
    for each in (each for each in made if each.token_ids):
        begun_s = times[-1] if times else 0.0
        if ids:
            joined_at.append(len(ids))
        ids += each.token_ids
        times += [begun_s + time_s for time_s in each.token_times_s]
    calls = tuple(call for each in made for call in each.invocations)
    shared = any(each.parts is not None for each in made)
    return replace(
        made[0],
        token_ids=tuple(ids),
        token_times_s=tuple(times),
        invocations=calls,
        joined_at=tuple(joined_at),
        parts=tuple(part for each in made for part in each.billed) if shared else None,
        main_s=sum(each.paid_s for each in made) if shared else None,
        drafted=Drafted(*(map(sum, zip(*(each.drafted for each in made), strict=True)))),
        saved=sum((each.saved for each in made), NOTHING_SAVED),
    )
