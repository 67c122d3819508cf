"""The most similar prompts: by comparing all, or by usearch's index where there are many.

Up to `EXACT` prompts a product with all of them takes a few milliseconds and is exact; above that, usearch's HNSW graph finds more of them
in less time than the paper's tree (tree.py). docs/adr/0005-nearest-neighbours.md has the measurements. One thread builds the graph, so
that the same prompts give the same bytes. Prompts, profiles and activations are not known here, only vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError
from remoe_cli.predict.tree import ALPHA, Floats, Ints, top, unit

EXACT = 20_000
_EXPANSION = 128  # candidates that a search of the graph keeps; ADR 5 has figures for others
_GRAPH = "graph"


@dataclass(frozen=True)
class Nearest:
    """N prompts, ready to search.

    vectors   float32 [N, d], of length one
    index     usearch's index over them; None where all are compared
    """

    vectors: Floats
    index: Any

    def __len__(self) -> int:
        return len(self.vectors)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what has to be stored: the index, if there is one. The profile holds the vectors."""
        return {} if self.index is None else {_GRAPH: np.frombuffer(self.index.save(), dtype=np.uint8)}


def build(vectors: npt.ArrayLike, *, exact: int = EXACT) -> Nearest:
    """Make vectors [N, d] ready to search; more than `exact` of them get an index."""
    rows = unit(vectors)
    return Nearest(rows, _grown(_empty(rows.shape[1]), rows, 0) if len(rows) > exact else None)


def add(nearest: Nearest, vectors: npt.ArrayLike, *, exact: int = EXACT) -> Nearest:
    """Return a copy with further prompts, which get the numbers from N on."""
    rows = np.concatenate([nearest.vectors, unit(vectors)])
    if nearest.index is None:
        return build(rows, exact=exact)
    return Nearest(rows, _grown(nearest.index.copy(), rows[len(nearest) :], len(nearest)))


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], vectors: npt.ArrayLike) -> Nearest:
    """Restore what `to_arrays` stored, over the same vectors.

    Raises: ArtifactError when they do not fit each other.
    """
    rows = unit(vectors)
    if _GRAPH not in arrays:
        return Nearest(rows, None)
    index = _empty(rows.shape[1])
    try:
        index.load(arrays[_GRAPH].tobytes())
    except Exception as error:  # usearch raises plain RuntimeError or ValueError, by what is broken
        raise ArtifactError(f"The stored index of similar prompts is damaged: {error}.", "Make the profile again.") from None
    if (len(index), index.ndim) != rows.shape:
        raise ArtifactError(
            f"The stored index has {len(index)} vectors of width {index.ndim}, and its profile {len(rows)} of width {rows.shape[1]}.",
            "Make the profile again.",
        )
    return Nearest(rows, index)


def search(nearest: Nearest, query: npt.ArrayLike, *, alpha: int = ALPHA) -> tuple[Ints, Floats]:
    """Find the `alpha` most similar prompts, closest first, and their cosines.

    Shapes: as those of `tree.search`.
    """
    queries = np.asarray(query, dtype=np.float32)
    found = [_search(nearest, q, min(alpha, len(nearest))) for q in np.atleast_2d(unit(queries))]
    indices, similarities = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
    return (indices, similarities) if queries.ndim == 2 else (indices[0], similarities[0])


def _search(nearest: Nearest, q: Floats, alpha: int) -> tuple[Ints, Floats]:
    if nearest.index is None:
        values = nearest.vectors @ q
        chosen = top(values, alpha)
        return chosen.astype(np.int32), values[chosen]
    # The graph compares rounded numbers: twice as many as asked for, and the exact cosines decide.
    prompts = np.sort(np.asarray(nearest.index.search(q, min(2 * alpha, len(nearest)), threads=1).keys).astype(np.int32))
    values = nearest.vectors[prompts] @ q
    chosen = top(values, alpha)
    return prompts[chosen], values[chosen]


def _empty(dimensions: int) -> Any:
    from usearch.index import Index  # slow to import, and most profiles do without

    return Index(ndim=dimensions, metric="ip", dtype="bf16", expansion_search=_EXPANSION)


def _grown(index: Any, rows: Floats, first: int) -> Any:
    index.add(np.arange(first, first + len(rows)), rows, threads=1)
    return index
