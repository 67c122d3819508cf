"""The tree of similar prompts, which SPS searches: built, searched, extended and stored.

k-medoids divides a node with more than `beta` prompts. A search goes down to the closest centre until it reaches a leaf, compares the
prompt with every prompt there, and goes on in the closest branch that it has not taken, usually a sibling, while it has seen too few.
Every prompt is in exactly one leaf. A node's prompts are one slice of `order`, and its children are one slice of the nodes, so the whole
tree is a few flat arrays.

Vectors are scaled to length one here, so a product is a cosine. Prompts, profiles and activations are not known here, only vectors.
Building and searching loop over nodes, never over prompts.

Source: method.md, section 5.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import ArtifactError
from remoe_cli.predict.medoids import k_medoids, swap_medoids

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Method = Literal["k-medoids", "pam"]

ALPHA = 15  # prompts that a search returns
BETA = 150  # most prompts of a leaf
FORKS = 32  # most children of a node


@dataclass(frozen=True)
class Tree:
    """N prompts in M nodes. Node 0 is the root; `vectors` and `order` are sorted by leaf.

    vectors   float32 [N, d]   of length one; row i belongs to prompt order[i]
    order     int32 [N]
    start     int32 [M]        a node's prompts are rows start[m] to stop[m]
    stop      int32 [M]
    first     int32 [M]        a node's children are nodes first[m] to first[m] + forks[m]
    forks     int32 [M]        0 for a leaf
    medoid    int32 [M]        the prompt at the centre of the node
    centres   float32 [M, d]   the vector of that prompt
    """

    vectors: Floats
    order: Ints
    start: Ints
    stop: Ints
    first: Ints
    forks: Ints
    medoid: Ints
    centres: Floats
    beta: int
    most_forks: int
    seed: int

    def __len__(self) -> int:
        return len(self.order)

    @property
    def leaves(self) -> npt.NDArray[np.intp]:
        """The nodes without children."""
        return np.flatnonzero(self.forks == 0)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what has to be stored. The profile holds the vectors."""
        settings = np.array([self.beta, self.most_forks, self.seed], dtype=np.int64)
        return {name: getattr(self, name) for name in _STORED} | {"settings": settings}


_STORED = ("order", "start", "stop", "first", "forks", "medoid")


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], vectors: npt.ArrayLike) -> Tree:
    """Restore the tree that `to_arrays` returned, over the same vectors in their own order.

    Raises: ArtifactError when they do not fit each other.
    """
    rows = unit(vectors)
    wrong = _wrong(arrays, len(rows))
    if wrong:
        raise ArtifactError(f"The stored tree of similar prompts does not fit its profile: {wrong}.", "Make the profile again.")
    stored = {name: arrays[name].astype(np.int32) for name in _STORED}
    beta, most_forks, seed = (int(value) for value in arrays["settings"])
    return Tree(vectors=rows[stored["order"]], centres=rows[stored["medoid"]], beta=beta, most_forks=most_forks, seed=seed, **stored)


def build(
    vectors: npt.ArrayLike,
    *,
    features: npt.ArrayLike | None = None,
    beta: int = BETA,
    forks: int = FORKS,
    seed: int = 0,
    method: Method = "k-medoids",
) -> Tree:
    """Build the tree over one vector for each prompt.

    Prompts are grouped by Euclidean distance of `features` if these are given: VarED groups by activation matrices. `method="pam"` is
    that of VarPAM.

    Shapes: vectors [N, d] with N > 0, features [N, f].
    """
    rows = unit(vectors)
    grouped = rows if features is None else np.asarray(features, dtype=np.float32).reshape(len(rows), -1)
    nodes = _Nodes(np.arange(len(rows), dtype=np.int32), [0], [len(rows)], [0], [0], [0])
    _divide(nodes, [0], grouped, beta, forks, np.random.default_rng(seed), method)
    return _tree(nodes, rows, beta, forks, seed)


