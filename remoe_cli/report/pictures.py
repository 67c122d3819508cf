"""Pictures for papers, in the look of the page: one file for each chart that the content has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remoe_cli.plan.arrays import Bools, Floats
from remoe_cli.plan.document import Plan
from remoe_cli.report import style
from remoe_cli.report.charts import BINS, QUANTITIES, STEP_KINDS, figures_of, price_of, price_unit
from remoe_cli.report.cold_start import STEPS
from remoe_cli.report.content import Content
from remoe_cli.report.costs import PARTS, ways_of
from remoe_cli.report.picture import refuse_picture, save_picture
from remoe_cli.report.plan import frontier_figure
from remoe_cli.report.prediction import draw_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE, _SMALL = (7.2, 3.4), (4.4, 3.3)  # inches


def refuse_pictures(folder: Path) -> None:
    """Refuse a folder in which a picture would replace what remoe did not make.

    Raises: UsageError for such a folder.
    """
    for path in picture_paths(folder):
        refuse_picture(path)


def picture_paths(folder: Path) -> list[Path]:
    """List the files that pictures of all kinds would be in a folder."""
    return [folder / f"{name}.png" for name in PICTURES]


def draw_pictures(content: Content, folder: Path) -> list[Path]:
    """Draw every picture that the content has, and list the files.

    Raises: UsageError where `refuse_pictures` does.
    """
    refuse_pictures(folder)
    made = []
    for name, draw in PICTURES.items():
        with style.pictures():
            figure = draw(content)
            if figure is not None:
                save_picture(figure, folder / f"{name}.png")
                made.append(folder / f"{name}.png")
    return made


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _activation(content: Content) -> Figure | None:
    if (routing := content.routing) is None:
        return None
    figure, (panel,) = _figure(_WIDE)
    ratio = routing.uses[0].shares * routing.experts / routing.top_k
    most = routing.octaves
    image = _map(panel, np.log2(np.maximum(ratio, 2.0**-most)), routing.layers, cmap=style.ramp(), vmin=-most, vmax=most)
    bar = figure.colorbar(image, ax=panel, ticks=[-most, 0, most], pad=0.01)
    bar.ax.set_yticklabels([f"1/{2**most} or less", "even use", f"{2**most} × or more"])
    panel.set_title("How often tokens use each expert")
    return figure


def _map(panel: Axes, cells: Floats, layers: tuple[int, ...], **look: Any) -> Any:
    """Draw one value for each expert of each layer; the longer side goes from left to right."""
    across = cells.shape[1] >= cells.shape[0]
    image = panel.imshow(cells if across else cells.T, aspect="auto", interpolation="nearest", **look)
    step = max(1, len(layers) // 12)
    set_ticks = panel.set_yticks if across else panel.set_xticks
    set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panel.set_xlabel("expert" if across else "layer")
    panel.set_ylabel("layer" if across else "expert")
    for spine in panel.spines.values():
        spine.set_visible(False)
    return image


def _placement(content: Content) -> Figure | None:
    if (plan := content.plan) is None:
        return None
    from matplotlib.patches import Patch

    figure, (panel,) = _figure(_WIDE)
    order = None if content.routing is None else np.argsort(-content.routing.uses[0].shares, axis=1, kind="stable")
    if order is not None and order.shape != (len(plan.layers), plan.model.experts_per_layer):
        order = None
    cells = _places(plan) if order is None else np.take_along_axis(_places(plan), order, axis=1)
    _map(panel, np.full(cells.shape, np.nan), tuple(layer.layer for layer in plan.layers))
    shown = cells if cells.shape[1] >= cells.shape[0] else cells.T
    words = ("on the GPU", "in CPU memory", "in expert functions")
    handles = []
    for number, kind in enumerate(("gpu", "cpu", "remote")):
        if count := int((cells == number).sum()):
            look: dict[str, Any] = {"facecolor": style.light(kind), "hatch": style.HATCHES[kind], "linewidth": 0}
            look["edgecolor"] = style.light(_HATCHED[kind])
            panel.add_collection(_runs(shown == number, look))
            handles.append(Patch(label=f"{count:,} {words[number]}", **look))
    if order is not None:
        (panel.set_xlabel if cells.shape[1] >= cells.shape[0] else panel.set_ylabel)("experts, most used first")
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


_HATCHED = {"gpu": "ground", "cpu": "cpu", "remote": "stripe"}


def _runs(there: Bools, look: dict[str, Any]) -> Any:
    """Draw the cells that are there, with each run of a row as one rectangle: a texture then goes on from cell to cell."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = []
    for row, cells in enumerate(there):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], cells, [False]])))
        boxes += [Rectangle((start - 0.5, row - 0.5), end - start, 1) for start, end in zip(ends[::2], ends[1::2], strict=True)]
    return PatchCollection(boxes, **look)


