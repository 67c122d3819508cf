"""How far a predicted activation matrix is from the true one, and a perfect prediction would be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def jensen_shannon(predicted: Floats, true: Floats) -> Floats:
    """Compute the Jensen-Shannon divergence, in bits, of distributions along the last axis.

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.0, 1.0]
    """
    middle = (predicted + true) / 2
    divergence: Floats = np.maximum(_entropy(middle) - (_entropy(predicted) + _entropy(true)) / 2, 0.0)
    return divergence


def _entropy(p: Floats) -> Floats:
    entropy: Floats = -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)
    return entropy


def noise_floor(frequencies: Floats, selections: npt.NDArray[np.int64], seed: int = 0) -> Floats:
    """Compute the divergence that remains for a perfect predictor, because a prompt has few tokens.

    A prompt's frequencies are taken as the truth, and as many choices as it has are drawn from them again, independently. Real tokens of
    one text depend on each other, so the true floor is mostly higher; that of prompts which share a template is lower.

    Shapes: frequencies [P, L, E], selections [P]; returns [P].
    """
    draws = np.random.default_rng(seed).multinomial(selections[:, None], frequencies / frequencies.sum(axis=2, keepdims=True))
    floor: Floats = jensen_shannon(frequencies, draws / selections[:, None, None]).mean(axis=1)
    return floor


def remote_hits(predicted: Floats, true: Floats, remote: int) -> Floats:
    """Compute the fraction of expert choices that are remote, if the least used experts by prediction are.

    `remote` is how many experts of each layer are remote.

    Shapes: predicted and true [P, L, E]; returns [P].
    """
    least = np.argsort(predicted, axis=2, kind="stable")[:, :, :remote]
    hits: Floats = np.take_along_axis(true, least, axis=2).sum(axis=2).mean(axis=1)
    return hits
