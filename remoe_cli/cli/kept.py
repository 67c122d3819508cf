"""What the commands share that read kept receipts: since when, and what of the lines cannot be read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.errors import UsageError

if TYPE_CHECKING:
    from remoe_cli.plan.catalog.catalog import Catalog
    from remoe_cli.plan.document import Plan
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
    from remoe_cli.usage.again import GIVEN

    if made.forced == GIVEN:
        missed = "" if made.meets else " It misses the plan's targets: plan again without --placement."
        return f"The placement is the one that was given (--placement), and no other one was looked for.{missed}"
    forced = f" with {made.forced}" if made.forced else ""
    saves = f"saves {made.saved:.1%} of the {made.objective if made.objective == 'cost' else made.objective.upper()}"
    if made.saved_usd_per_month is not None:
        from remoe_cli.plan.wording import dollars

        saves += f", {dollars(abs(made.saved_usd_per_month))} a month {'less' if made.saved_usd_per_month >= 0 else 'more'}"
    if not made.meets:
        return f"Plan again: the deployed placement misses the plan's targets. The best plan{forced} moves {made.moved} experts."
    if made.worth:
        return f"Plan again: the best plan{forced} {saves}, and moves {made.moved} experts."
    return f"The plan need not be made again: the best plan{forced} {saves}."


def command_again(plan: Plan, catalog: Catalog, profile: str) -> str:
    """Write the command that plans again as `plan` was planned, with its catalog, for another profile.

    Lengths of requests, a placement in a file and prompts of standard input are not in it: the plan does not know where they came from. The
    share of cold requests is in it where it is not the one that the traffic implies.
    """
    from remoe_cli.plan.problem.request import request_of
    from remoe_cli.plan.problem.traffic import Traffic

    asked, targets, workload = request_of(plan), plan.targets, plan.workload
    implied = Traffic(workload.lengths, workload.requests_per_hour).cold_share(catalog.function.idle_ttl_s)
    prompts = None if workload.routing is None else workload.routing.prompts.path
    options: dict[str, float | str | None] = {
        "--catalog": None if plan.catalog.path == "local" else plan.catalog.path,
        "--minimize": None if plan.objective == "cost" else plan.objective,
        "--ttft": None if targets.ttft_s is None else f"{targets.ttft_s:g}s",
        "--ttft-percentile": targets.ttft_percentile,
        "--tpot": None if targets.tpot_s is None else f"{targets.tpot_s:g}s",
        "--budget": targets.budget_usd,
        "--requests-per-hour": workload.requests_per_hour,
        "--concurrency": None if workload.concurrency == 1 else workload.concurrency,
        "--speculate": None if workload.speculate == "off" else str(workload.speculate),
        "--data": None if prompts == "standard input" else prompts,
        "--cold-share": None if math.isclose(workload.cold_share, implied, rel_tol=1e-9) else workload.cold_share,
        "--remote-share": asked.remote_share,
        "--solver": None if asked.solver == "exact" else asked.solver,
        "--invocation": None if plan.invocations == "per-layer" else plan.invocations,
    }
    given = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    return " ".join(["remoe plan", shlex.quote(profile), "-o plans/NAME.json", *given])