def _places(plan: Plan) -> Floats:
    cells = np.ones((len(plan.layers), plan.model.experts_per_layer))
    for row, layer in zip(cells, plan.layers, strict=True):
        row[list(layer.gpu)], row[list(layer.remote)] = 0, 2
    return cells


def _skew(content: Content) -> Figure | None:
    if (routing := content.routing) is None:
        return None
    figure, (panel,) = _figure(_SMALL)
    x = np.linspace(0, 100, routing.experts + 1)
    curves = routing.skew
    panel.fill_between(x, 100 * curves.least, 100 * curves.most, color=style.light("other"), alpha=0.25, linewidth=0, label="all layers")
    panel.plot(x, 100 * curves.median, color=style.light("plan"), linewidth=2, label="median layer")
    panel.plot([0, 100], [0, 100], color=style.light("soft"), linestyle="--", linewidth=1, label="even use")
    panel.set(xlabel="experts, most used first, %", ylabel="choices, %", xlim=(0, 100), ylim=(0, 101))
    panel.grid()
    panel.legend(loc="lower right")
    return figure


def _pairs(content: Content) -> Figure | None:
    if content.routing is None or content.routing.pairs is None:
        return None
    figure, (panel,) = _figure(_SMALL)
    draw_pairs(panel, content.routing.pairs, BINS)
    return figure


