"""Memory of the expert functions by Lagrangian duality. Pure numpy that knows no catalog.

Notation: layers l of L; y_l memory of layer l's function in GB; s_l experts of it that one decode token is expected to hit; r_l overhead
of their invocations of one token (t_rem, once however many are hit); H_w USD per second of the main function; c_c USD per GB-second.

**Fit.** One expert takes T(y) = th1 exp(-th2 y) + th3, all positive: least relative squares over a grid of th2, narrowed around its best.

**Problem.** With g_l(y) = (T(y) + r_l / s_l) (H_w + c_c y), written s_l g_l(y) = (s_l T(y) + r_l) (H_w + c_c y) so that s_l may be 0,
  minimise P2 = (1 + eta) sum_l s_l g_l(y_l)   subject to   D = sum_l (s_l T(y_l) + r_l) <= B   and   low_l <= y_l <= high.
g'' = th1 th2 exp(-th2 y) (th2 (H_w + c_c y) - 2 c_c), so g is strictly convex for y > 2 / th2 - H_w / c_c (Theorem 2). T is convex, so is
D: where the box begins there or above, P2 is a convex problem, and has no duality gap if D < B at y = high (Slater).

**Dual.** For lambda >= 0 the Lagrangian P2 + lambda (D - B) falls apart into layers, each with one least y_l(lambda): the zero of
  d_l(y) = (1 + eta) s_l g_l'(y) + lambda s_l T'(y),   s_l g_l' = s_l T' (H_w + c_c y) + c_c (s_l T + r_l),
which increases in y, or the end of the box beyond which that zero lies. D(y(lambda)) falls as lambda rises: lambda = 0 if D <= B there,
else the least lambda at which D <= B. All of it by bisection. Where the box begins below Theorem 2's y (to whose H_w lambda adds
lambda / (1 + eta)), the Lagrangian is concave up to it, and least at `low` or at the zero beyond: y(lambda) is the better of the two, and
there may be a gap.

Source: method.md, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Floats

ETA = 0.1  # prefill time over decode time, at most (the paper's)
_GRID, _NARROWINGS, _HALVINGS, _DOUBLINGS = 60, 6, 52, 60
_LEAST = 1e-9  # of th1 and th3, relative to the shortest time: positive, and nothing


@dataclass(frozen=True)
class Decay:
    """The fitted time of one expert, T(y) = th1 exp(-th2 y) + th3."""

    th1: float
    th2: float
    th3: float

    def seconds(self, y: Floats) -> Floats:
        """Compute T."""
        seconds: Floats = self.th1 * np.exp(-self.th2 * y) + self.th3
        return seconds

    def slope(self, y: Floats) -> Floats:
        """Compute T'."""
        slope: Floats = -self.th1 * self.th2 * np.exp(-self.th2 * y)
        return slope


def fit(y: Floats, seconds: Floats) -> Decay:
    """Fit T to points (y, seconds), all above 0."""
    span = float(y.max() - y.min()) or float(y.max())
    low, high = float(np.log(0.01 / span)), float(np.log(1000 / span))  # from nearly straight to a step between neighbours
    first, last = low, high
    for _ in range(1 + _NARROWINGS):
        th2 = np.exp(np.linspace(low, high, _GRID))
        th1, th3, error = _linear(np.exp(-th2[:, None] * (y - y.min())) / seconds, 1 / seconds)
        best = int(error.argmin())
        step = 2 * (high - low) / (_GRID - 1)
        low, high = max(first, np.log(th2[best]) - step), min(last, np.log(th2[best]) + step)
    return Decay(float(th1[best] * np.exp(th2[best] * y.min())), float(th2[best]), float(th3[best]))


