"""A prediction as a mixture of recorded prompts: which of them, in which shares, use the experts as is predicted.

Predictors tell how often each expert is used, not which experts one token uses together, and a plan's cost depends on that. Recorded
prompts have both. So the mixture of them that is likeliest to show the predicted frequencies stands in for the prediction.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.predict.divergence import jensen_shannon
from remoe_cli.predict.history import Floats, Indices

LARGEST = 256  # recorded prompts in a mixture, for it is written into plans
_STEPS = 200  # leave less than a tenth of what the best predictor is off


def mixture(predicted: Floats, frequencies: Floats) -> tuple[Indices, Floats, float]:
    """Of recorded prompts with `frequencies` [P, L, E] those that make up `predicted` [L, E], ascending [M], their shares [M], which sum to
    1, and the mean divergence in bits that is left between mixture and prediction."""
    shares = _climb(predicted, frequencies, np.ones(len(frequencies)))
    chosen = np.sort(np.argsort(-shares, kind="stable")[:LARGEST])
    if len(chosen) < len(shares):
        shares = _climb(predicted, frequencies[chosen], shares[chosen])
    left = jensen_shannon(np.tensordot(shares, frequencies[chosen], axes=1), predicted)
    return chosen, shares, float(left.mean())


def _climb(predicted: Floats, frequencies: Floats, start: Floats) -> Floats:
    """Shares of greatest likelihood, by expectation maximisation: each prompt gets what it explains of the prediction."""
    rows, wanted = frequencies.reshape(len(frequencies), -1), predicted.ravel()
    shares: Floats = start / start.sum()
    for _ in range(_STEPS):
        shares = shares * (rows @ (wanted / np.maximum(shares @ rows, np.finfo(float).tiny)))
        shares /= shares.sum()
    return shares
