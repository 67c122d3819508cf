"""The tree of similar prompts: where every prompt is, what a search finds, and how a wrong file is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError
from remoe_cli.predict import tree
from remoe_cli.predict.medoids import _assign, _roulette, cost, k_medoids, swap_medoids

Floats = npt.NDArray[np.float32]


def clustered(n: int, groups: int = 40, d: int = 48, seed: int = 0, noise: float = 0.15) -> Floats:
    """Vectors in groups of unlike sizes around a direction that all share, as prompts lie; the groups do not depend on `seed`."""
    centres = np.random.default_rng(99).standard_normal((groups, d)) + 1.0
    generator = np.random.default_rng(seed)
    group = np.minimum(generator.geometric(min(1, 3 / groups), n) - 1, groups - 1)
    return (centres[group] + noise * generator.standard_normal((n, d))).astype(np.float32)


def brute_force(vectors: Floats, queries: Floats, alpha: int) -> npt.NDArray[np.intp]:
    v, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors.astype(np.float64), queries.astype(np.float64)))
    return np.argsort(-(q @ v.T), axis=1)[:, :alpha]


def assert_exact(vectors: Floats, queries: Floats, found: npt.NDArray[Any]) -> None:
    """Different prompts, as close as brute force's in float64, rank by rank; prompts that only rounding parts may change places."""
    assert all(len(set(row)) == len(row) for row in found.tolist())
    v, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors.astype(np.float64), queries.astype(np.float64)))
    cosines = q @ v.T
    best = -np.sort(-cosines, axis=1)[:, : found.shape[1]]
    assert np.allclose(np.take_along_axis(cosines, found, axis=1), best, rtol=0, atol=1e-6)


def recall(found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))


def assert_whole(grown: tree.Tree, vectors: Floats) -> None:
    """Every prompt is in exactly one leaf, with its own vector, and the stored form is accepted as a tree."""
    parts = [grown.order[grown.start[m] : grown.stop[m]] for m in grown.leaves]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(vectors)))
    assert sum(len(part) for part in parts) == len(vectors) and all(len(part) for part in parts)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(grown.vectors, (vectors / lengths)[grown.order], atol=1e-6)
    assert np.allclose(grown.centres, (vectors / lengths)[grown.medoid], atol=1e-6)
    assert tree.from_arrays(grown.to_arrays(), vectors).order.tolist() == grown.order.tolist()


def test_every_prompt_is_in_one_leaf_and_no_leaf_is_too_large() -> None:
    vectors = clustered(3000)
    built = tree.build(vectors, beta=50)
    assert_whole(built, vectors)
    assert (built.stop - built.start)[built.leaves].max() <= 50
    assert built.forks.max() <= tree.FORKS
    for m in range(1, len(built.start)):  # a centre is one of its own node's prompts
        assert built.medoid[m] in built.order[built.start[m] : built.stop[m]]


