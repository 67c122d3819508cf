"""Worst times and LPT: what bounds of work must hold for any tokens, by hypothesis."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.paper import worst_times


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=9), st.floats(1, 3), st.floats(1, 2), st.floats(0, 5))
def test_no_spread_of_the_tokens_is_more_work(tokens: list[float], more: float, wider: float, knee: float) -> None:
    """Of experts whose time is convex in their tokens; and some spread is as much."""
    n, m = np.array(tokens), len(tokens)
    together, largest = more * n.sum() + 1e-3, wider * n.max() + 1e-3

    def work(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, 1.0 + np.maximum(knee, x), 0.0)

    most = float(worst_times.most_work_s(work, m, np.array([together]), np.array([largest]))[0])
    assert work(n).sum() <= most * (1 + 1e-9)
    full = [largest] * min(m, int(together / largest + 1e-9))
    spread = (full + [together - largest * len(full)] * (len(full) < m) + [1e-9] * m)[:m]
    assert most == pytest.approx(float(work(np.maximum(np.array(spread), 1e-9)).sum()))


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=8), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_concave_function_above_is_no_less_than_any_law_and_as_little_as_some(values: list[float], weights: list[float]) -> None:
    size = min(len(values), len(weights))
    rho, shares = np.array(values[:size]), np.array(weights[:size]) + 1e-3
    shares /= shares.sum()
    mean = float(shares @ np.arange(size))
    found = float(worst_times.concave_above(rho, np.array([mean]))[0])
    assert found >= float(shares @ rho) - 1e-9
    pairs = ((i, j) for i in range(size) for j in range(i + 1, size) if i <= mean <= j)
    assert found == pytest.approx(max((rho[i] * (j - mean) + rho[j] * (mean - i)) / (j - i) for i, j in pairs))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=7), st.integers(1, 4))
def test_lpt_is_near_the_best_partition_and_within_the_bound(times: list[float], z: int) -> None:
    work = np.array(times)
    at = expert_functions.lpt(work, np.ones((1, len(work)), dtype=bool), z)[0]
    load = max(work[at == j].sum() for j in range(z))
    every = np.array(list(itertools.product(range(z), repeat=len(work))))
    best = np.stack([(every == j) @ work for j in range(z)]).max(axis=0).min()
    assert load <= (4 / 3 - 1 / (3 * z)) * best * (1 + 1e-9)
    assert load <= float(worst_times.fullest(work.sum(), work.max(), z)) * (1 + 1e-9)
