"""Single tokens drawn from counts, for routing that was recorded without them.

Planning needs to know which experts one token uses together. Counts do not say, so the draw assumes that experts are chosen
independently of each other but for the prompt: no expert attracts or shuns another within a layer, and layers do not depend on each
other. What the counts do say is kept: every token uses exactly k different experts, each with the share of the prompt's tokens that
the counts give (systematic sampling over experts in random order, in whole numbers, so that the shares are exact). Gumbel top-k with
the logarithms of the shares would be simpler and would level them: its shares are not those of the counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DRAWN_TOKENS = 8_192  # an expert that 1% of tokens use is then hit 82 times; more would not be more evidence
_SEED = 0


def draw_trace(counts: npt.NDArray[Any], tokens: npt.NDArray[Any], top_k: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """From counts [P, L, E] that sum to tokens [P] * k: ids int16 [T, L, k] and each token's row [T]. Same counts, same draw.

    Each row gets an equal share of DRAWN_TOKENS, at least one and at most the tokens it has; a layer without counts gets -1.
    """
    share = np.minimum(max(1, DRAWN_TOKENS // max(1, len(counts))), tokens)
    owner = np.repeat(np.arange(len(counts)), share)
    ids = np.full((len(owner), counts.shape[1], top_k), -1, dtype=np.int16)
    random = np.random.default_rng(_SEED)
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
    return ids, owner.astype(np.int32)
