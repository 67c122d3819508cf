"""The picture of a plan's frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_cli.plan.assess.frontier import Point
from remoe_cli.report.picture import save_picture


def draw_frontier(points: Sequence[Point], path: Path) -> None:
    """Draw cost against TPOT. In the shaded band, the solver has not ruled out a plan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    tpot_ms = [point.tpot_s * 1e3 for point in points]
    panel.step(tpot_ms, [point.cost_usd * 1e6 for point in points], where="post", color="#d95f02", marker="o")
    panel.fill_between(
        tpot_ms, [p.bound_usd * 1e6 for p in points], [p.cost_usd * 1e6 for p in points], step="post", color="#d95f02", alpha=0.2
    )
    for point in points:
        panel.annotate(
            f"{point.remote} remote", (point.tpot_s * 1e3, point.cost_usd * 1e6), fontsize=7, xytext=(3, 4), textcoords="offset points"
        )
    panel.set_xlabel("TPOT, ms")
    panel.set_ylabel("USD per million requests")
    panel.set_title("Least cost of every TPOT", fontsize=10)
    save_picture(figure, path)
