"""Dividing rows into invocations: by the payload limit, and among replicas by work."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.function.codec import STORAGE, Batch, pack, to_wire, unpack
from remoe_cli.runtime import dispatch
from remoe_cli.runtime.dispatch import PAYLOAD_LIMIT_BYTES, divide

Rows = dict[int, npt.NDArray[Any]]
# Where many draws are divided, a limit that takes fewer bytes to reach than Lambda's.
LIMIT_BYTES = 100_000
EXPERT_ROWS = st.sampled_from([0.0, 7.3, 200.0, 1e6])


def numbered(counts: dict[int, int], width: int, dtype: str) -> Rows:
    """Rows that name their expert (column 0) and their place in it (columns 1 and 2); bfloat16 holds 256 values exactly."""
    rows = {}
    for expert, n in counts.items():
        x = np.zeros((n, width), STORAGE[dtype])
        x[:, 0], x[:, 1], x[:, 2] = expert, np.arange(n) // 256, np.arange(n) % 256
        rows[expert] = x
    return rows


def wire(batch: Batch) -> int:
    return len(to_wire(pack(batch)))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.dictionaries(st.integers(0, 255), st.integers(1, 900), min_size=1, max_size=12),
    width=st.sampled_from([3, 64, 300]),
    dtype=st.sampled_from(sorted(STORAGE)),
    replicas=st.integers(1, 5),
    expert_rows=EXPERT_ROWS,
)
def test_every_row_leaves_once_in_order_and_within_the_limit(
    counts: dict[int, int], width: int, dtype: str, replicas: int, expert_rows: float
) -> None:
    rows = numbered(counts, width, dtype)

    def divided(rows: Rows) -> list[Batch]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "PAYLOAD_LIMIT_BYTES", LIMIT_BYTES)
            return divide(rows, dtype, replicas, expert_rows)

    batches = divided(rows)
    parts: dict[int, list[npt.NDArray[Any]]] = {e: [] for e in rows}
    for batch in batches:
        assert wire(batch) <= LIMIT_BYTES
        back = unpack(pack(batch))  # the strict reader takes it
        for expert, part in zip(back.experts, np.split(back.data, np.cumsum(back.rows)[:-1]), strict=True):
            parts[expert].append(part)
    for expert, x in rows.items():
        assert np.array_equal(np.concatenate(parts[expert]), x)
        alone = wire(Batch(dtype, (expert,), (len(x),), x))
        assert len(parts[expert]) == 1 or alone > LIMIT_BYTES
    everything = sum(wire(Batch(dtype, (e,), (len(x),), x)) for e, x in rows.items())
    if everything <= LIMIT_BYTES:
        assert len(batches) <= replicas
    again = divided(dict(reversed(rows.items())))
    assert [(b.experts, b.rows) for b in again] == [(b.experts, b.rows) for b in batches]


@pytest.mark.parametrize("dtype", sorted(STORAGE))
def test_a_payload_is_filled_to_the_last_row(dtype: str) -> None:
    """Rows of one expert go out whole up to exactly the limit: one row more than fits makes a second invocation."""
    width = 2048

    def too_large(rows: int) -> bool:
        return wire(Batch(dtype, (0,), (rows,), np.zeros((rows, width), STORAGE[dtype]))) > PAYLOAD_LIMIT_BYTES

    most = bisect.bisect_left(range(5000), True, lo=1, key=too_large) - 1
    assert [b.rows for b in divide({0: np.zeros((most, width), STORAGE[dtype])}, dtype, 1, 0.0)] == [(most,)]
    assert [b.rows for b in divide({0: np.zeros((most + 1, width), STORAGE[dtype])}, dtype, 4, 0.0)] == [(most,), (1,)]


def test_decode_stays_one_invocation_however_many_replicas() -> None:
    (batch,) = divide(numbered(dict.fromkeys((9, 2, 5), 1), 8, "float32"), "float32", 4, 0.0)
    assert (batch.experts, batch.rows) == ((2, 5, 9), (1, 1, 1))


def test_replicas_share_the_rows_longest_first() -> None:
    """LPT by hand: 50 | 40 | 30, then 25 joins 30, 20 joins 40, 15 joins 50, and 10 joins 55."""
    counts = {0: 10, 1: 50, 2: 15, 3: 40, 4: 20, 5: 30, 6: 25}
    batches = divide(numbered(counts, 8, "float32"), "float32", 3, 0.0)
    assert [b.experts for b in batches] == [(1, 2), (3, 4), (0, 5, 6)]
    assert [sum(b.rows) for b in batches] == [65, 60, 65]


def test_replicas_share_the_work_of_reading_experts_too() -> None:
    """LPT by hand, where an expert costs 50 rows: 150 | 90, then 80 joins 90, 70 joins 150 and 60 joins 170. By rows alone, 100 would
    stand against all others."""
    counts = {0: 100, 1: 40, 2: 30, 3: 20, 4: 10}
    batches = divide(numbered(counts, 8, "float32"), "float32", 2, 50.0)
    assert [b.experts for b in batches] == [(0, 3), (1, 2, 4)]


def test_of_equals_the_lower_expert_goes_first_to_the_lower_replica() -> None:
    batches = divide(numbered(dict.fromkeys((7, 1, 4, 2), 20), 8, "float32"), "float32", 2, 10.0)
    assert [b.experts for b in batches] == [(1, 4), (2, 7)]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=20), replicas=st.integers(1, 6), expert_rows=EXPERT_ROWS)
def test_the_busiest_replica_is_within_lpts_bound(counts: list[int], replicas: int, expert_rows: float) -> None:
    batches = divide(numbered(dict(enumerate(counts)), 4, "float32"), "float32", replicas, expert_rows)
    bins = max(1, min(replicas, sum(counts) // 16, len(counts)))
    assert len(batches) == bins
    work = [n + expert_rows for n in counts]
    # Any list schedule ends within the mean plus (1 - 1/z) of its largest piece.
    busiest = max(sum(b.rows) + expert_rows * len(b.experts) for b in batches)
    assert busiest <= (sum(work) / bins + (1 - 1 / bins) * max(work)) * (1 + 1e-9)


def test_few_rows_are_not_worth_a_second_invocation() -> None:
    assert len(divide(numbered({0: 16, 1: 15}, 4, "float32"), "float32", 2, 0.0)) == 1
    assert len(divide(numbered({0: 16, 1: 16}, 4, "float32"), "float32", 2, 0.0)) == 2
