"""The picture of a plan's frontier, with the plan and its alternatives in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_cli.plan.assess.frontier import Point
from remoe_cli.plan.document import Plan
from remoe_cli.plan.explain.rows import BASELINE_TITLES, unlike_baselines
from remoe_cli.plan.wording import month_usd, token_usd
from remoe_cli.report.picture import save_picture

_FRONTIER, _PLAN, _OTHERS = "#d95f02", "#1b1b1b", "#1f78b4"  # also told apart in grey, by their markers
_MARKERS = ("s", "^", "D", "v", "P")


def draw_frontier(points: Sequence[Point], plan: Plan, path: Path) -> None:
    """Draw cost against TPOT: the frontier, the plan, and each alternative that has a price.

    Costs are of a month where the traffic is known, else of a million output tokens. In the shaded band, the solver has not ruled out a
    plan.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    def cost(usd_per_request: float) -> float:
        month = month_usd(usd_per_request, plan.workload)
        return token_usd(usd_per_request, plan.workload) if month is None else month

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    tpot_ms = [point.tpot_s * 1e3 for point in points]
    fewest, most = (f"{find(point.remote for point in points):,}" for find in (min, max)) if points else ("0", "0")
    label = f"least cost of a TPOT ({fewest} to {most} experts remote)"
    panel.step(tpot_ms, [cost(point.cost_usd) for point in points], where="post", color=_FRONTIER, marker="o", markersize=4, label=label)
    band = ([cost(point.bound_usd) for point in points], [cost(point.cost_usd) for point in points])
    panel.fill_between(tpot_ms, *band, step="post", color=_FRONTIER, alpha=0.2)
    panel.plot(plan.tpot_s * 1e3, cost(plan.cost_usd_per_request), "*", color=_PLAN, markersize=13, label="this plan")
    for marker, (name, way) in zip(_MARKERS, unlike_baselines(plan).items(), strict=False):
        if way.cost_usd_per_request is not None:
            at = (way.tpot_s * 1e3, cost(way.cost_usd_per_request))
            panel.plot(*at, marker, color=_OTHERS, fillstyle="none", markersize=8, label=BASELINE_TITLES[name])
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis, form in ((panel.xaxis, "{x:g}"), (panel.yaxis, "${x:,g}")):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("TPOT, ms")
    panel.set_ylabel("USD per million output tokens" if plan.workload.requests_per_hour is None else "USD a month")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=7, frameon=False, loc="best")
    save_picture(figure, path)
