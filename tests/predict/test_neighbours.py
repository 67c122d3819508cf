"""The default search for similar prompts: exact for few, the library's index for many, stored and grown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError
from remoe_cli.predict import neighbours
from tests.predict.test_tree import assert_exact, brute_force, clustered, recall


@pytest.mark.parametrize("n", [1, 10, 15, 2000])
def test_few_prompts_are_searched_exactly(n: int) -> None:
    vectors, queries = clustered(n), clustered(20, seed=1)
    nearest = neighbours.build(vectors)
    assert nearest.index is None and nearest.to_arrays() == {}
    found, similarities = neighbours.search(nearest, queries)
    assert_exact(vectors, queries, found)
    assert found.shape == similarities.shape == (20, min(15, n))
    assert np.array_equal(neighbours.search(nearest, 8 * queries[4])[0], found[4])


def test_many_prompts_are_searched_through_the_index_with_exact_cosines() -> None:
    vectors, queries = clustered(3000), clustered(100, seed=1)
    nearest = neighbours.build(vectors, exact=2999)
    assert nearest.index is not None
    found, similarities = neighbours.search(nearest, queries)
    assert recall(found, brute_force(vectors, queries, 15)) > 0.97
    v, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    assert np.allclose(similarities, np.einsum("qd,qad->qa", q, v[found]), atol=1e-6)  # bfloat16 would be off by 1e-3
    assert np.all(np.diff(similarities, axis=1) <= 0)


def test_the_same_prompts_give_the_same_bytes_and_a_stored_index_answers_as_before(tmp_path: Path) -> None:
    vectors, queries = clustered(1500), clustered(50, seed=1)
    nearest = neighbours.build(vectors, exact=0)
    for name in ("a", "b"):
        artifacts.write_arrays(tmp_path / name, neighbours.build(vectors, exact=0).to_arrays(), "predictor")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = neighbours.from_arrays(artifacts.read_arrays(tmp_path / "a"), vectors)
    for a, b in zip(neighbours.search(nearest, queries), neighbours.search(again, queries), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("exact", [0, 500, 10_000])
def test_new_prompts_are_found_and_the_old_index_stays(exact: int) -> None:
    old, new = clustered(500), clustered(300, seed=7)
    before = neighbours.build(old, exact=exact)
    grown = neighbours.add(before, new, exact=exact)
    every = np.concatenate([old, new])
    assert (grown.index is None) == (exact == 10_000)
    assert np.mean(neighbours.search(grown, every)[0][:, 0] == np.arange(800)) > 0.99
    assert len(before) == 500 and neighbours.search(before, new)[0].max() < 500


def test_an_index_that_does_not_fit_is_refused() -> None:
    vectors = clustered(300)
    arrays = neighbours.build(vectors, exact=0).to_arrays()
    with pytest.raises(ArtifactError, match="has 300 vectors of width 48, and its profile 301"):
        neighbours.from_arrays(arrays, clustered(301))
    for damaged in (arrays["graph"][:100], arrays["graph"][:-1000], np.zeros(5000, dtype=np.uint8), np.zeros(0, dtype=np.uint8)):
        with pytest.raises(ArtifactError, match="is damaged") as caught:
            neighbours.from_arrays({"graph": damaged}, vectors)
        assert caught.value.hint
