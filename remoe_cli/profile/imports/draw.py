"""Drawing single tokens from counts, for routing that was recorded without them.

Planning needs to know which experts one token uses together, and counts do not say. The draw assumes that, within a prompt, experts are
chosen independently: no expert attracts or excludes another within a layer, and layers do not depend on each other. It keeps what the
counts say: every token uses exactly k different experts, and each expert is used by the fraction of the prompt's tokens that the counts
give. The method is systematic sampling over the experts in random order, in whole numbers, so that these fractions are exact. Gumbel
top-k with the logarithms of the fractions would be simpler, but its fractions are not those of the counts: it makes them more equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DRAWN_TOKENS = 8_192  # an expert that 1% of tokens use is then hit 82 times; more would not be more evidence
_SEED = 0
_AT_ONCE = 2**16  # rows that are drawn at once: more would take memory for all experts of each


def draw_trace(counts: npt.NDArray[Any], tokens: npt.NDArray[Any], top_k: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """Draw DRAWN_TOKENS tokens from counts: as many from each row, at least one, at most all it has.

    The same counts give the same tokens. In a layer without counts the ids are -1.

    Shapes: counts [P, L, E] sum over experts to tokens [P] * top_k; returns ids int16 [T, L, k] and each token's row int32 [T].
    """
    random = np.random.default_rng(_SEED)
    drawn = np.minimum(max(1, DRAWN_TOKENS // max(1, len(counts))), tokens)
    owner = np.repeat(np.arange(len(counts)), drawn)
    parts = [owner[at : at + _AT_ONCE] for at in range(0, len(owner), _AT_ONCE)] or [owner]
    return np.concatenate([_drawn(counts, tokens, part, top_k, random) for part in parts]), owner.astype(np.int32)


def _drawn(
    counts: npt.NDArray[Any], tokens: npt.NDArray[Any], owner: npt.NDArray[Any], top_k: int, random: np.random.Generator
) -> npt.NDArray[np.int16]:
    """Draw one token of each row in `owner`: ids [len(owner), L, k]."""
    ids = np.full((len(owner), counts.shape[1], top_k), -1, dtype=np.int16)
    n = tokens[owner].astype(np.int64)
    for layer in range(counts.shape[1]):
        of_token = counts[owner, layer].astype(np.int64)
        if of_token.any():
            order = random.random(of_token.shape, dtype=np.float32).argsort(axis=1)
            bounds = np.take_along_axis(of_token, order, axis=1).cumsum(axis=1)
            # k points, n apart, on a line on which every expert is as long as its count: at most n, so no expert is met twice.
            points = (random.random(len(n)) * n).astype(np.int64)[:, None] + n[:, None] * np.arange(top_k)
            met = np.stack([(bounds <= points[:, slot, None]).sum(axis=1) for slot in range(top_k)], axis=1)
            ids[:, layer] = np.take_along_axis(order, met, axis=1)
    return ids