def add(tree: Tree, vectors: npt.ArrayLike) -> Tree:
    """Return a tree with further prompts, which get the numbers from N on.

    Leaves that grow too large are divided.
    """
    new = unit(vectors)
    old, count = len(tree), len(new)
    leaf = _leaves(tree, new)
    where = np.argsort(leaf, kind="stable")
    # Each new prompt goes to the end of its leaf's slice. Every later slice moves by as many as were inserted before it.
    order = np.insert(tree.order, tree.stop[leaf[where]], (old + where).astype(np.int32))
    ends = np.sort(tree.stop[leaf])
    # A slice begins after what was inserted at or before its start, and ends after what was inserted up to its end.
    start = tree.start + np.searchsorted(ends, tree.start, side="right")
    stop = tree.stop + np.searchsorted(ends, tree.stop, side="right")
    rows = np.empty((old + count, tree.vectors.shape[1]), dtype=np.float32)
    rows[tree.order], rows[old:] = tree.vectors, new
    nodes = _Nodes(order, start.tolist(), stop.tolist(), tree.first.tolist(), tree.forks.tolist(), tree.medoid.tolist())
    _divide(nodes, np.unique(leaf).tolist(), rows, tree.beta, tree.most_forks, np.random.default_rng((tree.seed, old)), "k-medoids")
    return _tree(nodes, rows, tree.beta, tree.most_forks, tree.seed)


