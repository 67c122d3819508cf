"""The charts of a page, as SVG with a legend and the same figures as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from remoe_cli.plan.assess.frontier import Point
from remoe_cli.plan.document import Baseline, Plan, Unquantised
from remoe_cli.plan.explain.alternatives import beside
from remoe_cli.plan.wording import bought, capitalized, dollars, month_usd, seconds, token_usd
from remoe_cli.predict.pairs import Similarity
from remoe_cli.report import svg
from remoe_cli.report.cold_start import STEPS, Start
from remoe_cli.report.content import Predictors
from remoe_cli.report.inputs import ReceiptFigures
from remoe_cli.report.routing import Routing
from remoe_cli.report.style import markers
from remoe_cli.simulate.break_even import BreakEvenBursts
from remoe_cli.simulate.wording import cheaper_text, runs_text, traffic_text

BINS = 28  # of a chart of pairs, each way
MOST_MARKS = 2000
STEP_KINDS = dict(zip(STEPS, ("idle", "fees", "cpu", "remote"), strict=True))
QUANTITIES = (  # name, unit, factor to it, and the field of a receipt and of its prediction
    ("TTFT", "s", 1.0, "ttft_s", "ttft_s"),
    ("TPOT", "ms", 1e3, "tpot_s", "tpot_s"),
    ("cost", "USD a million", 1e6, "usd", "cost_usd_per_request"),
)


def skew(routing: Routing) -> str:
    """Draw how many choices go to how many experts."""
    x = svg.linear("share of the experts, most used first", 0, 100, "{:g}%")
    y = svg.linear("share of the choices", 0, 100, "{:g}%")
    places = [x.x(100 * index / routing.experts) for index in range(routing.experts + 1)]
    least, median, most = (
        [(place, y.y(100 * share)) for place, share in zip(places, curve.tolist(), strict=True)]
        for curve in (routing.skew.least, routing.skew.median, routing.skew.most)
    )
    even = svg.line([(x.x(0), y.y(0)), (x.x(100), y.y(100))], "even")
    half = routing.skew.half()
    words = f"In the median layer {half} of {routing.experts} experts take half of all choices"
    rows = [
        (
            f"{100 * at / routing.experts:.0f}%",
            *(f"{100 * curve[at]:.1f}%" for curve in (routing.skew.least, routing.skew.median, routing.skew.most)),
        )
        for at in sorted({round(routing.experts * share) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)} - {0})
    ]
    return (
        svg.chart("Skew", x, y, [svg.area(most, least, "other"), even, svg.line(median, "plan")], words)
        + svg.legend(
            (("line", "plan", "median layer"), ("box", "other soft", "least to most skewed layer"), ("dashed", "even", "even use"))
        )
        + svg.details("Figures", svg.table("Share of the choices", ("most used experts", "least skewed", "median", "most skewed"), rows))
    )


def pairs(found: Similarity) -> str:
    """Draw pairs of prompts: similarity of meaning against similarity of routing."""
    counts, x_edges, y_edges = np.histogram2d(found.semantic, found.activation, bins=BINS)
    x = svg.linear("similarity of meaning (cosine of prompt vectors)", float(x_edges[0]), float(x_edges[-1]))
    y = svg.linear("similarity of routing (1 - divergence, bits)", float(y_edges[0]), float(y_edges[-1]))
    marks = []
    most = float(np.log1p(counts.max()))
    for column, row in zip(*np.nonzero(counts), strict=True):
        left, right, low, high = x.x(x_edges[column]), x.x(x_edges[column + 1]), y.y(y_edges[row]), y.y(y_edges[row + 1])
        count = int(counts[column, row])
        share = 0.12 + 0.88 * float(np.log1p(count)) / most
        marks.append(
            f'<g class="box dense" opacity="{share:.2f}"><rect x="{left:.1f}" y="{high:.1f}" width="{right - left:.1f}" '
            f'height="{low - high:.1f}"/><title>{count} pairs</title></g>'
        )
    means = [
        (x.x((x_edges[at] + x_edges[at + 1]) / 2), y.y(float(found.activation[inside].mean())))
        for at in range(BINS)
        if (inside := (found.semantic >= x_edges[at]) & (found.semantic <= x_edges[at + 1])).sum() >= 20
    ]
    return svg.chart(
        "Pairs of prompts", x, y, [*marks, svg.line(means, "plan")], f"The correlation is {found.correlation:.2f}"
    ) + svg.legend((("box", "dense", f"pairs of prompts (of {len(found.semantic):,}; darker: more)"), ("line", "plan", "mean")))


def predictors(found: Predictors) -> str:
    """Draw the divergence of each predictor beside the noise floor."""
    scores = sorted(found.record.validation_bits.items(), key=lambda item: item[1])
    most = max(*(bits for _, bits in scores), found.floor_bits) * 1.2
    left, right, step, top = 92, 60, 34, 8
    height = top + step * len(scores) + 40

    def place(bits: float) -> float:
        return left + bits / most * (svg.WIDTH - left - right)

    marks = []
    for index, (name, bits) in enumerate(scores):
        y = top + index * step
        marks.append(svg.text(left - 8, y + 18, name, "end"))
        marks.append(svg.box(left, y + 4, place(bits) - left, step - 12, "winner" if name == found.record.default else "rival"))
        marks.append(svg.text(place(bits) + 6, y + 18, f"{bits:.4f}"))
    bottom = top + step * len(scores)
    marks.append(f'<path class="axis" d="M{left} {top}V{bottom}"/>')
    marks.append(svg.line([(place(found.floor_bits), top), (place(found.floor_bits), bottom)], "even"))
    marks.append(svg.text(left, bottom + 18, "divergence of the prediction, bits (less is better)", "label"))
    words = ", ".join(f"{name} {bits:.4f} bits" for name, bits in scores)
    entries = (
        ("box", "winner", "used for this profile"),
        ("box", "rival", "others"),
        ("dashed", "even", f"noise floor, {found.floor_bits:.4f}: what a perfect prediction would score"),
    )
    return svg.picture("Predictors", words, svg.WIDTH, height, marks) + svg.legend(entries)


def price_of(plan: Plan, usd: float) -> float:
    """Compute the cost of a month where the traffic is known, else of a million output tokens."""
    month = month_usd(usd, plan.workload)
    return token_usd(usd, plan.workload) if month is None else month


def price_unit(plan: Plan) -> str:
    """Name the unit of `price_of`."""
    return "USD per million output tokens" if plan.workload.requests_per_hour is None else "USD a month"


def priced_others(plan: Plan) -> list[tuple[str, str, Baseline | Unquantised, float]]:
    """List (marker, title, what it is, price) of all beside the plan that has a price."""
    shown = [(title, one, one.cost_usd_per_request) for title, one in beside(plan).items() if one.cost_usd_per_request is not None]
    return [(shape, title, one, price_of(plan, usd)) for shape, (title, one, usd) in zip(markers(len(shown)), shown, strict=True)]


def frontier(points: Sequence[Point], plan: Plan) -> str:
    """Draw cost against TPOT: the frontier, the plan and its baselines."""
    others = priced_others(plan)
    here = (plan.tpot_s * 1e3, price_of(plan, plan.cost_usd_per_request))
    of_points = [(point.tpot_s * 1e3, price_of(plan, point.cost_usd)) for point in points]
    all_places = [*of_points, here, *((one.tpot_s * 1e3, usd) for _, _, one, usd in others)]
    x = svg.logarithmic("TPOT, ms", [at for at, _ in all_places])
    y = svg.logarithmic(price_unit(plan), [usd for _, usd in all_places], "$")
    steps: list[tuple[float, float]] = []
    for tpot, usd in of_points:
        steps += [(x.x(tpot), steps[-1][1])] if steps else []
        steps.append((x.x(tpot), y.y(usd)))
    marks = [svg.line(steps, "other")] if len(steps) > 1 else []
    for (tpot, usd), point in zip(of_points, points, strict=True):
        hint = f"{tpot:.4g} ms, {dollars(usd)}: {point.remote:,} experts remote, main function on {point.main}"
        marks.append(svg.marker(x.x(tpot), y.y(usd), "dot", "warm", hint))
    for shape, title, one, usd in others:
        hint = f"{title}: {one.tpot_s * 1e3:.4g} ms, {dollars(usd)} on {bought(one.spec, one.instances)}"
        marks.append(svg.marker(x.x(one.tpot_s * 1e3), y.y(usd), shape, "other", hint))
    marks.append(svg.marker(x.x(here[0]), y.y(here[1]), "star", "plan", f"this plan: {here[0]:.4g} ms, {dollars(here[1])}"))
    entries = [("star", "plan", "this plan"), ("line", "other", "least cost of each TPOT, by the scan")]
    entries += [(shape, "other", title) for shape, title, _, _ in others]
    rows = [
        (f"{point.tpot_s * 1e3:.4g} ms", dollars(price_of(plan, point.cost_usd)), seconds(point.ttft_s), f"{point.remote:,}", point.main)
        for point in points
    ]
    columns = ("TPOT", price_unit(plan), "TTFT", "remote experts", "main function")
    words = f"This plan has a TPOT of {here[0]:.4g} ms at {dollars(here[1])}"
    return (
        svg.chart("Cost of each TPOT", x, y, marks, words)
        + svg.legend(entries)
        + svg.details("Figures", svg.table("Least cost of each TPOT", columns, rows))
    )


def bursts(found: Sequence[BreakEvenBursts], plan: Plan | None) -> str:
    """Draw the traffic up to which the plan is cheaper than what is always on, against burstiness."""
    drawn, trace = [one for one in found if not one.own], next((one for one in found if one.own), None)
    per_hour = None if plan is None else plan.workload.requests_per_hour
    x = svg.linear("burstiness of the requests", 0, max(one.burstiness for one in found) * 1.05)
    known = [traffic for one in found for traffic in (one.per_hour.least, one.per_hour.most)]
    y = svg.logarithmic("requests an hour", [*known, *([per_hour] if per_hour else [])])
    least, mean, most = ([(x.x(one.burstiness), y.y(getattr(one.per_hour, at))) for one in drawn] for at in ("least", "mean", "most"))
    marks, entries = [svg.area(most, least, "other"), svg.line(mean, "plan")], [("line", "plan", "both cost the same")]
    if trace is not None:
        marks.append(svg.marker(x.x(trace.burstiness), y.y(trace.per_hour.mean), "diamond", "other", f"{trace.per_hour.mean:.4g} an hour"))
        entries.append(("diamond", "other", "both cost the same at the times of the trace"))
    if per_hour:
        marks.append(svg.marker(x.x(trace.burstiness if trace else 1.0), y.y(per_hour), "star", "plan", f"{per_hour:.4g} an hour"))
        entries.append(("star", "plan", "the plan's traffic"))
    columns = ("burstiness", "cheaper up to, an hour", "single runs", "TTFT there, p50 / p99", "always on", "its TTFT, p50 / p99")
    return (
        svg.chart("Break-even traffic", x, y, marks, bursts_sentence(found))
        + svg.legend(entries)
        + svg.details("Figures", svg.table("Traffic at which both cost the same", columns, map(_bursts_row, found)))
    )


def _bursts_row(one: BreakEvenBursts) -> tuple[str, ...]:
    ttft, other = (" / ".join(seconds(each) if each == each else "-" for each in pair) for pair in (one.ttft_s, one.against_ttft_s))
    name = f"{one.burstiness:.3g}{', of the trace' if one.own else ''}"
    return (name, traffic_text(one), runs_text(one), ttft, one.against or "nothing", other)


def bursts_sentence(found: Sequence[BreakEvenBursts]) -> str:
    """Say up to which traffic the plan is cheaper: at random, in bursts, and at a trace's times."""
    at_random = next(one for one in found if one.burstiness == 1 and not one.own)
    in_bursts, trace = max((one for one in found if not one.own), key=lambda one: one.burstiness), [one for one in found if one.own]
    asked = [("at random", at_random), (f"in bursts (burstiness {in_bursts.burstiness:g})", in_bursts)]
    asked += [(f"at the times of the trace (burstiness {one.burstiness:.2g})", one) for one in trace]
    return capitalized("; ".join(f"where requests come {how}, {cheaper_text(one)}" for how, one in asked) + ".")


