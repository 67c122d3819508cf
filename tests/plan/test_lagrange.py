"""Memory of the functions as a convex problem: the fit, Theorem 2, the conditions of Karush, Kuhn and Tucker, and brute force on a grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.plan.paper.lagrange import ETA, Decay, MemoryProblem, convex_from, fit, solve

DECAYS = st.builds(Decay, th1=st.floats(1e-4, 1.0), th2=st.floats(0.1, 12.0), th3=st.floats(1e-5, 0.1))
PRICES = st.tuples(st.floats(0.0, 1e-3), st.floats(1e-6, 1e-4))  # H_w, c_c


def g(decay: Decay, overhead_s: float, main_usd: float, usd: float, y: np.ndarray) -> np.ndarray:
    """As method.md, section 8 has it, with T and t_rem / s_l."""
    return (decay.th1 * np.exp(-decay.th2 * y) + decay.th3 + overhead_s) * (main_usd + usd * y)


@st.composite
def problems(draw: st.DrawFn) -> MemoryProblem:
    """Boxes that begin where g is convex, and a budget between what the cheapest and what the fastest memory takes, or none."""
    decay, (main_usd, usd) = draw(DECAYS), draw(PRICES)
    layers = draw(st.integers(1, 4))
    begin = max(0.1, convex_from(decay, main_usd, usd))
    low = np.array([begin + draw(st.floats(0.0, 3.0)) for _ in range(layers)])
    hits = np.array([draw(st.floats(0.01, 6.0)) for _ in range(layers)])
    overhead_s = np.full(layers, draw(st.floats(0.0, 0.05)))
    problem = MemoryProblem(decay, hits, overhead_s, main_usd, usd, low, float(low.max()) + draw(st.floats(0.1, 5.0)), None)
    slowest, fastest = (float(problem.layer_s(y).sum()) for y in (solve(problem).y, np.full(layers, problem.high)))
    between = draw(st.none() | st.floats(0.01, 1.2))
    return problem if between is None else replace(problem, budget_s=fastest + between * (slowest - fastest))


@settings(deadline=None)
@given(DECAYS, st.floats(0.0, 1.0), st.floats(1e-6, 1e-4), st.floats(0.0, 0.1), st.floats(0.02, 5.0))
def test_theorem_2_says_where_g_is_convex(decay: Decay, free: float, usd: float, overhead_s: float, away: float) -> None:
    main_usd = free * 2 * usd / decay.th2  # up to what makes g convex everywhere
    begin, step = convex_from(decay, main_usd, usd), 0.01 / decay.th2

    def bend(y: float) -> float:
        before, here, after = g(decay, overhead_s, main_usd, usd, np.array([y - step, y, y + step]))
        return float(before - 2 * here + after)

    assert bend(begin + away / decay.th2) > 0 > bend(begin - away / decay.th2)
    assert (begin <= 1e-9) == (decay.th2 >= 2 * usd / main_usd * (1 - 1e-9) if main_usd else False)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_optimum_meets_the_kkt_conditions(problem: MemoryProblem) -> None:
    found = solve(problem)
    y, multiplier = found.y, found.multiplier
    assert found.meets
    # Primal and dual feasibility.
    assert (y >= problem.low - 1e-12).all() and (y <= problem.high).all() and multiplier >= 0
    seconds = problem.hits * problem.decay.seconds(y) + problem.overhead_s
    if problem.budget_s is not None:
        assert seconds.sum() <= problem.budget_s * (1 + 1e-12)
        # Complementary slackness; beyond some multiplier every y is at its end, and then there may be slack.
        assert multiplier == 0 or seconds.sum() == pytest.approx(problem.budget_s, rel=1e-7) or (y > problem.high - 1e-9).all()
    # Stationarity, with multipliers of the box that are not negative: the slope of the Lagrangian by
    # differences, from g in method.md, section 8.
    step = 1e-5 / problem.decay.th2

    def lagrangian(at: np.ndarray) -> np.ndarray:
        of_g = [
            g(problem.decay, r / s, problem.main_usd_per_s, problem.usd_per_gb_s, v)
            for s, r, v in zip(problem.hits, problem.overhead_s, at, strict=True)
        ]
        return problem.hits * ((1 + ETA) * np.array(of_g) + multiplier * problem.decay.seconds(at))

    slope = (lagrangian(y + step) - lagrangian(y - step)) / (2 * step)
    noise = 1e-6 * (1 + ETA) * (problem.main_usd_per_s * problem.decay.th2 + problem.usd_per_gb_s * (1 + y * problem.decay.th2)) * seconds
    noise += 1e-6 * multiplier * seconds * problem.decay.th2
    assert (slope[y > problem.low + 1e-9] <= noise[y > problem.low + 1e-9]).all()
    assert (slope[y < problem.high - 1e-9] >= -noise[y < problem.high - 1e-9]).all()


@settings(max_examples=30, deadline=None)
@given(DECAYS, PRICES, st.floats(0.0, 0.05), st.floats(0.0, 6.0), st.floats(0.0, 6.0), st.none() | st.floats(0.02, 1.0))
def test_no_point_of_a_grid_is_better(
    decay: Decay, prices: tuple[float, float], overhead_s: float, one: float, other: float, between: float | None
) -> None:
    """Two layers. Without a budget that binds, whether convex or not; with one, where P2 is convex."""
    low, high = np.array([0.3, 0.9]), 5.0
    if between is not None:
        low = np.minimum(high, np.maximum(low, convex_from(decay, *prices)))
    problem = MemoryProblem(decay, np.array([one, other]), np.full(2, overhead_s), *prices, low, high, None)
    if between is not None:
        slowest, fastest = (float(problem.layer_s(y).sum()) for y in (solve(problem).y, np.full(2, high)))
        problem = replace(problem, budget_s=fastest + between * (slowest - fastest))
    found = solve(problem)
    grid = np.linspace(low, high, 120)
    usd, seconds = problem.usd(grid), problem.layer_s(grid)
    allowed = seconds[:, None, 0] + seconds[None, :, 1] <= (np.inf if problem.budget_s is None else problem.budget_s)
    best = np.where(allowed, usd[:, None, 0] + usd[None, :, 1], np.inf).min()
    assert float(problem.usd(found.y).sum()) <= best * (1 + 1e-9)


def test_a_budget_that_no_memory_keeps_is_said_to_be_broken() -> None:
    problem = MemoryProblem(Decay(0.01, 2.0, 0.01), np.ones(3), np.zeros(3), 1e-4, 1e-5, np.ones(3), 4.0, 0.03)
    found = solve(problem)
    assert not found.meets and found.y.tolist() == [4.0] * 3
    assert solve(replace(problem, budget_s=0.0301)).meets


@pytest.mark.parametrize("th2", [0.3, 2.44, 11.87])  # the paper's range
def test_fit_finds_its_own_form_again(th2: float) -> None:
    y = np.arange(0.2, 5.0, 0.1)
    truth = Decay(0.02, th2, 0.003)
    found = fit(y, truth.seconds(y))
    assert (found.th1, found.th2, found.th3) == pytest.approx((0.02, th2, 0.003), rel=1e-3)


@pytest.mark.parametrize("seconds", [lambda y: 0.004 / y, lambda y: 0.004 + 0 * y, lambda y: 0.004 * y, lambda y: np.exp(-5 * y)])
def test_fit_is_positive_whatever_the_points_and_no_worse_than_the_best_constant(seconds: object) -> None:
    y = np.linspace(0.1, 5.0, 30)
    points = seconds(y)  # type: ignore[operator]
    found = fit(y, points)
    assert min(found.th1, found.th2, found.th3) > 0
    constant = (1 / points).sum() / (1 / points**2).sum()
    assert np.square(found.seconds(y) / points - 1).sum() <= np.square(constant / points - 1).sum() + 1e-6
    assert (found.slope(y) < 0).all()
    assert fit(np.array([2.0]), np.array([0.5])).seconds(np.array([2.0]))[0] == pytest.approx(0.5)
