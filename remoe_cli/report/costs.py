"""The section of costs: the plan beside its baselines, and sliders that recompute both in the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from remoe_cli.plan.document import Baseline, Plan
from remoe_cli.plan.explain.alternatives import beside
from remoe_cli.plan.wording import amount, bought, capitalized, dollars, figure, seconds
from remoe_cli.report import svg
from remoe_cli.report.charts import price_of, price_unit
from remoe_cli.report.what_if import THIS_PLAN, Figures, Setting, Table, evaluate

# Parts of a bar, in its order: the field of Figures, its texture, its words.
PARTS = (
    ("busy_usd", "cpu", "main function, at work"),
    ("functions_usd", "remote", "expert functions"),
    ("idle_usd", "idle", "rented hours without work"),
    ("fees_usd", "fees", "fees and reads of S3"),
)
TRAFFIC_STEPS = (0, 120)  # of its slider: 10 ** (step / 20 - 1) requests an hour


@dataclass(frozen=True)
class Way:
    """The plan or a baseline, as a row of the section."""

    title: str
    spec: str
    ideal: bool
    figures: Figures


def ways_of(plan: Plan, table: Table | None) -> list[Way]:
    """List the plan and what is beside it; without a table a cost has fewer parts."""
    if table is not None:
        found = evaluate(table, Setting(per_hour=table.per_hour))
        copies = () if table.unquantised is None else (table.unquantised.main,)
        return [Way(each.title, each.spec, each.ideal, found[each.title]) for each in (table.main, *copies, *table.baselines)]
    functions_usd = sum(plan.costs.layers_usd)
    own = Figures(plan.ttft_s, plan.tpot_s, plan.instances, plan.costs.main_usd, 0.0, functions_usd, 0.0)
    return [Way(THIS_PLAN, plan.main.name, False, own)] + [
        Way(
            title,
            bought(one.spec),
            isinstance(one, Baseline) and one.ideal,
            Figures(one.ttft_s, one.tpot_s, one.instances, one.cost_usd_per_request, 0.0, 0.0, 0.0),
        )
        for title, one in beside(plan).items()
    ]


def section(plan: Plan, table: Table | None) -> str:
    """Write the inner part of the section."""
    ways = ways_of(plan, table)
    most = max((way.figures.usd or 0.0 for way in ways), default=0.0) or 1.0
    body = "".join(_row(index, way, most, plan, table) for index, way in enumerate(ways))
    head = "".join(
        f'<th scope="col"{more}>{svg.escape(name)}</th>'
        for name, more in (("", ""), ("cost, stacked", ""), (price_unit(plan), " data-unit"), ("TTFT", ""), ("TPOT", ""))
    )
    present = [part for part in PARTS if table is not None or any(getattr(way.figures, part[0]) for way in ways)]
    parts_rows = [(way.title, *(_part(way, name, plan) for name, _, _ in present)) for way in ways if way.figures.usd is not None]
    columns = ("", *(words for _, _, words in present))
    rows = (
        '<table class="costs" role="table"><caption>The plan beside everything else that could run the model</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>'
        + svg.legend(("box", kind, words) for _, kind, words in present)
        + svg.details("Parts of the costs, as planned", svg.table(price_unit(plan), columns, parts_rows))
    )
    return rows if table is None else _sliders(table) + rows


def traffic(plan: Plan, table: Table) -> str:
    """Write the chart of cost against traffic, which page.js fills."""
    entries = [("line", "plan", THIS_PLAN)]
    entries += [] if table.unquantised is None else [("line", "copy", table.unquantised.main.title)]
    entries += [("line", "ideal" if one.ideal else f"d{index}", one.title) for index, one in enumerate(table.baselines)]
    words = (
        "Cost of a month against requests an hour, of this plan and of each baseline. The table of costs has the figures of one traffic."
    )
    return f'<svg id="traffic" viewBox="0 0 400 290" role="img" aria-label="{svg.escape(words)}"></svg>' + svg.legend(entries)


def _part(way: Way, name: str, plan: Plan) -> str:
    usd = getattr(way.figures, name) or 0.0
    return dollars(price_of(plan, usd)) if usd > 0 else "-"


def _row(index: int, way: Way, most: float, plan: Plan, table: Table | None) -> str:
    figures, left, boxes = way.figures, 0.0, ""
    for name, kind, _ in PARTS:
        share = 100 * (getattr(figures, name) or 0.0) / most if figures.usd is not None else 0.0
        place = f'x="{left:.3f}%" width="{share:.3f}%" height="22"'
        textured = f'<rect {place} class="texture {kind}"/>' if kind in ("remote", "idle") else ""
        boxes += f'<g class="box {kind}" data-part="{name.removesuffix("_usd")}"><rect {place}/>{textured}</g>'
        left += share
    usd = "no price without traffic" if figures.usd is None else amount(figures.usd, plan.workload)
    count = f"{figures.instances} × " if figures.instances > 1 else ""
    kind = "this" if index == 0 else "ideal" if way.ideal else "other"
    cells = (("usd", "cost", usd), ("ttft", "TTFT", seconds(figures.ttft_s)), ("tpot", "TPOT", f"{figure(figures.tpot_s * 1e3)} ms"))
    return (
        f'<tr role="row" id="way-{index}" class="{kind}"><th role="rowheader" scope="row">{svg.escape(capitalized(way.title))}'
        f"<span><i data-instances>{count}</i><i data-spec>{svg.escape(way.spec)}</i></span></th>"
        f'<td role="cell" class="bars"><svg aria-hidden="true">{boxes}</svg></td>'
        + "".join(f'<td role="cell" data-name="{name}" data-value="{value}">{svg.escape(text)}</td>' for value, name, text in cells)
        + "</tr>"
    )


def _sliders(table: Table) -> str:
    step = -1 if table.per_hour is None else min(max(round(20 * (math.log10(table.per_hour) + 1)), TRAFFIC_STEPS[0]), TRAFFIC_STEPS[1])
    first = -1 if table.per_hour is None else TRAFFIC_STEPS[0]
    rows = [("traffic", "Traffic", first, TRAFFIC_STEPS[1], step)]
    if table.bill.calls:
        rows = [("price", "Price of expert functions", -30, 30, 0), ("overhead", "Round trip of a call (overhead)", -40, 40, 0), *rows]
    if len(numbers := table.numbers) > 1:
        rows.append(("concurrency", "Requests at once", 0, len(numbers) - 1, numbers.index(table.concurrency)))
    hidden = {"price", "overhead", "concurrency"} - {name for name, *_ in rows}
    return (
        '<p class="screen">Move the sliders: the page works out costs and times again with the formulas of the planner, for these experts '
        "where they are. Another placement may then be the best one; <code>remoe plan</code> finds it.</p>"
        '<div class="sliders">'
        + "".join(_slider(*row) for row in rows)
        + "</div>"
        + "".join(f'<input type="hidden" id="slider-{name}" value="0">' for name in sorted(hidden))
        + '<p class="now" id="now" role="status"></p><p class="controls"><button type="button" id="reset">As planned</button></p>'
        + "".join(f'<p class="small">{svg.escape(text)}</p>' for text in _kept(table))
    )


def _slider(name: str, words: str, low: int, high: int, value: int) -> str:
    return (
        f'<label for="slider-{name}"><span>{svg.escape(words)}</span><output for="slider-{name}"></output>'
        f'<input type="range" id="slider-{name}" min="{low}" max="{high}" step="1" value="{value}"></label>'
    )


def _kept(table: Table) -> Iterator[str]:
    """Say what does not follow the sliders of traffic and of requests at once."""
    if table.cold_after_s is None:
        yield f"The share of cold requests stays that of the plan, {table.cold_share:.1%}, at any traffic."
    if table.waking is not None and table.wake is None:
        yield "How often an instance that scales to zero wakes stays as in the plan's trace, at any traffic."
    if table.others and all(one.main.at_once == 1 for one in (table, *table.others)):
        yield f"{table.main.spec} answers one request at a time and starts another instance for the next one: only what is rented follows."
    if table.most:
        yield table.most
