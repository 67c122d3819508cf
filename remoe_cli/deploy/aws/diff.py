"""Show the changes of a deployment, each with its money, as a table for people. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from remoe_cli.deploy.aws.money import Money
from remoe_cli.deploy.aws.stack import Change
from remoe_cli.deploy.console import Table
from remoe_cli.plan.wording import dollars

_SIGNS = {"Add": "+", "Modify": "~", "Remove": "-"}


def table(changes: Sequence[Change], money: Money) -> Table:
    """Make the table: one row for each change that costs something, one for each group of equal changes.

    Costs that belong to no resource of the templates come last, and then the sum.
    """
    columns = ("change", "type", "what changes", "a month at rest", "a request")
    return Table("Changes and costs in USD", columns, (*_rows(changes, money), *_beside(money)))


def _rows(changes: Sequence[Change], money: Money) -> Iterator[tuple[str, ...]]:
    lines = {line.resource: line for line in money.lines if line.resource}
    alike: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for change in changes:
        sign = f"{_SIGNS.get(change.action, '?')}{' (replaced)' if change.replaced else ''}"
        kind, what = change.kind.removeprefix("AWS::"), ", ".join(change.what)
        line = lines.get(change.name)
        if line and change.action != "Remove":
            yield f"{sign} {change.name}", kind, what, dollars(line.idle_usd_per_month), dollars(line.usd_per_request)
        else:
            alike[sign, kind, what].append(change.name)
    for (sign, kind, what), names in alike.items():
        yield f"{sign} {names[0] if len(names) == 1 else f'{len(names)} of these'}", kind, what, "", ""


def _beside(money: Money) -> Iterator[tuple[str, ...]]:
    for line in money.lines:
        if line.resource is None:
            yield f"  {line.what}", "", "", dollars(line.idle_usd_per_month), dollars(line.usd_per_request)
    yield "  whole deployment", "", "", dollars(money.idle_usd_per_month), dollars(money.usd_per_request)
