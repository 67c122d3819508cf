"""The picture of a plan's frontier, with the plan and its alternatives in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.plan.assess.frontier import Point
from remoe_cli.plan.document import Plan
from remoe_cli.report import style
from remoe_cli.report.charts import price_of, price_unit, priced_others
from remoe_cli.report.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_frontier(points: Sequence[Point], plan: Plan, path: Path) -> None:
    """Draw cost against TPOT: the frontier, the plan, and each alternative that has a price.

    Costs are of a month where the traffic is known, else of a million output tokens. In the shaded band, the solver has not ruled out a
    plan.
    """
    with style.pictures():
        save_picture(frontier_figure(points, plan), path)


def frontier_figure(points: Sequence[Point], plan: Plan) -> Figure:
    """Make the figure of `draw_frontier`. Points without a bound have no band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panel = figure.subplots()
    tpot_ms = [point.tpot_s * 1e3 for point in points]
    fewest, most = (f"{find(point.remote for point in points):,}" for find in (min, max)) if points else ("0", "0")
    label = f"least cost of a TPOT ({fewest} to {most} experts remote)"
    costs = [price_of(plan, point.cost_usd) for point in points]
    panel.step(tpot_ms, costs, where="post", color=style.light("other"), marker="o", markersize=4, label=label)
    if all(point.bound_usd for point in points):
        bounds = [price_of(plan, point.bound_usd) for point in points]
        panel.fill_between(tpot_ms, bounds, costs, step="post", color=style.light("other"), alpha=0.2, linewidth=0)
    here = (plan.tpot_s * 1e3, price_of(plan, plan.cost_usd_per_request))
    panel.plot(*here, "*", color=style.light("plan"), markersize=13, label="this plan", zorder=3)
    for shape, title, one, usd in priced_others(plan):
        (point,) = panel.plot(one.tpot_s * 1e3, usd, style.matplotlib_marker(shape), color=style.light("text"), label=title)
        point.set(fillstyle="none", markersize=8)
    style.log_axes(panel, y="${x:,g}")
    panel.set_xlabel("TPOT, ms")
    panel.set_ylabel(price_unit(plan))
    panel.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure
