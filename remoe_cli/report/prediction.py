"""The picture of an evaluation: the divergence of every predictor, and pairs of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe_cli.predict.evaluate import OURS, Evaluation, Similarity
from remoe_cli.report.picture import save_picture


def draw(evaluations: Sequence[Evaluation], pairs: Similarity, path: Path) -> None:
    """Write the picture, with one panel for each view and one for the pairs of prompts.

    A panel of a view shows every predictor's divergence beside the noise floor; the last one shows semantic against activation similarity.

    Raises: UsageError where `save_picture` does.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(evaluations) + 1), 4), layout="constrained")
    panels = figure.subplots(1, len(evaluations) + 1, squeeze=False)[0]
    for panel, one in zip(panels, evaluations, strict=False):
        order = sorted(one.predictors, key=lambda name: -one.predictors[name].jsd_bits)
        scores = [one.predictors[name] for name in order]
        panel.barh(
            order,
            [score.jsd_bits for score in scores],
            xerr=[2 * score.standard_error for score in scores],
            color=["#d95f02" if name == OURS else "#7f9fbf" for name in order],
            error_kw={"ecolor": "#444444", "capsize": 2},
        )
        panel.axvline(one.noise_floor_bits, color="#444444", linestyle="--", linewidth=1)
        panel.set_title(f"{one.view}, {one.prompts} held-out prompts", fontsize=10)
        panel.set_xlabel("Jensen-Shannon divergence, bits\n(bars: 2 standard errors; dashed: noise floor)", fontsize=8)
    panel = panels[-1]
    panel.hexbin(pairs.semantic, pairs.activation, gridsize=40, bins="log", mincnt=1, cmap="viridis")
    panel.set_title(f"pairs of prompts, r = {pairs.correlation:.2f}", fontsize=10)
    panel.set_xlabel("semantic similarity (cosine of prompt vectors)", fontsize=8)
    panel.set_ylabel("activation similarity (1 - divergence)", fontsize=8)
    save_picture(figure, path)
