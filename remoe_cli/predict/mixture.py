"""A prediction as a mixture of recorded prompts: which ones, and with which weights.

Predictors say how often each expert is used, not which experts one token uses together, and a plan's cost depends on that. Recorded
prompts have both. So the mixture of recorded prompts that is most likely to show the predicted frequencies represents the prediction.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.history import Floats, Indices

LARGEST = 256  # recorded prompts in a mixture, which is written into plans
_STEPS = 200  # the error that remains is less than a tenth of the best predictor's


def mixture(predicted: Floats, frequencies: Floats) -> tuple[Indices, Floats, float]:
    """Find the recorded prompts whose mixture is closest to the prediction.

    Shapes: predicted [L, E], frequencies [P, L, E]. Returns the chosen prompts [M], ascending; their weights [M], which sum to 1; and the
    mean divergence in bits between mixture and prediction.
    """
    weights = _climb(predicted, frequencies, np.ones(len(frequencies)))
    chosen = np.sort(np.argsort(-weights, kind="stable")[:LARGEST])
    if len(chosen) < len(weights):
        weights = _climb(predicted, frequencies[chosen], weights[chosen])
    left = jensen_shannon(np.tensordot(weights, frequencies[chosen], axes=1), predicted)
    return chosen, weights, float(left.mean())


def _climb(predicted: Floats, frequencies: Floats, start: Floats) -> Floats:
    """Find the weights of greatest likelihood by expectation maximisation.

    In each step a prompt gets what it explains of the prediction.
    """
    rows, wanted = frequencies.reshape(len(frequencies), -1), predicted.ravel()
    weights: Floats = start / start.sum()
    for _ in range(_STEPS):
        weights = weights * (rows @ (wanted / np.maximum(weights @ rows, np.finfo(float).tiny)))
        weights /= weights.sum()
    return weights
