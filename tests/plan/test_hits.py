"""Counting hits: by hand, against plain loops, and the quick one for prefixes against the general one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.plan.problem import hits
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU, HitCounter, HitDistribution, HitShares, owners
from remoe_cli.plan.problem.traffic import one_length
from remoe_cli.plan.problem.workload import Workload, patterns_of


def workload_of(trace: Any, experts: int) -> Workload:
    """One request of a prompt token that uses all experts alike, so that the trace alone ranks them."""
    trace = np.asarray(trace, dtype=np.int64)
    use = np.full((trace.shape[1], experts), trace.shape[2] / experts)
    return Workload(one_length(1, 100), 0.0, use, trace, patterns_of(trace, experts))


def pairs(hits: HitDistribution, at: int) -> dict[tuple[int, int], float]:
    """Shares of one set by (local, busiest), without those that do not occur."""
    return {
        (a, b): share for a, b, share in zip(hits.local.tolist(), hits.busiest.tolist(), hits.shares[at].tolist(), strict=True) if share
    }


def counted(trace: Any, owner: Any) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Pairs and calls of one set, token by token."""
    seen: Counter[tuple[int, int]] = Counter()
    calls = [0.0] * (trace.shape[1] + 1)
    for token in trace.tolist():
        hits = Counter(int(owner[e]) for e in token if e >= 0 and owner[e] >= 0)
        seen[sum(e >= 0 for e in token) - hits.total(), max(hits.values(), default=0)] += 1
        for hit in hits.values():
            calls[hit] += 1 / len(trace)
    return {pair: times / len(trace) for pair, times in seen.items()}, calls


def test_by_hand() -> None:
    """Four tokens of three experts: 0, 1, 2 are remote, 0 and 2 in one function, 1 in another."""
    trace = [[0, 2, 1], [2, 0, 3], [3, 1, -1], [3, 4, -1]]
    hits = workload_of([[row] for row in trace], 5).hits.of_owners(0, np.array([[0, 1, 0, -1, -1], [-1, -1, -1, -1, -1]]))
    assert pairs(hits, 0) == {(0, 2): 0.25, (1, 2): 0.25, (1, 1): 0.25, (2, 0): 0.25}
    # Calls: the first token's of 2 and of 1 experts, the second's of 2, the third's of 1.
    assert hits.calls[0].tolist() == [0, 0.5, 0.5, 0]
    assert pairs(hits, 1) == {(3, 0): 0.5, (2, 0): 0.5} and not hits.calls[1].any()


def test_prefixes_by_hand() -> None:
    """Experts 3, 2, 1, 0 by rising use; the two or three least used go round two functions."""
    workload = workload_of([[[0, 1]], [[0, 1]], [[0, 2]], [[1, 2]], [[0, 3]]], 4)
    assert workload.ranks.tolist() == [[3, 2, 1, 0]]
    hits = workload.hits.of_prefixes(0, np.array([2, 3, 0]), 2)
    assert pairs(hits, 0) == pytest.approx({(2, 0): 0.4, (1, 1): 0.6})  # 3 | 2
    assert hits.calls[0] == pytest.approx([0, 0.6, 0])
    assert pairs(hits, 1) == pytest.approx({(1, 1): 0.8, (0, 1): 0.2})  # 3, 1 | 2: the token of 1 and 2 calls both
    assert hits.calls[1] == pytest.approx([0, 0.4 + 0.2 + 2 * 0.2 + 0.2, 0])
    assert pairs(hits, 2) == pytest.approx({(2, 0): 1.0})
    one = workload.hits.of_prefixes(0, np.array([3]), 1)
    assert pairs(one, 0) == pytest.approx({(1, 1): 0.8, (0, 2): 0.2})  # together they are one call of two
    assert one.calls[0] == pytest.approx([0, 0.8, 0.2])


@st.composite
def traces(draw: st.DrawFn) -> tuple[Any, int]:
    """A trace [T, L, k] of distinct experts, some slots skipped, and E; some experts are never used."""
    experts = draw(st.integers(1, 9))
    layers, k = draw(st.integers(1, 2)), draw(st.integers(1, min(experts, 4)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.0, 1.5, 4.0])) * random.standard_normal((layers, experts))
    tokens = draw(st.integers(1, 30))
    trace = np.argsort(-(logits + random.gumbel(size=(tokens, layers, experts))), axis=2)[:, :, :k]
    skipped = draw(st.sampled_from([0.0, 0.3, 1.0])) > random.uniform(size=trace.shape)
    return np.where(skipped, -1, trace), experts


CHECK = settings(max_examples=100, deadline=None)


@CHECK
@given(made=traces(), functions=st.integers(1, 4), data=st.data())
def test_the_law_of_prefixes_is_that_of_any_set(made: tuple[Any, int], functions: int, data: st.DataObject) -> None:
    trace, experts = made
    workload = workload_of(trace, experts)
    sizes = np.array(data.draw(st.lists(st.integers(0, experts), min_size=1, max_size=12)))
    for layer, rank in enumerate(workload.ranks):
        general = workload.hits.of_owners(layer, owners(rank < sizes[:, None], rank, functions))
        quick = workload.hits.of_prefixes(layer, sizes, functions)
        for at in range(len(sizes)):
            quickly = {pair: share for pair, share in pairs(quick, at).items() if share > 1e-12}
            assert quickly == pytest.approx(pairs(general, at), abs=1e-12)
            assert quick.calls[at] == pytest.approx(general.calls[at], abs=1e-12)
            assert quick.shares[at].sum() == pytest.approx(1, abs=1e-12)


@CHECK
@given(made=traces(), data=st.data())
def test_the_law_is_what_tokens_do(made: tuple[Any, int], data: st.DataObject) -> None:
    trace, experts = made
    layer = data.draw(st.integers(0, trace.shape[1] - 1))
    owner = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=experts, max_size=experts)))
    other = np.full(experts, -1)
    hits = workload_of(trace, experts).hits.of_owners(layer, np.stack([owner, other]))
    for at, one in enumerate((owner, other)):
        expected, calls = counted(trace[:, layer], one)
        assert pairs(hits, at) == pytest.approx(expected)
        assert hits.calls[at].tolist() == pytest.approx(calls)


@CHECK
@given(data=st.data(), experts=st.integers(1, 12), functions=st.integers(1, 5))
def test_owners_are_balanced(data: st.DataObject, experts: int, functions: int) -> None:
    """Every member has one function, no other expert has; functions differ by at most one expert, the earlier holding more; and of any of
    the least used members each holds its share, to one."""
    members = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=experts, max_size=experts), min_size=1, max_size=5)))
    rank = np.array(data.draw(st.permutations(range(experts))))
    owner = owners(members, rank, functions)
    assert ((owner >= 0) == members).all() and owner.max() < functions
    for row, holder in zip(members, owner, strict=True):
        by_use = [int(holder[e]) for e in sorted(np.flatnonzero(row), key=lambda e: int(rank[e]))]
        for least_used in range(1, len(by_use) + 1):
            held = [by_use[:least_used].count(function) for function in range(functions)]
            assert max(held) - min(held) <= 1 and held == sorted(held, reverse=True)


def test_owners_by_hand() -> None:
    members = np.array([[True, True, False, True, True], [False, False, False, False, True]])
    assert owners(members, np.array([4, 0, 1, 3, 2]), 2).tolist() == [[1, 0, -1, 0, 1], [-1, -1, -1, -1, 0]]


def asked(counter: HitCounter, layers: Any, owner: Any) -> HitShares:
    """Sets with experts on the GPU, each with rows of its own."""
    every = np.arange(len(owner))
    return counter.beside_gpu(layers, np.where(owner == ON_GPU, ON_CPU, owner), every, owner == ON_GPU, every)


@CHECK
@given(made=traces(), data=st.data())
def test_hits_on_the_gpu_are_what_tokens_do_however_often_they_are_asked_for(made: tuple[Any, int], data: st.DataObject) -> None:
    trace, experts = made
    workload = workload_of(trace, experts)
    places = st.lists(st.integers(ON_GPU, 2), min_size=experts, max_size=experts)
    owner = np.array(data.draw(st.lists(places, min_size=2, max_size=6)))
    owner[:, 0] = ON_GPU
    layers = np.sort(np.array(data.draw(st.lists(st.integers(0, trace.shape[1] - 1), min_size=len(owner), max_size=len(owner)))))
    asked(workload.hits, layers[: len(owner) // 2], owner[: len(owner) // 2])
    hits = asked(workload.hits, layers, owner)
    assert hits.gpu is not None
    for at, (layer, one) in enumerate(zip(layers.tolist(), owner, strict=True)):
        seen: Counter[tuple[int, int, int]] = Counter()
        for token in trace[:, layer].tolist():
            places_hit = Counter(int(one[e]) for e in token if e >= 0)
            seen[places_hit[ON_CPU], max((n for place, n in places_hit.items() if place >= 0), default=0), places_hit[ON_GPU]] += 1
        each = zip(hits.local.tolist(), hits.busiest.tolist(), hits.gpu.tolist(), hits.shares[at].tolist(), strict=True)
        found = {(local, busiest, gpu): share for local, busiest, gpu, share in each if share}
        assert found == pytest.approx({kind: tokens / len(trace) for kind, tokens in seen.items()})


def test_sets_with_experts_on_the_gpu_are_counted_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, counted = workload_of([[[0, 1], [1, 2]], [[2, 3], [0, 3]]], 4).hits, list[int]()
    add_up = hits._beside
    monkeypatch.setattr(hits, "_beside", lambda *some: (counted.append(len(some[2])), add_up(*some))[1])
    owner = np.array([[ON_GPU, 0, ON_CPU, ON_CPU], [ON_GPU, ON_GPU, 0, ON_CPU]])
    for layers in ([0, 0], [0, 1]):
        asked(counter, np.array(layers), owner)
    assert sum(counted) == 3  # the first set of the first layer is known by then
    first, other = asked(counter, np.array([0, 1]), owner[[0, 0]]).shares
    assert first.tolist() != other.tolist()
