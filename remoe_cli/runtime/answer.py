"""One generated answer, as the engine returns it. Imports no torch, for those who only read receipts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from remoe_cli.runtime.invoke import Invocation

# Why an answer ended before the model or its length ended it: nobody waits for it, or the time there is for it is over.
Stop = Literal["cancelled", "time-limit"]
FinishReason = Literal["stop", "length"] | Stop


@dataclass(frozen=True)
class Generated:
    """What the engine generated for one prompt.

    token_times_s   seconds from the start of generation to each token
    invocations     all invocations of expert functions, in the order of their answers
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    token_times_s: tuple[float, ...]
    invocations: tuple[Invocation, ...]

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time of a token after the first; None when there is only one."""
        n = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / n if n else None
