"""Requests that are read and drawn for a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.problem.trace_requests import read_requests
from remoe_cli.simulate.requests import drawn, source_of


def trace(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_rows_are_read_in_the_order_of_time_with_their_own_lengths(tmp_path: Path) -> None:
    read = read_requests(trace(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:01:00,7,3\n2026-01-01 00:00:00,5,9\n"))
    assert np.diff(read.at_s).tolist() == [60.0]
    assert (read.n_in.tolist(), read.n_out.tolist()) == ([5, 7], [8, 2])


@pytest.mark.parametrize("unit", [1, 1000])
def test_times_since_1970_are_seconds_whatever_their_unit(tmp_path: Path, unit: int) -> None:
    read = read_requests(trace(tmp_path, f"timestamp,n_in,n_out\n{1764000000 * unit},5,5\n{1764000030 * unit},5,5\n"))
    assert np.diff(read.at_s).tolist() == [30.0]


def test_a_trace_with_some_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 of 2 rows have no timestamp"):
        read_requests(trace(tmp_path, "timestamp,n_in,n_out\n1,5,5\n,5,5\n"))


def test_a_trace_without_times_needs_a_rate(tmp_path: Path) -> None:
    timed = read_requests(trace(tmp_path, "n_in,n_out\n5,5\n6,6\n"))
    with pytest.raises(UsageError, match="does not tell when requests came"):
        source_of(timed, None, None)
    assert source_of(timed, 30.0, None).burstiness == 1.0


def bursts(tmp_path: Path) -> Path:
    """Ten requests in a second, then a quiet hour, many times."""
    rows = [f"{3600 * burst + 0.1 * each},{each + 1},5" for burst in range(200) for each in range(10)]
    return trace(tmp_path, "timestamp,n_in,n_out\n" + "\n".join(rows))


def test_drawn_requests_keep_bursts_and_rate(tmp_path: Path) -> None:
    source = source_of(read_requests(bursts(tmp_path)), None, None)
    made = drawn(source, 20_000, 0)
    gaps_s = np.diff(made.at_s)
    assert len(made.at_s) / made.over_s * 3600 == pytest.approx(source.per_hour)
    assert np.median(gaps_s) < 1 < 3000 < gaps_s.max()
    assert (gaps_s > 3000).mean() == pytest.approx(0.1, abs=0.02)
    # Neighbours stay neighbours: a request's prompt follows the one before it in its burst.
    assert (np.diff(made.n_in) == 1).mean() > 0.85


def test_another_rate_stretches_the_times_and_burstiness_draws_them_anew(tmp_path: Path) -> None:
    timed = read_requests(bursts(tmp_path))
    slow = drawn(source_of(timed, 1.0, None), 20_000, 0)
    assert len(slow.at_s) / slow.over_s * 3600 == pytest.approx(1.0)
    for variation in (0.5, 1.0, 3.0):
        gaps_s = np.diff(drawn(source_of(timed, 1.0, variation), 200_000, 0).at_s)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(variation, rel=0.03)


def test_the_same_seed_draws_the_same_requests(tmp_path: Path) -> None:
    source = source_of(read_requests(bursts(tmp_path)), None, None)
    one, same, other = (drawn(source, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.at_s, same.at_s) and not np.array_equal(one.at_s, other.at_s)
