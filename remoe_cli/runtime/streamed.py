"""What a handler of Lambda returns whose result is sent in parts (lambda_runtime.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Streamed:
    """A result that is sent in parts.

    send   calls its argument with each part, and returns after the last
    """

    content_type: str
    send: Callable[[Callable[[bytes], None]], None]
