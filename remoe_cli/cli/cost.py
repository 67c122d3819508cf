"""`remoe cost`: what a deployment has cost, from its receipts."""

from __future__ import annotations

import csv as tables
import io
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.kept import SinceOption, reading, since_of
from remoe_cli.cli.target import NameArgument, ProfileOption, RegionOption, TargetName, TargetOption, pick
from remoe_cli.errors import DeployError, RemoeError, UsageError
from remoe_cli.usage.by import By

if TYPE_CHECKING:
    from remoe_cli.deploy.target import Target
    from remoe_cli.usage.cost import CostReport, CostRow, Standing

EXAMPLES = examples(
    "remoe cost demo",
    "remoe cost olmoe --target aws --since 2026-11-01 --by user",
    "remoe cost olmoe --by function --csv > november.csv",
)
_SPARE = ("GB-s", "billed s", "cold", "calls")  # columns that a narrow terminal does without, one after another
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes


def command(
    name: NameArgument,
    since: SinceOption = None,
    by: Annotated[By, typer.Option(help="What a row stands for; days are those of UTC, users those that requests named.")] = By.day,
    csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    target: TargetOption = TargetName.local,
    region: RegionOption = None,
    profile: ProfileOption = None,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Add up what a deployment has cost, from the receipts that are kept on this machine.

    Rented main functions also cost the hours between requests, and a deployment that stands costs its storage.
    """
    if csv and json:
        raise UsageError("--csv and --json are two forms of one result.", "Leave one of them out.")
    begin = since_of(since)
    place = pick(target, region, profile)
    book, standing = place.receipts(name), None
    try:
        standing = _standing(place, name)
    except DeployError:
        if not book.exists:
            raise
    from remoe_cli.usage.cost import report

    with reading() as unreadable:
        made = report(book.receipts(unreadable=unreadable), by, begin, standing)
    meter = _meter(place, name) if standing is not None and target is TargetName.local else None
    if csv:
        output.line(_csv(made))
        return
    document: dict[str, Any] = {"name": name, "target": target.value, "receipts": str(book.folder), "unreadable": len(unreadable.places)}
    document |= {"since": begin and begin.isoformat()} | made.model_dump(mode="json") | {"meter": meter}
    output.result(document, lambda: _show(name, made, meter))


def _standing(place: Target, name: str) -> Standing:
    """Say what costs money while the deployment stands; raises DeployError where it does not."""
    from remoe_cli.artifacts import read_json
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.document import Plan
    from remoe_cli.usage.cost import Standing, Stored

    now, instances, stored = datetime.now(UTC), 1, None
    try:
        plan = read_json(place.deployed_plan(name), Plan)
        instances = plan.instances
        usd_per_gb_month = read_catalog(plan.catalog.path).storage.usd_per_gb_month
        remote = sum(len(layer.remote) for layer in plan.layers)
        stored = Stored(stored_bytes=remote * plan.model.fetched_expert_bytes, usd_per_gb_month=usd_per_gb_month)
    except DeployError:
        raise
    except RemoeError as error:
        output.say(f"The storage has no price here: {error.message}")
    return Standing(now, instances, stored)


def _meter(place: Target, name: str) -> dict[str, int] | None:
    """Compare the receipts with the twin's own meter; None where the twin does not run."""
    status = place.status(name)
    if status["endpoint"] is None:
        return None
    kept_ms = sum(line.receipt.billed_ms for line in place.receipts(name).receipts(place.deployed_at(name)))
    metered_ms = sum(f["billed_ms"] for f in status["functions"])
    return {"metered_ms": metered_ms, "kept_ms": kept_ms, "other_ms": metered_ms - kept_ms}


def _csv(made: CostReport) -> str:
    """Write the rows as CSV. A user's name that a spreadsheet would compute gets an apostrophe before it."""
    text = io.StringIO()
    fields = [*type(made.total).model_fields, "usd"]
    writer = tables.writer(text, lineterminator="\n")
    writer.writerow([made.by.value, *fields[1:]])
    for row in made.rows:
        of = f"'{row.of}" if row.of.startswith(_FORMULA) else row.of
        writer.writerow([of, *(getattr(row, field) for field in fields[1:])])
    return text.getvalue().rstrip("\n")


def _show(name: str, made: CostReport, meter: dict[str, int] | None) -> None:
    from remoe_cli.plan.wording import dollars

    if made.begin is None or made.end is None:
        output.paragraph(f"No receipt of '{name}' is kept for that time.")
        return
    output.paragraph(f"{name}: {made.begin:%Y-%m-%d %H:%M} to {made.end:%Y-%m-%d %H:%M} UTC, at list prices")
    rented = bool(made.total.idle_s)
    columns = (
        made.by.value,
        "requests",
        "prompt + output\ntokens",
        "calls",
        "cold",
        "billed s",
        "GB-s",
        "functions",
        "main",
        *(("idle",) if rented else ()),
    )
    rows = [_cells(row, rented) for row in (*made.rows, made.total.model_copy(update={"of": "all"}))]
    output.table("", (*columns, "in all"), rows, _SPARE)
    if made.loading_usd or made.loading_ms:
        meanwhile = f", with {made.loading_ms} ms of expert functions that started meanwhile" if made.loading_ms else ""
        output.paragraph(f"Of that, loading is {dollars(made.loading_usd)}{meanwhile}: each has a receipt of its own.")
    if unanswered := _unanswered(made.total):
        output.paragraph(f"Of the {made.total.requests:,} requests, {unanswered}.")
    if rented:
        output.paragraph(f"Rented main functions were idle for {made.total.idle_s / 3600:,.1f} hours.")
    if made.total.unreported:
        output.paragraph(
            f"What {made.total.unreported} tries of calls were billed was not known when their receipts were made. "
            "A later receipt may have it."
        )
    if made.total.unpriced:
        output.paragraph(f"{made.total.unpriced} requests ended before their prices were known, and are in no sum of money.")
    if made.storage_usd is not None:
        output.paragraph(f"Storage of the expert functions' weights: {dollars(made.storage_usd)}")
    output.line(f"Everything: {dollars(made.usd)}")
    if meter is not None:
        elsewhere = f"and {meter['other_ms']} ms are in no receipt: other callers, or requests that a server did not end"
        others = elsewhere if meter["other_ms"] else "which is all"
        output.paragraph(f"The twin has billed {meter['metered_ms']} ms: {meter['kept_ms']} ms are in receipts, {others}.")


def _unanswered(total: CostRow) -> str:
    counts = {"failed or were refused": total.failed, "were cancelled": total.cancelled}
    return " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _cells(row: CostRow, rented: bool) -> tuple[str, ...]:
    from remoe_cli.plan.wording import dollars

    money = [row.functions_usd, row.main_usd, *([row.idle_usd] if rented else []), row.usd]
    return (
        row.of or "(no user)",
        f"{row.requests:,}",
        f"{row.prompt_tokens:,} + {row.generated_tokens:,}",
        f"{row.invocations:,}",
        f"{row.cold_starts:,}",
        f"{row.billed_ms / 1000:,.1f}",
        f"{row.gb_seconds:,.1f}",
        *map(dollars, money),
    )
