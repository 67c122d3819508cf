"""A parser that mutants are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Parse = Callable[[bytes], object]
Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Parser:
    """A parser, and how its inputs are changed.

    share    how many of the mutants are its own, as a weight: those of slow parsers are fewer
    errors   what it may raise besides RemoeError
    """

    parse: Parse
    valid: tuple[bytes, ...]
    changes: tuple[Mutate, ...]
    share: float = 1.0
    errors: tuple[type[Exception], ...] = ()
