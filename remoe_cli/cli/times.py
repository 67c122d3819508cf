"""Options that take a time: 200ms, 0.2s, 5min, or a number in the unit that the option's help names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

UNITS_S = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(?P<number>\S*?)\s*(?P<unit>ms|s|min|h|)")


class WrongTimeError(ValueError):
    """A time that cannot be taken, without the option's name, which who raises this does not know.

    hint   how to write what was probably meant
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def time_in(unit: Literal["s", "ms"], least: float = 0.0, longest: float | None = None) -> Callable[[Any], float]:
    """Return what reads an option's text as a time in `unit`.

    A number without a unit is in `unit` too, unless it is above `longest`: then it was probably meant in milliseconds.

    >>> time_in("s")("200ms"), time_in("s")("0.2"), time_in("ms")("0.2s"), time_in("s")("1min")
    (0.2, 0.2, 200.0, 60.0)
    """

    def read(value: Any) -> float:
        text = str(value)
        found = _TIME.fullmatch(text)
        try:
            number = float(found["number"] if found else text)
        except ValueError:
            raise WrongTimeError(f"is {text!r}, not a time.", "Write it as 200ms or 0.2s.") from None
        given = found["unit"] if found else ""
        in_unit = number * UNITS_S[given] / UNITS_S[unit] if given not in ("", unit) else number
        if not math.isfinite(in_unit):
            return in_unit  # which no option takes (groups.py)
        if in_unit < least:
            raise WrongTimeError(f"is {text}; it must be {f'{least:g} {unit}' if least else 0} or more.", "")
        if not given and longest is not None and in_unit > longest:
            raise WrongTimeError(f"is {text}, which without a unit is in seconds.", f"Write {text}ms, or {text}s if you mean seconds.")
        return in_unit

    return read
