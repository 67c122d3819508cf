"""Show what a deployment would do, as a document and as tables for people. Pure; no call to AWS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import fsum
from typing import Any, get_args

from remoe_cli.deploy.aws import main_function
from remoe_cli.deploy.aws.contents import Contents
from remoe_cli.deploy.aws.functions import Resource, plan_sha256
from remoe_cli.deploy.aws.money import Line, Money
from remoe_cli.deploy.aws.quotas import QuotaCheck, Severity
from remoe_cli.deploy.aws.settings import AwsSettings
from remoe_cli.deploy.aws.template import Templates
from remoe_cli.deploy.console import Overview, Table
from remoe_cli.plan.document import Plan
from remoe_cli.plan.wording import KIND_NAMES, VERDICT_WORDS, amount, bought, capitalized, dollars, figure, seconds

_NAMES = ("FunctionName", "LogGroupName", "EndpointName")


def dry_run(plan: Plan, made: Templates, contents: Contents, quotas: Sequence[QuotaCheck], money: Money) -> dict[str, Any]:
    """Make the document of a first deployment, whose changes are all additions.

    It has `template`, `nested`, `resources`, `cost`, `quotas` and `changes`. `packaged` says whether digests and sizes are those of files,
    or what the plan lets expect.
    """
    lines = {line.resource: line for line in money.lines if line.resource}
    resources = [_row(stack, id, resource, lines.get(id)) for stack, id, resource in _resources(made)]
    return {
        "plan": plan_sha256(plan),
        "packaged": contents.known,
        "template": made.root,
        "nested": dict(made.nested),
        "resources": resources,
        "cost": asdict(money),
        **({"kinds": [one.model_dump(mode="json") for one in plan.kinds]} if plan.kinds else {}),
        "quotas": [asdict(quota) | {"ok": quota.ok} for quota in quotas],
        "changes": [{"action": "add"} | {key: row[key] for key in ("stack", "logical_id", "type", "name")} for row in resources],
    }


def _resources(made: Templates) -> Iterator[tuple[str | None, str, Resource]]:
    """Yield nested stack (None for the root), logical id and resource."""
    for stack, one in ((None, made.root), *made.nested.items()):
        for id, resource in one["Resources"].items():
            yield stack, id, resource


def _row(stack: str | None, id: str, resource: Resource, line: Line | None) -> dict[str, Any]:
    properties = resource["Properties"]
    return {
        "stack": stack,
        "logical_id": id,
        "type": resource["Type"],
        "name": next((properties[key] for key in _NAMES if isinstance(properties.get(key), str)), None),
        "idle_usd_per_month": line.idle_usd_per_month if line else 0.0,
        "usd_per_request": line.usd_per_request if line else 0.0,
    }


def tables(made: Templates, quotas: Sequence[QuotaCheck], money: Money) -> tuple[Table, ...]:
    """Make the same as tables: resources by type, money, and quotas, those in doubt first."""
    counts = Counter(resource["Type"].removeprefix("AWS::") for _, _, resource in _resources(made))
    kinds = tuple((kind, f"{number:,}") for kind, number in sorted(counts.items()))
    order = get_args(Severity)
    rows = tuple(map(_quota_cells, sorted(quotas, key=lambda quota: -order.index(quota.severity))))
    return (
        Table("Resources to add", ("resource", "number"), kinds),
        Table("Costs in USD", ("what", "a month at rest", "a request", "a month of use"), tuple(_money_rows(money))),
        Table("Quotas", ("what", "used", "of", "unit", "verdict"), rows),
    )


def kinds_table(plan: Plan) -> tuple[Table, ...]:
    """Show the best known plan with each kind of main function at the plan's traffic, if there is one."""
    if not plan.kinds or plan.workload.requests_per_hour is None:
        return ()
    rows = tuple(
        (
            KIND_NAMES[one.kind] + (", this plan" if one.kind == plan.main.kind else ""),
            bought(one.spec, one.instances),
            amount(one.cost_usd_per_request, plan.workload),
            seconds(one.ttft_s),
            f"{one.cold_start_s:.0f} s",
            f"{one.tpot_s * 1e3:.4g} ms",
        )
        for one in plan.kinds
    )
    title = f"Kinds of main functions, with the best known plan of each, at {figure(plan.workload.requests_per_hour)} requests an hour"
    return (Table(title, ("main function", "on", "a month", "mean TTFT", "a cold start adds", "TPOT"), rows),)


def rules_table(settings: AwsSettings) -> tuple[Table, ...]:
    """Show what the account's rules add to everything; nothing where there are none."""
    shown = {
        name.replace("_", " "): ", ".join("=".join(each) if isinstance(each, list) else each for each in value)
        if isinstance(value, list)
        else value
        for name, value in settings.rules.document.items()
    }
    return (Table("What the account demands", ("rule", "value"), tuple(shown.items())),) if shown else ()


def _money_rows(money: Money) -> Iterator[tuple[str, ...]]:
    functions = [
        line for line in money.lines if line.planned and line.resource not in (main_function.FUNCTION, main_function.ENDPOINT, None)
    ]
    for line in money.lines:
        if line not in functions:
            yield _cells(line.what, line.idle_usd_per_month, line.usd_per_request, line.usd_per_month)
        elif line is functions[0]:
            months = [f.usd_per_month for f in functions if f.usd_per_month is not None]
            usd = fsum(f.usd_per_request for f in functions)
            yield _cells(f"{len(functions)} expert functions", 0.0, usd, fsum(months) if months else None)
    yield _cells("total", money.idle_usd_per_month, money.usd_per_request, money.usd_per_month)


def _cells(what: str, idle_usd: float, request_usd: float, month_usd: float | None) -> tuple[str, ...]:
    return what, dollars(idle_usd), dollars(request_usd), "-" if month_usd is None else dollars(month_usd)


def _quota_cells(quota: QuotaCheck) -> tuple[str, ...]:
    return quota.name, f"{quota.used:,.0f}", "-" if quota.limit is None else f"{quota.limit:,.0f}", quota.unit, quota.severity


def remarks(plan: Plan, quotas: Sequence[QuotaCheck], money: Money) -> tuple[str, ...]:
    """List the sentences that belong under the tables, first of all whether the plan is worth it."""
    return (
        f"{capitalized(VERDICT_WORDS[plan.verdict])}. {plan.reason}",
        *(f"{quota.name}: {quota.hint}" for quota in quotas if quota.hint),
        *money.notes,
    )


def overview(status: dict[str, Any]) -> Overview:
    """Write a status document for people."""
    above = [
        f"{status['name']} (aws, account {status['account']}, {status['region']}): {status['state']}",
        f"  stack {status['stack']}, last changed by {status['by']} at {status['since']}",
        f"  plan {status['plan']}",
    ]
    if status["hint"]:
        above.append(f"  {status['hint']}")
    if main := status["main"]:
        above.append(f"  main function {main['name']} on {main['kind']}: {main['state']}")
    elif status["state"] == "running":
        above.append(f"  no main function; 'remoe serve {status['name']} --target aws' runs it on this machine")
    rows = tuple((f["name"], str(f["memory_mb"]), f["state"], "; ".join(f["drift"]) or "none") for f in status["functions"])
    tables = (Table("", ("function", "MB", "state", "drift"), rows),) if rows else ()
    return Overview(tables, above=tuple(above))
