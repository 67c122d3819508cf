"""When a failed call of an expert function is tried again.

Experts are pure functions, so trying again is always safe; it is only worth it when the next try can differ: a worker
that died is replaced, a throttled function frees up, a broken connection is made anew, S3 answers again. A function that
ran out of memory or time would do so again.
"""

from __future__ import annotations

RETRIES = 4
# Pause before the first retry of each kind of failure; it doubles with every further one.
_FIRST_PAUSE_S = {
    "Runtime.ExitError": 0.0,
    "ShardUnreachableError": 0.2,  # of the function's own errors (function/errors.py) the only one that may pass
    "TooManyRequestsException": 0.2,
    "ServiceException": 0.05,
    "ConnectionClosedError": 0.02,
    "ProtocolError": 0.02,
    "ResponseStreamingError": 0.02,
    "IncompleteReadError": 0.02,
}


def pause_s(kind: str, attempt: int) -> float | None:
    """Seconds to wait before retry number `attempt` + 1, or None when the failure is final."""
    if attempt >= RETRIES or kind not in _FIRST_PAUSE_S:
        return None
    return float(_FIRST_PAUSE_S[kind] * 2**attempt)