def _predictors(content: Content) -> Figure | None:
    if (found := content.predictors) is None:
        return None
    figure, (panel,) = _figure(_SMALL)
    scores = sorted(found.record.validation_bits.items(), key=lambda item: -item[1])
    winners = [name == found.record.default for name, _ in scores]
    bars = panel.barh([name for name, _ in scores], [bits for _, bits in scores], height=0.62)
    for bar, winner in zip(bars, winners, strict=True):
        bar.set(facecolor=style.light("plan" if winner else "other"), hatch="" if winner else "...", edgecolor=style.light("ground"))
    panel.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    panel.axvline(found.floor_bits, color=style.light("soft"), linestyle="--", linewidth=1.2, label=f"noise floor, {found.floor_bits:.4f}")
    panel.set(xlabel="divergence on held-out prompts, bits", xlim=(0, max(bits for _, bits in scores) * 1.25))
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def _costs(content: Content) -> Figure | None:
    if (plan := content.plan) is None:
        return None
    ways = [way for way in ways_of(plan, content.table) if way.figures.usd is not None][::-1]
    figure, (panel,) = _figure((7.2, 1.3 + 0.42 * len(ways)))
    left = np.zeros(len(ways))
    for name, kind, words in PARTS:
        widths = np.array([price_of(plan, getattr(way.figures, name) or 0.0) for way in ways])
        if widths.any():
            _stack(panel, widths, left, kind, words)
            left += widths
    panel.set_yticks(range(len(ways)), [way.title for way in ways])
    for index, total in enumerate(left.tolist()):
        panel.annotate(f"${total:,.4g}", (total, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set(xlabel=price_unit(plan), xlim=(0, float(left.max()) * 1.16 or 1), ylim=(-0.6, len(ways) - 0.4))
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _stack(panel: Axes, widths: Floats, left: Floats, kind: str, words: str) -> None:
    """Draw one part of stacked bars, with its texture."""
    bars = panel.barh(range(len(widths)), widths, left=left, height=0.62, color=style.light(kind), label=words)
    for bar in bars:
        bar.set(hatch=style.HATCHES[kind], edgecolor=style.light("ground"), linewidth=0.6)


def _frontier(content: Content) -> Figure | None:
    return frontier_figure(content.frontier, content.plan) if content.plan is not None and content.frontier else None


def _break_even(content: Content) -> Figure | None:
    if not content.bursts:
        return None
    drawn = [one for one in content.bursts if not one.own]
    x = [one.burstiness for one in drawn]
    figure, (panel,) = _figure(_SMALL)
    least, most = ([getattr(one.per_hour, end) for one in drawn] for end in ("least", "most"))
    panel.fill_between(x, least, most, color=style.light("other"), alpha=0.25, linewidth=0, label="range of the runs")
    panel.plot(x, [one.per_hour.mean for one in drawn], color=style.light("plan"), linewidth=2, label="both cost the same")
    for one in content.bursts:
        if one.own:
            panel.plot(one.burstiness, one.per_hour.mean, "D", color=style.light("other"), label="the same, at the times of the trace")
    panel.set_yscale("log")
    style.few_ticks(panel.yaxis, "{x:,g}", 8)
    panel.set(xlabel="burstiness (coefficient of variation)", ylabel="requests an hour", xlim=(0, None))
    panel.grid()
    figure.legend(loc="outside upper left")
    return figure


def _cold_starts(content: Content) -> Figure | None:
    if not content.starts:
        return None
    figure, (panel,) = _figure((7.2, 1.3 + 0.45 * len(content.starts)))
    left = np.zeros(len(content.starts))
    for name in STEPS:
        widths = np.array([start.steps_s.get(name, 0.0) for start in content.starts])
        if widths.any():
            kind = STEP_KINDS[name]
            _stack(panel, widths, left, kind, name)
            left += widths
    panel.set_yticks(range(len(left)), [start.what for start in content.starts])
    panel.set(xlabel="seconds", ylim=(len(left) - 0.4, -0.6))
    panel.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _measured(content: Content) -> Figure | None:
    if content.receipts is None:
        return None
    shown = []
    for name, unit, factor, field, of_plan in QUANTITIES:
        found = [
            (one.is_cold, a * factor, b * factor)
            for one in content.receipts.figures
            for a, b in [figures_of(one, field, of_plan)]
            if a and b
        ]
        if found:
            shown.append((f"{name}, {unit}", found))
    if not shown:
        return None
    figure, panels = _figure((3.3 * len(shown), 3.3), len(shown))
    for panel, (title, found) in zip(panels, shown, strict=True):
        ends = np.array([min(min(a, b) for _, a, b in found) / 1.25, max(max(a, b) for _, a, b in found) * 1.25])
        panel.fill_between(ends, ends / 1.2, ends * 1.2, color=style.light("other"), alpha=0.18, linewidth=0)
        panel.plot(ends, ends, color=style.light("soft"), linestyle="--", linewidth=1)
        for cold, mark, colour, words in ((False, "o", "other", "warm"), (True, "x", "plan", "cold")):
            points = [(b, a) for is_cold, a, b in found if is_cold == cold]
            if points:
                panel.plot(*zip(*points, strict=True), mark, color=style.light(colour), markersize=4, alpha=0.7, label=words)
        style.log_axes(panel)
        panel.set(xlim=tuple(ends), ylim=tuple(ends), title=title, xlabel="predicted", ylabel="measured")
        panel.grid(which="major")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


PICTURES: dict[str, Callable[[Content], Figure | None]] = {
    "costs": _costs,
    "placement": _placement,
    "activation": _activation,
    "break-even": _break_even,
    "frontier": _frontier,
    "skew": _skew,
    "pairs": _pairs,
    "predictors": _predictors,
    "cold-start": _cold_starts,
    "measured": _measured,
}
