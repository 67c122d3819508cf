"""What the commands share that read kept receipts: since when, and what of the lines cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.runtime.kept import Unreadable
    from remoe_cli.usage.again import Again

SINCE = typer.Option(metavar="TIME", help="Only requests since then: a date, or a time such as 2026-11-30T08:00 (UTC).")
SinceOption = Annotated[str | None, SINCE]


def since_of(text: str | None) -> datetime | None:
    """Read --since; a time without a zone is UTC. Raises: UsageError for what is no time."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--since is no time: {text!r}.", "Give a date such as 2026-11-30, or a time such as 2026-11-30T08:00.") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@contextmanager
def reading() -> Iterator[Unreadable]:
    """Show that receipts are read, and say afterwards which lines could not be."""
    from remoe_cli.runtime.kept import Unreadable

    unreadable = Unreadable()
    with output.progress("Reading the receipts"):
        yield unreadable
    if unreadable.warning:
        output.say(f"warning: {unreadable.warning}")


def show_again(made: Again, what: str) -> None:
    """Print the deployed placement beside the best one; `what` is what changed, such as "these times"."""
    from remoe_cli.plan.wording import dollars, seconds

    columns = (("as planned", made.planned), (f"with {what}", made.deployed), ("best plan", made.best))
    output.table(
        "The deployed placement",
        ("", *(name for name, _ in columns)),
        [
            ("a request", *(dollars(each.cost_usd_per_request) for _, each in columns)),
            ("TTFT", *(seconds(each.ttft_s) for _, each in columns)),
            ("TPOT", *(f"{each.tpot_s * 1e3:.1f} ms" for _, each in columns)),
        ],
    )


def verdict(made: Again | None, why_none: str) -> str:
    """Say whether the plan should be made again, and what that saves."""
    if made is None:
        return f"No placement keeps the plan's targets any more: {why_none}"
    saves = f"saves {made.saved:.1%} of the {made.objective if made.objective == 'cost' else made.objective.upper()}"
    if made.saved_usd_per_month is not None:
        from remoe_cli.plan.wording import dollars

        saves += f", {dollars(abs(made.saved_usd_per_month))} a month {'less' if made.saved_usd_per_month >= 0 else 'more'}"
    if not made.meets:
        return f"Plan again: the deployed placement misses the plan's targets. The best plan moves {made.moved} experts."
    if made.worth:
        return f"Plan again: the best plan {saves}, and moves {made.moved} experts."
    return f"The plan need not be made again: the best plan {saves}."
