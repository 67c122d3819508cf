"""`remoe catalog update`: a copy of a catalog with the prices that AWS publishes today."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remoe_cli.cli import output
from remoe_cli.cli.groups import examples
from remoe_cli.cli.replacing import ReplaceOption, agree_to_replace

if TYPE_CHECKING:
    from remoe_cli.plan.catalog.update import Price

EXAMPLES = examples("remoe catalog update -o prices/aws.toml", "remoe catalog update prices/aws.toml -o prices/aws.toml")


def command(
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The new catalog, such as prices/aws.toml; may be CATALOG's own file.")
    ],
    catalog: Annotated[
        str, typer.Argument(metavar="CATALOG", help="A catalog's name or a .toml file; its hardware and prices are the start.")
    ] = "aws-us-east-1",
    yes: ReplaceOption = False,
    json: output.JsonOption = False,
    quiet: output.QuietOption = False,
) -> None:
    """Copy a catalog with the prices that AWS publishes today. Needs no account.

    Comments and the order of the file are kept.
    """
    from remoe_cli.errors import UsageError
    from remoe_cli.plan.catalog.catalog import read_catalog
    from remoe_cli.plan.catalog.update import refuse_catalog, update

    if out.is_dir() or out.suffix != ".toml":
        raise UsageError(f"{out} is not a file name for a catalog.", "Give the copy a name that ends in .toml, such as catalogs/aws.toml.")
    current = read_catalog(catalog)
    refuse_catalog(current, out)
    if out.resolve() != Path(catalog).resolve():  # else it is named twice, as what shall be updated
        agree_to_replace(yes, out)
    with output.progress("Reading AWS's price lists"):
        updated = update(current, out, say=output.say)
    if missing := updated.not_found:
        output.say(f"Not in AWS's price list, kept as they were: {', '.join(missing)}.")
    document: dict[str, Any] = {
        "path": str(out),
        "published": {f"{service} {region}": day for (service, region), day in updated.published.items()},
        "prices": [{"name": price.name, "old": price.old, "new": price.new} for price in updated.prices],
        "not_found": list(updated.not_found),
    }
    output.result(document, lambda: _show(updated.prices, out))


def _show(prices: tuple[Price, ...], out: Path) -> None:
    output.table("Prices in USD", ("price", "old", "new", "change"), [_row(price) for price in prices])
    output.line(f"The catalog is {out}; 'remoe plan --catalog {out}' uses it.")


def _row(price: Price) -> tuple[str, str, str, str]:
    from remoe_cli.plan.catalog.update import plain

    if price.new is None:
        return price.name, plain(price.old), "not found", "kept"
    change = f"{price.new / price.old - 1:+.1%}" if price.old else "from nothing"
    return price.name, plain(price.old), plain(price.new), "same" if price.new == price.old else change
