"""Our predictor: what it computes is ridge regression, leave-one-out is what it says, and it beats the paper's on topical prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.artifacts import read_arrays, write_arrays
from remoe_cli.predict import baselines, ridge
from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.history import History
from tests.support.topical import EXPERTS, LAYERS, topical


@pytest.fixture(scope="module")
def known() -> History:
    return topical(160)


@pytest.fixture(scope="module")
def unseen() -> History:
    return topical(60, seed=1)


@pytest.fixture(scope="module")
def fitted(known: History) -> ridge.Ridge:
    return ridge.fit(known)


def divergence(predictor: ridge.Ridge | baselines.Neighbours | baselines.Constant, test: History) -> float:
    return float(jensen_shannon(predictor.predict(test.prompts), test.frequencies).mean())


def test_predictions_are_distributions(fitted: ridge.Ridge, unseen: History) -> None:
    predicted = fitted.predict(unseen.prompts)
    assert predicted.shape == (60, LAYERS, EXPERTS)
    assert predicted.min() > 0
    assert np.allclose(predicted.sum(axis=2), 1)


def test_it_beats_the_papers_predictors_on_prompts_it_has_not_seen(fitted: ridge.Ridge, known: History, unseen: History) -> None:
    ours = divergence(fitted, unseen)
    assert ours < 0.8 * divergence(baselines.sps(known, 0), unseen)
    assert ours < 0.8 * divergence(baselines.brute_force(known, 0), unseen)
    assert ours < 0.5 * divergence(baselines.history_mean(known, 0), unseen)


def test_where_words_say_nothing_it_falls_back_on_the_mean(known: History, unseen: History) -> None:
    """Shrinkage: with experts shuffled over prompts, nothing can be learned, and nothing may be lost either."""
    order = np.random.default_rng(5).permutation(len(known))
    shuffled = replace(known, frequencies=known.frequencies[order])
    mean = baselines.history_mean(shuffled, 0)
    assert divergence(ridge.fit(shuffled), unseen) < 1.05 * divergence(mean, unseen)


def test_each_layer_is_drawn_to_the_mean_by_its_own_measure(known: History) -> None:
    frequencies = known.frequencies.copy()
    frequencies[:, 0] = frequencies[np.random.default_rng(5).permutation(len(known)), 0]
    strengths = ridge.fit(replace(known, frequencies=frequencies)).strengths
    assert strengths[0] > 10 * strengths[1:].max()


def test_left_out_predictions_are_those_of_a_regression_without_the_prompt(known: History) -> None:
    words = np.random.default_rng(2).standard_normal((30, 5)).astype(np.float32)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    targets = np.random.default_rng(3).standard_normal((30, 4))
    strength = 0.3
    quick = ridge._Regression.of(words, words, 0.5, targets).left_out(strength, targets, np.arange(30))
    kernel = np.exp((words.astype(np.float64) @ words.T.astype(np.float64) - 1) / 0.5)
    for i in (0, 7, 29):
        rest = np.delete(np.arange(30), i)
        alone = np.linalg.solve(kernel[np.ix_(rest, rest)] + strength * np.eye(29), targets[rest])
        assert np.allclose(quick[i], kernel[i, rest] @ alone, atol=1e-8)


def test_the_interval_holds_as_often_as_it_says(fitted: ridge.Ridge, unseen: History, measured) -> None:  # type: ignore[no-untyped-def]
    low, high = fitted.interval(unseen.prompts)
    predicted = fitted.predict(unseen.prompts)
    assert (low <= predicted + 1e-12).all() and (predicted <= high + 1e-12).all()
    coverage = ((low <= unseen.frequencies) & (unseen.frequencies <= high)).mean()
    measured(f"coverage {coverage:.1%} of {fitted.coverage:.0%}")
    assert abs(coverage - fitted.coverage) < 0.06


def test_many_prompts_go_through_landmarks(known: History, unseen: History, fitted: ridge.Ridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "LANDMARKS", 40)
    fewer = ridge.fit(known)
    assert fewer.landmarks.shape[0] == 40
    assert divergence(fewer, unseen) < 1.25 * divergence(fitted, unseen)


def test_same_history_same_numbers_and_they_survive_storage(known: History, unseen: History, fitted: ridge.Ridge, tmp_path: Path) -> None:
    again = ridge.fit(known)
    for name, array in fitted.to_arrays().items():
        assert np.array_equal(array, again.to_arrays()[name]), name
    write_arrays(tmp_path / "ridge.safetensors", fitted.to_arrays(), "predictor")
    stored = ridge.Ridge.from_arrays(read_arrays(tmp_path / "ridge.safetensors"))
    assert np.array_equal(stored.predict(unseen.prompts), fitted.predict(unseen.prompts))


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_few_prompts_are_no_reason_to_fail(prompts: int, unseen: History) -> None:
    predicted = ridge.fit(topical(prompts)).predict(unseen.prompts)
    assert np.isfinite(predicted).all() and np.allclose(predicted.sum(axis=2), 1)
