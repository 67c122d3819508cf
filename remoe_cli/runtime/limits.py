"""What a server of a main function gives a request."""

from __future__ import annotations

import math
from dataclasses import dataclass

from remoe_cli.plan.mains import MOST_REQUESTS


@dataclass(frozen=True)
class Limits:
    """Limits of a request to a main server.

    whole_s, streamed_s   seconds after its arrival at which its answer ends with the next token
    requests              that are answered or wait, or twice as many as are answered at once where that is more; one more is refused
    """

    whole_s: float = math.inf
    streamed_s: float = math.inf
    requests: int = MOST_REQUESTS


NO_LIMITS = Limits()
