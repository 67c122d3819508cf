"""Large plain files are counted in columns: as the reader of rows counts them, and with bounded memory where lengths are many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.problem import trace_arrow, trace_counts
from remoe_cli.plan.problem.sizes import sizes_of
from remoe_cli.plan.problem.trace_counts import Trace, read_trace
from remoe_cli.plan.problem.trace_traffic import read_traffic

ROWS = 400


def lengths(seed: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(seed)
    n_in, n_out = np.ceil(random.lognormal(5, 1.5, ROWS)), np.ceil(random.lognormal(4, 1, ROWS))
    return [(int(a), int(b)) for a, b in zip(n_in, n_out, strict=True)]


def dates(zone: str, digits: int) -> list[str]:
    moments = np.datetime64("2024-05-10T23:59:50", "us") + np.cumsum(np.random.default_rng(1).integers(0, 90_000_000, ROWS))
    return [str(moment).replace("T", " ")[: 20 + digits] + "0" * max(0, digits - 6) + zone for moment in moments.astype("datetime64[us]")]


def table(header: str, *columns: list[Any], end: str = "\n", delimiter: str = ",") -> str:
    rows = [delimiter.join(map(str, row)) for row in zip(*columns, strict=True)]
    return end.join([header.replace(",", delimiter), *rows]) + end


PAIRS = lengths(0)
IN, OUT = [a for a, _ in PAIRS], [b for _, b in PAIRS]
SECONDS = np.round(np.cumsum(np.random.default_rng(2).exponential(40, ROWS)), 3).tolist()
PLAIN = {
    "lengths": table("n_in,n_out", IN, OUT),
    "weights": table("n_in,n_out,weight", IN, OUT, [round(0.1 * (1 + at % 7), 1) for at in range(ROWS)]),
    "no weight": table("n_in,n_out,weight", IN, OUT, [at % 3 for at in range(ROWS)]),
    "seconds": table("n_in,n_out,timestamp", IN, OUT, SECONDS),
    "milliseconds": table("timestamp_ms,n_in,n_out", [round(1000 * s) for s in SECONDS], IN, OUT),
    "epoch in ms": table("n_in,n_out,timestamp", IN, OUT, [1_700_000_000_000 + round(1000 * s) for s in SECONDS]),
    "Azure 2023": table("TIMESTAMP,ContextTokens,GeneratedTokens", dates("", 7), IN, [b + 1 for b in OUT], end="\r\n"),
    "Azure 2024": table("TIMESTAMP,ContextTokens,GeneratedTokens", dates("+00:00", 6), IN, [b + 1 for b in OUT]),
    "further columns": table("user,n_in,n_out,model", ["ann"] * ROWS, IN, OUT, ["gpt, or"[:3]] * ROWS),
    "semicolons": table("n_in,n_out,timestamp", IN, OUT, SECONDS, delimiter=";"),
    "a byte order mark": "\ufeff" + table("n_in,n_out", IN, OUT),
    "fractions": table("n_in,n_out", [a + 0.5 for a in IN], [b + 0.4 for b in OUT]),
    "one token": table("n_in,output_tokens", IN, [1 + at % 2 for at in range(ROWS)]),
}
NOT_PLAIN = {
    "out of order": table("n_in,n_out,timestamp", IN, OUT, SECONDS[::-1]),
    "failed": table("n_in,output_tokens", IN, [at % 2 for at in range(ROWS)]),
    "a status": table("n_in,n_out,status", IN, OUT, [200 + 300 * (at % 2) for at in range(ROWS)]),
    "an empty cell": table("prompt_tokens,input_tokens,n_out", [a if a % 2 else "" for a in IN], IN, OUT),
    "quotes": table('"n_in","n_out"', [f'"{a}"' for a in IN], OUT),
    "JSON lines": "".join(f'{{"n_in": {a}, "n_out": {b}}}\n' for a, b in PAIRS),
    "short rows": table("n_in,n_out", IN, OUT) + "9,9,9\n",
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each file was counted in columns."""
    found: list[bool] = []

    def spy(*args: Any) -> Any:
        made = trace_arrow.count_plain(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(trace_arrow, "_ENOUGH_BYTES", 0)
    monkeypatch.setattr(trace_arrow, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(trace_counts, "count_plain", spy)
    return found


def by_rows(path: Path) -> Trace:
    return trace_counts._of_rows(path)


@pytest.mark.parametrize("name", PLAIN | NOT_PLAIN)
def test_both_readers_count_alike(name: str, counted: list[bool], tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text((PLAIN | NOT_PLAIN)[name], encoding="utf-8", newline="")
    got, expected = read_trace(path), by_rows(path)
    assert counted == ([name in PLAIN] if name != "JSON lines" else [])
    for field in ("n_in", "n_out", "weights", "copies"):
        assert getattr(got, field).tolist() == getattr(expected, field).tolist(), field
    assert got.gaps_s == pytest.approx(expected.gaps_s, abs=1e-6) and got.gap_count == expected.gap_count
    assert got.per_hour == (None if expected.per_hour is None else pytest.approx(expected.per_hour))
    assert got.note == expected.note


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,9", "row 401 has n_in 'x'"),
        ("0,9", "row 401 has n_in '0'"),
        ("9,-1", "row 401 has n_out '-1'"),
        ("1e9,9", "row 401 has n_in '1e9'"),
    ],
)
def test_an_error_names_the_row(row: str, message: str, counted: list[bool], tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(PLAIN["lengths"] + row + "\n")
    with pytest.raises(UsageError, match=message):
        read_trace(path)
    assert counted == [False]


@pytest.mark.parametrize("cover", [1.0, 0.95, 0.5])
def test_bins_keep_the_longest_requests_and_shares(
    cover: float, counted: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With far too many different lengths, means and percentiles are right to a 32nd, the longest requests exactly."""
    random = np.random.default_rng(3)
    pairs = [(int(a), int(b)) for a, b in np.ceil(random.lognormal((6, 4), 1, size=(20_000, 2)))]
    path = tmp_path / "requests.csv"
    path.write_text("n_in,n_out\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    exact = read_traffic(path, cover)
    monkeypatch.setattr(trace_arrow, "_MOST_PAIRS", 500)
    monkeypatch.setattr(trace_arrow, "_BLOCK_BYTES", 2**16)
    got = read_traffic(path, cover)
    assert all(counted) and len(got.sizes.n_in) < len(exact.sizes.n_in)
    assert got.served is not None and exact.served is not None
    assert got.served.share == pytest.approx(exact.served.share, abs=0.01) and got.served.share >= cover
    kept = [(1.0, a, b) for a, b in pairs if a + b <= got.served.tokens]
    assert got.served.tokens == max(a + b for _, a, b in kept)
    ends = ((1.0, n, got.served.tokens - n) for n in (got.served.n_in, got.served.tokens - got.served.n_out))  # which the deployment takes
    assert got.sizes.front == sizes_of((*kept, *ends)).front
    for kind, other in zip(got.lengths, exact.lengths, strict=True):
        assert kind.share == pytest.approx(other.share, abs=0.01)
        assert (kind.n_in, kind.n_out) == pytest.approx((other.n_in, other.n_out), rel=0.05)
    tokens = np.sort([a for _, a, _ in kept])
    for share in (0.5, 0.95, 0.99):
        assert got.sizes.prompt_at(share) == pytest.approx(tokens[int(share * len(tokens))], rel=1 / 32)


def test_only_the_longest_gaps_are_kept(counted: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(PLAIN["seconds"])
    exact = read_traffic(path)
    monkeypatch.setattr(trace_arrow, "_MOST_GAPS", 40)
    got = read_traffic(path)
    assert len(got.gaps_s) <= 80 < len(exact.gaps_s) and got.per_hour == pytest.approx(exact.per_hour)
    for ttl_s in (100.0, 150.0, 1000.0):
        assert got.cold_share(ttl_s) == exact.cold_share(ttl_s)