def test_the_seed_decides_the_tree() -> None:
    vectors = clustered(2000)
    arrays = [tree.build(vectors, seed=seed).to_arrays() for seed in (3, 3, 4)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    assert not np.array_equal(arrays[0]["order"], arrays[2]["order"])


def test_another_process_builds_the_same_tree() -> None:
    program = (
        "from tests.predict.test_tree import clustered, tree\nfrom hashlib import sha256\n"
        "grown = tree.add(tree.build(clustered(1500), seed=1), clustered(700, seed=5))\n"
        "print(sha256(b''.join(a.tobytes() for a in grown.to_arrays().values())).hexdigest())"
    )
    digests = set()
    for hash_seed in ("0", "1", "12345"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_alike_prompts_are_not_divided_for_ever() -> None:
    one = clustered(1)
    alike = np.repeat(one, 1000, axis=0)
    assert tree.build(alike, beta=50).leaves.tolist() == [0]
    mixed = np.concatenate([alike, clustered(400)])
    built = tree.build(mixed, beta=50)
    assert_whole(built, mixed)
    sizes = (built.stop - built.start)[built.leaves]
    assert sorted(sizes.tolist())[-1] >= 1000 and sorted(sizes.tolist())[-2] <= 50
    assert tree.search(built, one[0])[1].tolist() == pytest.approx([1.0] * 15, abs=1e-5)
    assert tree.build(np.zeros((300, 8), dtype=np.float32)).leaves.tolist() == [0]  # prompts without a token


@pytest.mark.parametrize("n", [1, 5, 14, 15, 16, 150])
def test_one_leaf_is_brute_force(n: int) -> None:
    vectors, queries = clustered(n), clustered(20, seed=1)
    built = tree.build(vectors)
    assert built.leaves.tolist() == [0]
    found, similarities = tree.search(built, queries)
    assert_exact(vectors, queries, found)
    assert found.shape == similarities.shape == (20, min(15, n))
    assert np.all(np.diff(similarities, axis=1) <= 0)
    for q in range(20):  # one query alone: the same answer, one axis less
        single, cosines = tree.search(built, 8 * queries[q])  # and its length is of no account: times 8 is exact
        assert np.array_equal(single, found[q]) and np.array_equal(cosines, similarities[q])


def test_a_search_finds_most_of_what_brute_force_finds_and_more_when_it_sees_more() -> None:
    vectors, queries = clustered(5000), clustered(200, seed=1)
    built = tree.build(vectors)
    truth = brute_force(vectors, queries, 15)
    paper, wide, everything = (recall(tree.search(built, queries, at_least=n)[0], truth) for n in (0, 1000, 5000))
    assert paper > 0.45 and wide > max(0.9, paper) and everything > 0.999


def test_without_a_word_a_search_sees_as_many_prompts_as_a_leaf_may_hold() -> None:
    vectors, queries = clustered(2000), clustered(100, seed=1)
    built = tree.build(vectors, beta=100)
    for default, stated in zip(tree.search(built, queries), tree.search(built, queries, at_least=100), strict=True):
        assert np.array_equal(default, stated)
    assert not np.array_equal(tree.search(built, queries)[0], tree.search(built, queries, at_least=0)[0])


def test_a_small_leaf_is_not_enough_so_the_siblings_are_searched() -> None:
    """Three prompts far from all others are a leaf of their own; a search there must fill up from the closest other leaf."""
    near, far = clustered(240, groups=2, noise=0.05), clustered(3, groups=1, noise=0.01)
    outliers = -far
    vectors = np.concatenate([near, outliers])
    built = tree.build(vectors, beta=150)
    leaf = next(m for m in built.leaves if 242 in built.order[built.start[m] : built.stop[m]])
    assert built.stop[leaf] - built.start[leaf] == 3
    found, similarities = tree.search(built, outliers[0], at_least=0)
    assert set(found[:3].tolist()) == {240, 241, 242} and len(set(found.tolist())) == 15
    assert similarities[2] > 0.99 and similarities[3] < 0
    parent = next(m for m in range(len(built.start)) if built.first[m] <= leaf < built.first[m] + built.forks[m])
    siblings = [m for m in range(built.first[parent], built.first[parent] + built.forks[parent]) if m != leaf]
    closest = max(siblings, key=lambda m: float(built.centres[m] @ outliers[0]))
    assert set(found[3:].tolist()) <= set(built.order[built.start[closest] : built.stop[closest]].tolist())


def test_new_prompts_are_added_without_losing_the_old() -> None:
    old, new = clustered(1000), clustered(1500, seed=7)
    before = tree.build(old, beta=50)
    grown = tree.add(before, new)
    every = np.concatenate([old, new])
    assert_whole(grown, every)
    assert (grown.stop - grown.start)[grown.leaves].max() <= 50
    assert np.array_equal(grown.start[:1], [0]) and len(grown.start) > len(before.start)
    found, similarities = tree.search(grown, every, at_least=0)
    assert np.mean(found[:, 0] == np.arange(2500)) > 0.95  # by the paper's rule each finds itself
    assert similarities[:, 0].min() > 0.9
    assert_exact(every, every[:50], tree.search(grown, every[:50], at_least=2500)[0])
    one_by_one = before
    for row in new[:30]:
        one_by_one = tree.add(one_by_one, row[None])
    assert_whole(one_by_one, every[:1030])


def test_a_stored_tree_answers_as_before(tmp_path: Path) -> None:
    vectors, queries = clustered(2000), clustered(50, seed=1)
    built = tree.build(vectors, beta=60, seed=5)
    artifacts.write_arrays(tmp_path / "tree.safetensors", built.to_arrays(), "predictor")
    again = tree.from_arrays(artifacts.read_arrays(tmp_path / "tree.safetensors"), vectors)
    for a, b in zip(tree.search(built, queries), tree.search(again, queries), strict=True):
        assert np.array_equal(a, b)
    assert (again.beta, again.most_forks, again.seed) == (60, tree.FORKS, 5)
    more = clustered(500, seed=8)
    assert np.array_equal(tree.add(again, more).order, tree.add(built, more).order)


def damaged(name: str, at: int, value: int) -> Callable[[dict[str, npt.NDArray[Any]]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda arrays: arrays.pop("order"), "'order' is missing"),
        (lambda arrays: arrays.update(start=arrays["start"][:-1]), "not all there"),
        (damaged("order", 0, 999), "over the 400 prompts"),
        (damaged("medoid", 1, 400), "a centre is no prompt"),
        (damaged("first", 0, 0), "node 0 and its children disagree"),  # a search would never end
        (lambda arrays: (damaged("forks", 0, 1)(arrays), damaged("first", 0, 0)(arrays)), "disagree"),  # the root as its own child
        (damaged("stop", 1, 2), "disagree"),
        (damaged("forks", 0, 0), "not connected"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(damage: Callable[[dict[str, npt.NDArray[Any]]], object], why: str) -> None:
    vectors = clustered(400)
    arrays = {name: array.copy() for name, array in tree.build(vectors).to_arrays().items()}
    damage(arrays)
    with pytest.raises(ArtifactError, match=why) as caught:
        tree.from_arrays(arrays, vectors)
    assert caught.value.hint


def test_a_tree_of_another_profile_is_refused() -> None:
    arrays = tree.build(clustered(400)).to_arrays()
    with pytest.raises(ArtifactError, match="the 401 prompts"):
        tree.from_arrays(arrays, clustered(401))


def test_features_decide_the_groups_and_vectors_the_descent() -> None:
    """VarED: two groups of activation matrices that vectors do not show."""
    vectors = clustered(300, groups=1)
    kind = np.arange(300) % 2
    features = np.stack([kind, 1 - kind], axis=1).reshape(300, 1, 2) + 0.01 * np.random.default_rng(0).standard_normal((300, 1, 2))
    built = tree.build(vectors, features=features, beta=160, forks=2)
    for m in built.leaves:
        assert len(set(kind[built.order[built.start[m] : built.stop[m]]])) == 1
    assert_whole(built, vectors)
    q = vectors[3] / np.linalg.norm(vectors[3])
    closest = built.leaves[np.argmax(built.centres[built.leaves] @ q)]
    assert set(tree.search(built, q, at_least=0)[0].tolist()) <= set(built.order[built.start[closest] : built.stop[closest]].tolist())


def exact_cost(x: Floats, medoids: npt.NDArray[np.intp]) -> float:
    return float(np.square(x[:, None] - x[medoids]).sum(axis=2).min(axis=1).sum())


def test_pam_costs_no_more_and_no_swap_improves_it() -> None:
    x = tree.unit(clustered(250))
    labels, medoids = k_medoids(x, 6, np.random.default_rng(0))
    swapped_labels, swapped = swap_medoids(x, medoids)
    assert cost(x, swapped_labels, swapped) <= cost(x, labels, medoids) * (1 + 1e-6)
    least = exact_cost(x, swapped)
    assert cost(x, swapped_labels, swapped) == pytest.approx(least, rel=1e-4)
    for gone in range(len(swapped)):
        for row in range(len(x)):
            trial = swapped.copy()
            trial[gone] = row
            assert exact_cost(x, trial) >= least * (1 - 1e-4)
    worst = swap_medoids(x, np.arange(6))[1]  # from a poor start it must really swap
    assert exact_cost(x, worst) < 0.9 * exact_cost(x, np.arange(6))
    built = [tree.build(x, method=method, beta=50) for method in ("k-medoids", "pam")]
    assert_whole(built[1], x)
    of_root = [b.medoid[b.first[0] : b.first[0] + b.forks[0]] for b in built]
    assert len(of_root[0]) == len(of_root[1]) and exact_cost(x, of_root[1]) < exact_cost(x, of_root[0])


def test_a_medoid_is_the_member_with_the_least_sum_of_distances() -> None:
    x = clustered(500, groups=8) * np.random.default_rng(1).uniform(0.5, 2, (500, 1)).astype(np.float32)
    labels, medoids = k_medoids(x, 8, np.random.default_rng(0))
    distances = np.square(x[:, None] - x[medoids]).sum(axis=2)
    assert np.allclose(distances[np.arange(500), labels], distances.min(axis=1), rtol=1e-4)
    assert np.bincount(labels, minlength=len(medoids)).min() > 0
    for cluster, medoid in enumerate(medoids):
        members = np.flatnonzero(labels == cluster)
        sums = np.square(x[members][:, None] - x[members]).sum(axis=(1, 2))
        assert np.square(x[members] - x[medoid]).sum() == pytest.approx(sums.min(), rel=1e-4)


def test_a_medoid_that_is_nobodys_closest_is_dropped() -> None:
    x = clustered(100)
    labels, medoids = _assign(x, np.square(x).sum(axis=1), np.array([7, 7, 60]))
    assert medoids.tolist() == [7, 60] and set(labels.tolist()) == {0, 1} and labels[[7, 60]].tolist() == [0, 1]


def test_the_start_avoids_what_is_chosen_already() -> None:
    """Ten far groups, one of them with nearly all rows: the roulette wheel must still find each."""
    rows = np.random.default_rng(1).standard_normal((10, 48)).astype(np.float32)
    x = np.concatenate([np.repeat(row[None], 1 if i else 500, axis=0) for i, row in enumerate(rows)])
    for seed in range(5):
        assert len(_roulette(x, np.einsum("nd,nd->n", x, x), 12, np.random.default_rng(seed))) == 10
        labels, medoids = k_medoids(x, 12, np.random.default_rng(seed))
        assert len(medoids) == 10 and len(set(labels[-9:].tolist())) == 9


def test_5000_prompts_are_a_tree_in_half_a_second(measured: Callable[[str], None]) -> None:
    vectors = clustered(5000, d=576, groups=200)
    start = time.thread_time()
    tree.build(vectors)
    seconds = time.thread_time() - start
    measured(f"5,000 vectors of 576 in {seconds:.2f} s of processor time")
    assert seconds < 1.5  # 0.5 on a machine that does nothing else
