"""A break-even traffic in words, and as JSON."""

from __future__ import annotations

from typing import Any

from remoe_cli.plan.wording import figure
from remoe_cli.simulate.break_even import LEAST_PER_HOUR, MOST_PER_HOUR, MOST_REFUSED, BreakEvenBursts


def has_point(one: BreakEvenBursts) -> bool:
    """Say whether the plan is the cheaper one up to a traffic and the dearer one above it."""
    return LEAST_PER_HOUR < one.per_hour.mean < MOST_PER_HOUR


def traffic_text(one: BreakEvenBursts) -> str:
    """Write the requests an hour up to which the plan is cheaper."""
    if has_point(one):
        return figure(float(f"{one.per_hour.mean:.3g}"))
    return "always" if one.per_hour.mean >= MOST_PER_HOUR else "never"


def runs_text(one: BreakEvenBursts) -> str:
    """Write the least and the most of the single runs."""
    return " to ".join(figure(float(f"{each:.3g}")) for each in (one.per_hour.least, one.per_hour.most))


def cheaper_text(one: BreakEvenBursts) -> str:
    """Say up to which traffic the plan is cheaper."""
    match traffic_text(one):
        case "never" if one.refused > MOST_REFUSED:
            return f"this plan leaves {one.refused:.0%} of them without an answer"
        case "never":
            return f"what is always on costs less from {LEAST_PER_HOUR:g} requests an hour on, the least that is looked at"
        case "always":
            return f"this plan costs less than what is always on up to {MOST_PER_HOUR:,.0f} requests an hour, the most that is looked at"
        case traffic:
            return f"this plan costs less than what is always on up to {traffic} requests an hour"


def break_even_document(one: BreakEvenBursts) -> dict[str, Any]:
    """Write a break-even traffic as JSON.

    The requests an hour are null where they are not between the ends of what was looked at.
    """
    inside = has_point(one)
    return {
        "burstiness": one.burstiness,
        "of_trace": one.own,
        "requests_per_hour": one.per_hour._asdict() if inside else None,
        "cheaper": "below" if inside else traffic_text(one),
        "refused": one.refused,
        "against": one.against,
    }
