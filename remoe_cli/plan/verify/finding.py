"""What the verifier finds wrong: one statement of a plan, and what it should be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from remoe_cli.plan.document import Outcome
from remoe_cli.plan.verify.cost import TOLERANCE


@dataclass(frozen=True)
class Finding:
    """One statement of the plan that does not hold: the name of the field, and both values as text."""

    field: str
    stated: str
    found: str

    def __str__(self) -> str:
        return f"'{self.field}' is {_short(self.stated)} in the plan, and {_short(self.found)} when it is worked out again"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def same(field: str, stated: float, found: float) -> Iterator[Finding]:
    """Require that two numbers are equal, but for rounding."""
    if not math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-18):
        yield Finding(field, repr(stated), repr(found))


def require(holds: bool, field: str, stated: object, found: object) -> Iterator[Finding]:
    """Require that a condition holds."""
    if not holds:
        yield Finding(field, str(stated), str(found))


def same_or_none(field: str, stated: float | None, found: float | None) -> Iterator[Finding]:
    """Require that two numbers are equal, or that there is neither."""
    if stated is None or found is None:
        yield from require(stated is found, field, stated, found)
    else:
        yield from same(field, stated, found)


def outcomes(field: str, stated: Outcome, found: Outcome) -> Iterator[Finding]:
    """Require that cost and times are equal, but for rounding."""
    prefix = f"{field}." if field else ""
    for name in ("cost_usd_per_request", "ttft_s", "tpot_s", "ttft_percentile_s"):
        yield from same_or_none(f"{prefix}{name}", getattr(stated, name), getattr(found, name))