def _linear(falling: Floats, flat: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit th1 and th3 by least squares of th1 falling + th3 flat = 1, neither below `_LEAST`.

    Where the free optimum breaks that limit, the optimum lies on one of the two edges.

    Shapes: th1, th3 and squared error, each [G].
    """
    least = _LEAST / float(flat.max())
    aa, ab, bb = np.square(falling).sum(axis=1), falling @ flat, float(flat @ flat)
    a, b = falling.sum(axis=1), float(flat.sum())
    determinant = np.maximum(aa * bb - ab**2, 1e-12 * aa * bb)
    free = np.stack([(bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant])
    no_th3 = np.stack([np.maximum(least, (a - least * ab) / aa), np.full(len(a), least)])
    no_th1 = np.stack([np.full(len(a), least), np.maximum(least, (b - least * ab) / bb)])
    found = np.stack([free, no_th3, no_th1])  # [3, 2, G]
    errors = np.square(found[:, 0, :, None] * falling + found[:, 1, :, None] * flat - 1).sum(axis=2)
    errors[0, (free < least).any(axis=0)] = np.inf
    best, at = errors.argmin(axis=0), np.arange(len(a))
    return found[best, 0, at], found[best, 1, at], errors[best, at]


def convex_from(decay: Decay, main_usd_per_s: float, usd_per_gb_s: float) -> float:
    """Compute the y above which g is strictly convex (Theorem 2)."""
    return 2 / decay.th2 - main_usd_per_s / usd_per_gb_s if usd_per_gb_s > 0 else -np.inf


@dataclass(frozen=True)
class MemoryProblem:
    """The problem P2. `budget_s` is B, None where there is no target."""

    decay: Decay
    hits: Floats
    overhead_s: Floats
    main_usd_per_s: float
    usd_per_gb_s: float
    low: Floats
    high: float
    budget_s: float | None

    def usd(self, y: Floats) -> Floats:
        """Compute each layer's cost, s_l g_l.

        Shapes: [L].
        """
        return self.layer_s(y) * (self.main_usd_per_s + self.usd_per_gb_s * y)

    def usd_slope(self, y: Floats) -> Floats:
        """Compute the slope of each layer's cost, s_l g_l'."""
        price = self.main_usd_per_s + self.usd_per_gb_s * y
        return self.hits * self.decay.slope(y) * price + self.usd_per_gb_s * self.layer_s(y)

    def layer_s(self, y: Floats) -> Floats:
        """Compute each layer's time, s_l T + r_l.

        Shapes: [L].
        """
        return self.hits * self.decay.seconds(y) + self.overhead_s

    def lagrangian(self, y: Floats, multiplier: float) -> Floats:
        """Compute each layer's part of the Lagrangian, without B.

        Shapes: [L].
        """
        return (1 + ETA) * self.usd(y) + multiplier * self.layer_s(y)

    def lagrangian_slope(self, y: Floats, multiplier: float) -> Floats:
        """Compute its slope, d_l.

        Shapes: [L].
        """
        return (1 + ETA) * self.usd_slope(y) + multiplier * self.hits * self.decay.slope(y)


@dataclass(frozen=True)
class Memory:
    """The memory of each layer's function [L], and lambda.

    meets   False where even y = high breaks the budget; y is then high
    """

    y: Floats
    multiplier: float
    meets: bool


def solve(problem: MemoryProblem) -> Memory:
    """Solve P2 by bisection over lambda."""
    y = _least(problem, 0.0)
    budget = problem.budget_s
    if budget is None or problem.layer_s(y).sum() <= budget:
        return Memory(y, 0.0, True)
    fastest = np.full(len(y), problem.high)
    if problem.layer_s(fastest).sum() > budget:
        return Memory(fastest, np.inf, False)
    low, high = 0.0, problem.main_usd_per_s + problem.usd_per_gb_s * problem.high
    for _ in range(_DOUBLINGS):
        if problem.layer_s(_least(problem, high)).sum() <= budget:
            break
        low, high = high, 8 * high
    else:  # T is so flat there that no multiplier in floating point tells y from `high`
        return Memory(fastest, high, True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if problem.layer_s(_least(problem, middle)).sum() <= budget:
            high = middle
        else:
            low = middle
    return Memory(_least(problem, high), high, True)


def _least(problem: MemoryProblem, multiplier: float) -> Floats:
    """Compute y(lambda)."""
    begin = convex_from(problem.decay, problem.main_usd_per_s + multiplier / (1 + ETA), problem.usd_per_gb_s)
    low, high = np.clip(begin, problem.low, problem.high), np.full(len(problem.hits), problem.high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rising = problem.lagrangian_slope(middle, multiplier) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    better = problem.lagrangian(problem.low, multiplier) <= problem.lagrangian(high, multiplier)
    return np.where(better, problem.low, high)
