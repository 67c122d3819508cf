"""One generated answer, as the engine returns it. Imports no torch, for those who only read receipts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from remoe_cli.runtime.invoke import Invocation, Sample

# Why an answer ended before the model or its length ended it: nobody waits for it, or the time there is for it is over.
Stop = Literal["cancelled", "time-limit"]
FinishReason = Literal["stop", "length"] | Stop
TokenCalls = tuple[float, tuple[Sample, ...]]  # seconds of a token, and its calls


@dataclass(frozen=True)
class Generated:
    """What the engine generated for one prompt.

    token_times_s   seconds from the start of generation to each token
    invocations     all invocations of expert functions, in the order of their answers
    invoked         how many of them were over when each token was there
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    token_times_s: tuple[float, ...]
    invocations: tuple[Invocation, ...]
    invoked: tuple[int, ...] = ()

    @property
    def further(self) -> tuple[TokenCalls, ...]:
        """List the tokens after the first whose calls were all warm and tried once.

        They tell what a call takes.
        """
        tokens = []
        for i in range(1, len(self.invoked)):
            calls = self.invocations[self.invoked[i - 1] : self.invoked[i]]
            if not any(call.init_ms is not None or call.retries for call in calls):
                tokens.append((self.token_times_s[i] - self.token_times_s[i - 1], tuple(call.sample for call in calls)))
        return tuple(tokens)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time of a token after the first; None when there is only one."""
        n = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / n if n else None
