"""How far a predicted activation matrix is from the true one, and how far a perfect prediction would be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def jensen_shannon(predicted: Floats, true: Floats) -> Floats:
    """Divergence in bits (base 2) of distributions along the last axis, broadcast: 0 for equal ones, 1 for disjoint ones."""
    middle = (predicted + true) / 2
    divergence: Floats = np.maximum(_entropy(middle) - (_entropy(predicted) + _entropy(true)) / 2, 0.0)
    return divergence


def _entropy(p: Floats) -> Floats:
    entropy: Floats = -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)
    return entropy


def noise_floor(frequencies: Floats, selections: npt.NDArray[np.int64], seed: int = 0) -> Floats:
    """[P]: what a predictor that knows each prompt's true frequencies would score against what so few tokens show of them.

    A prompt's frequencies [P, L, E] are taken for the truth and its `selections` drawn anew from them. Real tokens of one text depend on
    each other, so the true floor lies higher.
    """
    draws = np.random.default_rng(seed).multinomial(selections[:, None], frequencies / frequencies.sum(axis=2, keepdims=True))
    floor: Floats = jensen_shannon(frequencies, draws / selections[:, None, None]).mean(axis=1)
    return floor


def remote_hits(predicted: Floats, true: Floats, remote: int) -> Floats:
    """[P]: share of expert choices that go remote when the `remote` experts of each layer that are predicted least used are."""
    away = np.argsort(predicted, axis=2, kind="stable")[:, :, :remote]
    hits: Floats = np.take_along_axis(true, away, axis=2).sum(axis=2).mean(axis=1)
    return hits