def cold_starts(starts: Sequence[Start]) -> str:
    """Draw what each cold start consists of."""
    most = max(start.total_s for start in starts)
    step, bar = 54, 22
    marks = []
    for index, start in enumerate(starts):
        y = index * step
        marks.append(svg.text(0, y + 14, f"{start.what}: {seconds(start.total_s)}"))
        left = 0.0
        for name in STEPS:
            if taken := start.steps_s.get(name, 0.0):
                width = taken / most * (svg.WIDTH - 2)
                marks.append(svg.box(left, y + 20, width, bar, STEP_KINDS[name], f"{name}: {taken:.3g} s"))
                left += width
    present = [name for name in STEPS if any(start.steps_s.get(name) for start in starts)]
    rows = [(start.what, *(f"{start.steps_s.get(name, 0.0):.3g} s" for name in present), f"{start.total_s:.3g} s") for start in starts]
    words = "; ".join(f"{start.what} {seconds(start.total_s)}" for start in starts)
    return (
        svg.picture("Cold starts", words, svg.WIDTH, step * len(starts), marks)
        + svg.legend(("box", STEP_KINDS[name], name) for name in present)
        + svg.details("Figures", svg.table("Seconds of each step", ("", *present, "all"), rows))
    )


def measured(receipts: Sequence[ReceiptFigures]) -> Iterator[str]:
    """Draw each quantity of the receipts as predicted against measured; nothing where no receipt has both."""
    shown = [receipts[round(at)] for at in np.linspace(0, len(receipts) - 1, min(len(receipts), MOST_MARKS))]
    for name, unit, factor, field, of_plan in QUANTITIES:
        both = [(one.is_cold, a * factor, b * factor) for one in shown for a, b in [figures_of(one, field, of_plan)] if a and b]
        if not both:
            continue
        values = [value for _, a, b in both for value in (a, b)]
        x, y = (svg.logarithmic(f"{label}, {unit}", values) for label in ("predicted", "measured"))
        low, high = x.low, x.high
        marks = [
            svg.area(
                [(x.x(low), y.y(low * 1.2)), (x.x(high / 1.2), y.y(high))], [(x.x(low * 1.2), y.y(low)), (x.x(high), y.y(high / 1.2))], ""
            )
        ]
        marks.append(svg.line([(x.x(low), y.y(low)), (x.x(high), y.y(high))], "even"))
        for is_cold, one, other in both:
            marks.append(
                svg.marker(
                    x.x(other), y.y(one), "cross" if is_cold else "dot", "cold" if is_cold else "warm", f"{one:.4g}, predicted {other:.4g}"
                )
            )
        ratio = float(np.median([one / other for _, one, other in both]))
        yield f"<h3>{name}</h3>" + svg.chart(
            f"{name}, predicted against measured", x, y, marks, f"Measured is {ratio:.2f} times predicted in the median"
        )


