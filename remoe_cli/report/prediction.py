"""The picture of an evaluation: the divergence of every predictor, and pairs of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.predict.evaluate import OURS, Evaluation
from remoe_cli.predict.pairs import Similarity
from remoe_cli.report import style
from remoe_cli.report.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(evaluations: Sequence[Evaluation], pairs: Similarity, path: Path) -> None:
    """Write the picture, with one panel for each view and one for the pairs of prompts.

    A panel of a view shows every predictor's divergence beside the noise floor; the last one shows semantic against activation similarity.

    Raises: UsageError where `save_picture` does.
    """
    from matplotlib.figure import Figure

    with style.pictures():
        figure = Figure(figsize=(3.7 * (len(evaluations) + 1), 3.8), layout="constrained")
        panels = figure.subplots(1, len(evaluations) + 1, squeeze=False)[0]
        for panel, one in zip(panels, evaluations, strict=False):
            _draw_scores(panel, one)
        draw_pairs(panels[-1], pairs, 40)
        save_picture(figure, path)


def _draw_scores(panel: Axes, one: Evaluation) -> None:
    order = sorted(one.predictors, key=lambda name: -one.predictors[name].jsd_bits)
    scores = [one.predictors[name] for name in order]
    bars = panel.barh(
        order,
        [score.jsd_bits for score in scores],
        xerr=[2 * score.standard_error for score in scores],
        height=0.65,
        error_kw={"ecolor": style.light("text"), "capsize": 2, "elinewidth": 1},
    )
    for bar, name in zip(bars, order, strict=True):
        bar.set_facecolor(style.light("plan" if name == OURS else "other"))
        bar.set_hatch("" if name == OURS else "...")
        bar.set_edgecolor(style.light("ground"))
    panel.axvline(one.noise_floor_bits, color=style.light("text"), linestyle="--", linewidth=1)
    panel.set_title(f"{one.view}, {one.prompts} held-out prompts")
    panel.set_xlabel("divergence, bits (bars: 2 standard errors,\ndashed: noise floor)")
    panel.grid(axis="x")


def draw_pairs(panel: Axes, pairs: Similarity, bins: int) -> None:
    """Draw semantic against activation similarity into a panel."""
    panel.hexbin(pairs.semantic, pairs.activation, gridsize=bins, bins="log", mincnt=1, cmap=style.ramp())
    panel.set_title(f"pairs of prompts, r = {pairs.correlation:.2f}")
    panel.set_xlabel("similarity of meaning\n(cosine of prompt vectors)")
    panel.set_ylabel("similarity of routing (1 - divergence)")
