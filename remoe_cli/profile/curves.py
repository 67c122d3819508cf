"""Fitting the curves of latency_record.py to measured points, by relative error.

No coefficient is negative.

Each form has one or two parameters that are not linear, and up to three coefficients that are. The parameters are searched on a
logarithmic grid, which is then narrowed around its best point. At each grid point the coefficients are non-negative least squares, solved
by trying every set of non-zero coefficients. All grid points are solved at once, and every run gives the same result.

The form to keep is chosen by leaving out one point after the other. How points are measured is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.profile.latency_record import CpuQuota, Curve, Exponential, Linear, MeasuredPoint, Physical, Roofline, Timing

Floats = npt.NDArray[np.float64]
_GRID, _NARROWINGS = 25, 5


@dataclass(frozen=True)
class Form:
    """A form of curve, and how it is fitted to points of n tokens at v vCPUs that took t seconds.

    box       (n, v, t) -> the least and the most of each non-linear parameter
    columns   (parameters [P][G, 1], n, v) -> columns [C][G, points]; their weighted sum predicts t
    curve     (parameters [P], coefficients [C]) -> the curve
    scaled    whether the columns need coefficients; without them their one column predicts t
    """

    box: Callable[[Floats, Floats, Floats], Sequence[tuple[float, float]]]
    columns: Callable[[Sequence[Floats], Floats, Floats], Sequence[Floats]]
    curve: Callable[[Sequence[float], Sequence[float]], Curve]
    scaled: bool = True


EXPONENTIAL = Form(
    box=lambda n, v, t: [(0.02, 50.0), (1e-5, 10.0)],
    columns=lambda p, n, v: [np.exp(-p[0] * v) * (1 + p[1] * (n - 1)), 1 + p[1] * (n - 1) + 0 * v],
    curve=lambda p, c: Exponential(th1_s=c[0], th2=p[0], th3_s=c[1], per_token=p[1]),
)
PHYSICAL = Form(
    box=lambda n, v, t: [],
    columns=lambda p, n, v: [1 + 0 * v, 1 / v, n / v],
    curve=lambda p, c: Physical(overhead_s=c[0], weights_s=c[1], per_token_s=c[2]),
)
# The parameters are the tokens at which computing overtakes reading, and the vCPUs beyond which nothing gets faster.
ROOFLINE = Form(
    box=lambda n, v, t: [(n.min() / 2, n.max() * 2), (v.min(), v.max())],
    columns=lambda p, n, v: [1 + 0 * p[0] * v, np.maximum(1, n / p[0]) / np.minimum(v, p[1])],
    curve=lambda p, c: Roofline(overhead_s=c[0], weights_s=c[1], per_token_s=c[1] / p[0], saturation_vcpus=p[1]),
)


def quota(period_s: float) -> Form:
    """Make the form of one thread under CPU quotas with this period."""

    def columns(p: Sequence[Floats], n: Floats, v: Floats) -> Sequence[Floats]:
        shape = CpuQuota(fixed_s=0.0, per_token_s=0.0, period_s=period_s)
        return [shape.elapsed_s(p[0] + p[1] * n, v)]

    return Form(
        box=lambda n, v, t: [(t.min() / 1e3, t.max()), (t.min() / n.max() / 1e3, (t / n).max())],
        columns=columns,
        curve=lambda p, c: CpuQuota(fixed_s=p[0], per_token_s=p[1], period_s=period_s),
        scaled=False,
    )


def fit(points: Sequence[MeasuredPoint], forms: Sequence[Form]) -> Timing:
    """Choose the form that predicts left-out points best, and fit it to all points.

    The best form has the least geometric mean of the factors by which it misses points. A median would not notice that a form is wrong by
    a factor of ten at the few points that a small CPU quota makes slow. Of equal forms the first is taken.
    """
    n, v, t = (np.array([getattr(p, name) for p in points], dtype=np.float64) for name in ("tokens", "vcpus", "seconds"))
    curves = [_fit(form, n, v, t) for form in forms]
    ratios = [_held_out(form, n, v, t) / t for form in forms]
    errors = [float(np.exp(np.abs(np.log(np.maximum(r, 1e-9))).mean()) - 1) for r in ratios]
    kept = int(np.argmin(errors))
    residuals = curves[kept].seconds(n, v) / t - 1
    return Timing(
        curve=curves[kept],
        held_out_error=float(np.median(np.abs(ratios[kept] - 1))),
        errors={str(curve.form): error for curve, error in zip(curves, errors, strict=True)},
        points=tuple(points),
        residuals=tuple(float(r) for r in residuals),
    )


def fit_linear(tokens: Sequence[int], seconds: Sequence[float]) -> Linear:
    """Fit fixed + per_token * n by relative error."""
    n, t = np.array(tokens, dtype=np.float64), np.array(seconds)
    coefficients, _ = _nonnegative(np.stack([1 / t, n / t])[None])
    return Linear(fixed_s=float(coefficients[0, 0]), per_token_s=float(coefficients[0, 1]))


def _held_out(form: Form, n: Floats, v: Floats, t: Floats) -> Floats:
    """Predict each point from all the others."""
    predicted = []
    for left_out in range(len(t)):
        others = np.arange(len(t)) != left_out
        predicted.append(float(_fit(form, n[others], v[others], t[others]).seconds(n[left_out], v[left_out])))
    return np.array(predicted)


def _fit(form: Form, n: Floats, v: Floats, t: Floats) -> Curve:
    lows, highs = (np.log([bound[side] for bound in form.box(n, v, t)]) for side in (0, 1))
    low, high = lows, highs
    for _ in range(1 + _NARROWINGS):
        axes = [np.linspace(a, b, _GRID) for a, b in zip(low, high, strict=True)]
        grid = [np.exp(axis.reshape(-1, 1)) for axis in np.meshgrid(*axes, indexing="ij")] if axes else []
        shape = (_GRID ** len(grid), len(t))
        columns = np.stack([np.broadcast_to(column, shape) for column in form.columns(grid, n, v)], axis=1) / t
        coefficients, error = _nonnegative(columns) if form.scaled else _as_they_are(columns)
        best = int(error.argmin())
        chosen = [float(p[best, 0]) for p in grid]
        half = (high - low) / (_GRID - 1) * 2  # two steps of this grid to either side hold the optimum of a smooth error
        low, high = np.maximum(lows, np.log(chosen) - half), np.minimum(highs, np.log(chosen) + half)
    return form.curve(chosen, [float(c) for c in coefficients[best]])


def _as_they_are(columns: Floats) -> tuple[Floats, Floats]:
    """Do what `_nonnegative` does for one column that needs no coefficient."""
    return np.ones((len(columns), 1)), np.square(columns[:, 0] - 1).sum(axis=1)


def _nonnegative(columns: Floats) -> tuple[Floats, Floats]:
    """Find the non-negative weights whose sum of columns is nearest to 1, and its squared error.

    Shapes: columns [G, C, points] of G problems; returns [G, C] and [G].
    """
    problems, count, points = columns.shape
    best, error = np.zeros((problems, count)), np.full(problems, float(points))
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            scaled = columns[:, chosen]
            scale = np.linalg.norm(scaled, axis=2, keepdims=True) + 1e-300
            scaled = scaled / scale
            # A little ridge gives columns that are alike (one quota was measured only) a solution.
            gram = scaled @ scaled.swapaxes(1, 2) + 1e-12 * np.eye(size)
            solved: Any = np.linalg.solve(gram, scaled.sum(axis=2, keepdims=True))
            missed = np.square((solved * scaled).sum(axis=1) - 1).sum(axis=1)
            better = (solved[..., 0] >= 0).all(axis=1) & (missed < error)
            error[better] = missed[better]
            best[np.ix_(better, chosen)] = (solved / scale)[better, :, 0]
            others = [c for c in range(count) if c not in chosen]
            best[np.ix_(better, others)] = 0.0
    return best, error
