"""Pairs of prompts: whether those of similar meaning use similar experts.

It needs no torch, so that a report is made without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.predict.divergence import Floats, jensen_shannon
from remoe_cli.predict.tree import unit

_PAIRS = 20_000


@dataclass(frozen=True)
class Similarity:
    """Pairs of prompts: cosine of their vectors, 1 - divergence of their activations, and the correlation.

    Source: the paper's figure 3.
    """

    semantic: npt.NDArray[np.float32]
    activation: Floats
    correlation: float


def similarity_of(vectors: npt.NDArray[np.float32], frequencies: Floats, seed: int = 0, pairs: int = _PAIRS) -> Similarity:
    """Compute the semantic and the activation similarity of random pairs of different prompts.

    Of all pairs, where these are no more than `pairs`.

    Shapes: vectors [P, d], frequencies [P, L, E].
    """
    count = len(vectors)
    if count * (count - 1) // 2 <= pairs:
        a, b = np.triu_indices(count, 1)
    else:
        a, b = np.random.default_rng(seed).integers(0, count, (2, pairs))
        a, b = a[a != b], b[a != b]
    directions = unit(vectors)
    semantic = (directions[a] * directions[b]).sum(axis=1)
    activation = np.concatenate([1 - jensen_shannon(frequencies[x], frequencies[y]).mean(axis=1) for x, y in _chunks(a, b)])
    return Similarity(semantic, activation, float(np.corrcoef(semantic, activation)[0, 1]))


def _chunks(
    a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], size: int = 500
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    for start in range(0, len(a), size):
        yield a[start : start + size], b[start : start + size]