def figures_of(receipt: ReceiptFigures, field: str, of_plan: str) -> tuple[float | None, float | None]:
    """Read a measured figure and the predicted one."""
    return getattr(receipt, field), None if receipt.predicted is None else getattr(receipt.predicted, of_plan)


def measured_rows(receipts: Sequence[ReceiptFigures]) -> Iterator[tuple[str, ...]]:
    """Write the medians of measured and predicted, their ratio, and what 95% keep, of each quantity.

    Requests without a prediction count only where none has one, and those without an answer never.
    """
    for name, unit, factor, field, of_plan in QUANTITIES:
        found = [(one.is_cold, *figures_of(one, field, of_plan)) for one in receipts if one.answered]
        for words, cold in (("warm", False), ("cold", True)):
            both = [(a, b) for is_cold, a, b in found if a and b and is_cold == cold]
            alone = [a for is_cold, a, _ in found if a is not None and is_cold == cold]
            # Where there are predictions, both columns are of the same requests.
            values = [a * factor for a in ([a for a, _ in both] or alone)]
            if not values:
                continue
            predicted = f"{np.median([b for _, b in both]) * factor:.4g}" if both else "-"
            ratio = f"{np.median([a / b for a, b in both]):.2f}" if both else "-"
            yield (
                f"{name}, {unit}, {words}",
                f"{len(values):,}",
                f"{np.median(values):.4g}",
                predicted,
                ratio,
                f"{np.percentile(values, 95):.4g}",
            )
