"""k-medoids on vectors: the paper's own (roulette-wheel start, update within clusters), and PAM.

Distance is squared Euclidean. For vectors of length one it is twice the cosine distance, and computing gets simple: the sum of a member's
distances to its cluster is a constant minus its product with the cluster's sum. So the best medoid costs one product for each member. It
is exact, without samples and without distances of all pairs.

Source: method.md, section 5.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from remoe_cli import interrupts

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

ROUNDS = 10  # of assignment and update; few clusters change afterwards
_SAME = 1e-6  # squared distances below this, relative to the largest squared length, are rounding: the vectors are equal


def k_medoids(x: Floats, clusters: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Divide the rows of `x` into at most `clusters` clusters; fewer where rows are equal.

    No cluster is empty.

    Shapes: x [N, d]; returns the cluster of each row [N], and the row at the centre of each cluster.
    """
    squares = np.einsum("nd,nd->n", x, x)
    medoids = _roulette(x, squares, clusters, rng)
    labels, medoids = _assign(x, squares, medoids)
    for _ in range(ROUNDS):
        better = _update(x, squares, labels, len(medoids))
        if np.array_equal(better, medoids):
            break
        labels, medoids = _assign(x, squares, better)
    return labels, medoids


def cost(x: Floats, labels: Indices, medoids: Indices) -> float:
    """Sum the rows' distances to their medoids, which both methods minimise."""
    return float(np.square(x - x[medoids[labels]]).sum(dtype=np.float64))


def _roulette(x: Floats, squares: Floats, clusters: int, rng: np.random.Generator) -> Indices:
    """Draw medoids, each with a probability in proportion to its distance to the closest one so far."""
    chosen = [int(rng.integers(len(x)))]
    nearest = np.full(len(x), np.inf, dtype=np.float32)
    none = _SAME * float(squares.max())
    while len(chosen) < clusters:
        interrupts.check()
        m = chosen[-1]
        np.minimum(nearest, squares + (squares[m] - 2 * (x @ x[m])), out=nearest)
        wheel = np.cumsum(np.where(nearest > none, nearest, 0), dtype=np.float64)
        if wheel[-1] == 0:
            break
        chosen.append(int(np.searchsorted(wheel, rng.random() * wheel[-1], side="right")))
    return np.array(chosen, dtype=np.intp)


def _assign(x: Floats, squares: Floats, medoids: Indices) -> tuple[Indices, Indices]:
    """Find each row's closest medoid, and drop medoids without rows."""
    closeness = x @ x[medoids].T
    closeness -= squares[medoids] / 2
    labels = closeness.argmax(axis=1)
    used = np.bincount(labels, minlength=len(medoids)) > 0
    return (np.cumsum(used) - 1)[labels], medoids[used]


def _update(x: Floats, squares: Floats, labels: Indices, clusters: int) -> Indices:
    """Find the member of each cluster with the least sum of distances to all its members."""
    member = (np.arange(clusters)[:, None] == labels).astype(np.float32)
    means = (member @ x) / member.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    farness = squares - 2 * (x @ means.T)[rows, labels]
    order = np.lexsort((rows, farness, labels))
    return order[np.searchsorted(labels[order], np.arange(clusters))]


def swap_medoids(x: Floats, medoids: Indices) -> tuple[Indices, Indices]:
    """Run PAM from these medoids: swap a medoid for another row as long as this lowers the cost.

    The best swap of each block of rows is made as soon as it is found. All pairwise distances are in memory.

    Source: FasterPAM, Schubert and Rousseeuw 2021.
    """
    medoids, n, block = medoids.copy(), len(x), 64
    squares = np.einsum("nd,nd->n", x, x)
    d = np.maximum(squares[:, None] + squares - 2 * (x @ x.T), 0)
    np.fill_diagonal(d, 0)
    start, quiet = 0, 0
    while quiet < n and len(medoids) > 1:
        interrupts.check()
        near = np.argpartition(d[medoids], 1, axis=0)[:2]
        first, second = d[medoids[near[0]], np.arange(n)], d[medoids[near[1]], np.arange(n)]
        member = (np.arange(len(medoids)) == near[0][:, None]).astype(np.float32)
        rows = np.arange(start, min(start + block, n))
        # A row that becomes a medoid attracts others (first sum). A medoid that goes leaves its members to the row or to their second best.
        drawn = np.minimum(d[rows] - first, 0)
        freed = (np.minimum(d[rows], second) - first - drawn) @ member
        change = freed + drawn.sum(axis=1, keepdims=True)
        row, gone = np.unravel_index(change.argmin(), change.shape)
        if change[row, gone] < -_SAME * first.sum():
            medoids[gone], quiet = rows[row], 0
        else:
            quiet += len(rows)
        start = (start + len(rows)) % n
    return _assign(x, squares, medoids)