def search(
    tree: Tree, query: npt.ArrayLike, *, alpha: int = ALPHA, at_least: int | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Find the `alpha` most similar prompts, closest first, and their cosines.

    Leaves are visited, closest centre first, until they hold `alpha` prompts (the paper's rule) and `at_least` prompts, by default `beta`,
    as many as one leaf may hold. This brings the tree within 3% of brute force, which `alpha` alone does not (ADR 5).

    Shapes: query [d] or [Q, d]; returns [a] or [Q, a] each, with a = min(alpha, N).
    """
    queries = np.asarray(query, dtype=np.float32)
    found = [
        _search(tree, q, min(alpha, len(tree)), max(alpha, tree.beta if at_least is None else at_least))
        for q in np.atleast_2d(unit(queries))
    ]
    indices, similarities = np.stack([f[0] for f in found]), np.stack([f[1] for f in found])
    return (indices, similarities) if queries.ndim == 2 else (indices[0], similarities[0])


def top(similarities: Floats, alpha: int) -> npt.NDArray[np.intp]:
    """Find the positions of the `alpha` largest values, largest first; equal ones in their order.

    >>> top(np.array([0.1, 0.9, 0.5, 0.9], dtype=np.float32), 3).tolist()
    [1, 3, 2]
    """
    if alpha < len(similarities):
        # All values equal to the alpha-th are kept, so that position breaks ties, and not the partition.
        least = np.partition(similarities, len(similarities) - alpha)[len(similarities) - alpha]
        kept = np.flatnonzero(similarities >= least)
    else:
        kept = np.arange(len(similarities))
    return kept[np.argsort(-similarities[kept], kind="stable")[:alpha]]


def _search(tree: Tree, q: Floats, alpha: int, at_least: int) -> tuple[Ints, Floats]:
    waiting: list[tuple[float, int]] = [(0.0, 0)]
    seen, rows, similarities = 0, [], []
    while waiting and seen < at_least:
        node = heapq.heappop(waiting)[1]
        while forks := int(tree.forks[node]):
            first = int(tree.first[node])
            closeness = tree.centres[first : first + forks] @ q
            best = int(closeness.argmax())
            for child, value in enumerate(closeness.tolist()):
                if child != best:
                    heapq.heappush(waiting, (-value, first + child))
            node = first + best
        start, stop = int(tree.start[node]), int(tree.stop[node])
        similarities.append(tree.vectors[start:stop] @ q)
        rows.append(tree.order[start:stop])
        seen += stop - start
    values, prompts = np.concatenate(similarities), np.concatenate(rows)
    chosen = top(values, alpha)
    return prompts[chosen], values[chosen]


@dataclass(frozen=True)
class _Nodes:
    """The nodes of a tree while they are divided."""

    order: Ints
    start: list[int]
    stop: list[int]
    first: list[int]
    forks: list[int]
    medoid: list[int]


def _divide(nodes: _Nodes, todo: list[int], features: Floats, beta: int, most_forks: int, rng: np.random.Generator, method: Method) -> None:
    """Divide the nodes of `todo` and their children, until none has more than `beta` prompts."""
    todo = list(todo)
    for node in todo:  # grows while it is walked
        start, stop = nodes.start[node], nodes.stop[node]
        if stop - start <= beta:
            continue
        members = nodes.order[start:stop].copy()
        x = features[members]
        forks = min(most_forks, max(2, -(-2 * len(x) // beta)))
        labels, medoids = k_medoids(x, forks, rng)
        if method == "pam":
            labels, medoids = swap_medoids(x, medoids)
        if len(medoids) < 2:  # all prompts are equal
            continue
        nodes.order[start:stop] = members[np.argsort(labels, kind="stable")]
        ends = start + np.cumsum(np.bincount(labels, minlength=len(medoids)))
        nodes.first[node], nodes.forks[node] = len(nodes.start), len(medoids)
        todo += range(len(nodes.start), len(nodes.start) + len(medoids))
        nodes.start.extend([start, *ends[:-1].tolist()])
        nodes.stop.extend(ends.tolist())
        nodes.first.extend([0] * len(medoids))
        nodes.forks.extend([0] * len(medoids))
        nodes.medoid.extend(members[medoids].tolist())


def _leaves(tree: Tree, queries: Floats) -> npt.NDArray[np.int64]:
    """Find the leaf of each query, level by level: all queries in a node go down together."""
    at = np.zeros(len(queries), dtype=np.int64)
    while True:
        inner = np.unique(at[tree.forks[at] > 0])
        if not len(inner):
            return at
        for node in inner.tolist():
            mine = np.flatnonzero(at == node)
            first = int(tree.first[node])
            at[mine] = first + (queries[mine] @ tree.centres[first : first + int(tree.forks[node])].T).argmax(axis=1)


def _tree(nodes: _Nodes, rows: Floats, beta: int, most_forks: int, seed: int) -> Tree:
    numbers = {name: np.array(getattr(nodes, name), dtype=np.int32) for name in _STORED}
    return Tree(vectors=rows[nodes.order], centres=rows[numbers["medoid"]], beta=beta, most_forks=most_forks, seed=seed, **numbers)


def unit(vectors: npt.ArrayLike) -> Floats:
    """Scale vectors to length one, float32."""
    rows = np.asarray(vectors, dtype=np.float32)
    # einsum: norm() would make two more copies of a large matrix
    lengths = np.sqrt(np.einsum("...d,...d->...", rows, rows))
    scaled: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)[..., None]
    return scaled


def _wrong(arrays: Mapping[str, npt.NDArray[Any]], prompts: int) -> str:
    """Say why these arrays are no tree over so many prompts; empty if they are one."""
    missing = [name for name in (*_STORED, "settings") if name not in arrays]
    if missing:
        return f"array '{missing[0]}' is missing"
    if wrong := next((name for name in (*_STORED, "settings") if arrays[name].ndim != 1 or arrays[name].dtype.kind != "i"), None):
        return f"array '{wrong}' is no list of whole numbers"
    if len(arrays["settings"]) != 3:
        return "its settings are not three"
    order, start, stop, first, forks, medoid = (arrays[name] for name in _STORED)
    nodes = len(start)
    if not nodes or {len(stop), len(first), len(forks), len(medoid)} != {nodes}:
        return "its nodes are not all there"
    if len(order) != prompts or not np.array_equal(np.sort(order), np.arange(prompts)):
        return f"it is not over the {prompts} prompts of the profile"
    if medoid.min() < 0 or medoid.max() >= prompts:
        return "a centre is no prompt"
    # Children come after their parent, so a search ends. They divide its slice, so every prompt is in one leaf.
    seen = 1
    for node in np.flatnonzero(forks).tolist():
        children = slice(int(first[node]), int(first[node]) + int(forks[node]))
        bounds = [*start[children].tolist(), int(stop[node])]
        if children.start <= node or children.stop > nodes or bounds != [int(start[node]), *stop[children].tolist()]:
            return f"node {node} and its children disagree"
        seen += int(forks[node])
    return "" if seen == nodes and (start[0], stop[0]) == (0, prompts) else "its nodes are not connected"
