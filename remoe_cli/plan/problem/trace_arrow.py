"""Count a large CSV file of requests in columns, with pyarrow.

That is many times as fast as row by row, and memory does not grow with the number of rows.

Only plain files are counted here: no quotes to be healed, no empty cells, no failed requests, times in order. Any other file, and any
error, is left to the reader of rows (trace_counts.py), which names the row. Both count alike.

**Lengths** are kept one by one up to _MOST_PAIRS different pairs. Beyond, they are put into bins of at most 1/64 of their length, each
with its mean; the Pareto front stays exact. **Gaps** between requests are kept up to the _MOST_GAPS longest; only those decide what is
cold.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.sizes import Size, Sizes
from remoe_cli.plan.problem.trace_formats import TraceColumns

Counts = tuple[Ints, Floats, Ints]  # codes of lengths, weights, and how many requests have both
NOTHING: Counts = (np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
HIGHEST = 10**9  # lengths and weights stay below
CODE = 2**31  # both lengths of a request are one number: n_in * CODE + n_out
_MOST_PAIRS, _MOST_GAPS, _STEPS = 2**18, 2**20, 64
_BLOCK_BYTES = 2**23
_FRONT_TRIED = 16  # of the longest requests so far; most rows are shorter than one of them
_ENOUGH_BYTES = 2**20  # of a file for which it pays


@dataclass
class Counted:
    """What was counted.

    codes, weights, copies   n_in * 2**31 + n_out; the weight of one request; how many have both. In bins: of their means
    front                    the requests that no other one equals or exceeds in both lengths
    rows, short              requests, and those whose answer had one token
    gaps                     times between requests, in the file's unit: the longest; `gap_count` of them there are
    first, last              time of the first and the last request, None without times
    dated                    whether times are dates
    """

    codes: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    weights: Floats = field(default_factory=lambda: np.empty(0))
    copies: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    front: tuple[Size, ...] = ()
    rows: int = 0
    short: int = 0
    gaps: Floats = field(default_factory=lambda: np.empty(0))
    gap_count: int = 0
    first: float | None = None
    last: float | None = None
    dated: bool = False
    binned: bool = False


class _NotPlain(Exception):
    """The reader of rows has to look at this file."""


def count_plain(path: Path, columns: TraceColumns, most_tokens: int | None = None) -> Counted | None:
    """Count a file whose first row has these columns; None where it is small, or not plain.

    most_tokens   leave out requests with more tokens
    """
    lengths = (columns.n_out or columns.generated)[:1]
    if not columns.n_in or not lengths or columns.outcome or columns.summed or path.stat().st_size < _ENOUGH_BYTES:
        return None
    keys = {"n_in": columns.n_in[0], "n_out": lengths[0]}
    keys |= {"weight": columns.weight[0]} if columns.weight else {}
    keys |= {"time": columns.times[0][0]} if columns.times else {}
    try:
        return _count(path, {name: int(key) for name, key in keys.items()}, bool(columns.n_out), most_tokens)
    except (_NotPlain, pa.ArrowException, OSError, ValueError):
        return None


def _count(path: Path, keys: dict[str, int], is_further: bool, most_tokens: int | None) -> Counted:
    counted = Counted()
    with path.open("rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
        header = file.readline(2**20).decode("utf-8-sig").rstrip("\r\n")
        delimiter = max(",;\t|", key=header.count)
        if not header.strip() or '"' in header or "\r" in header or header.startswith("sep="):
            raise _NotPlain
        names = [f"c{at}" for at in range(header.count(delimiter) + 1)]
        wanted = {names[at]: name for name, at in keys.items()}
        types = {column: pa.float64() for column, name in wanted.items() if name != "time"}
        reader = csv.open_csv(
            file,
            csv.ReadOptions(column_names=names, block_size=_BLOCK_BYTES, use_threads=False),
            csv.ParseOptions(delimiter=delimiter, newlines_in_values=False),
            csv.ConvertOptions(include_columns=list(wanted), column_types=types, null_values=[""], strings_can_be_null=True),
        )
        for batch in reader:
            _add(counted, {name: batch.column(column) for column, name in wanted.items()}, is_further, most_tokens)
    if not counted.rows:
        raise _NotPlain
    return counted


def _add(counted: Counted, batch: dict[str, Any], is_further: bool, most_tokens: int | None) -> None:
    if any(column.null_count for column in batch.values()):
        raise _NotPlain
    n_in, n_out = (batch[name].to_numpy(zero_copy_only=False) for name in ("n_in", "n_out"))
    weight = batch["weight"].to_numpy(zero_copy_only=False) if "weight" in batch else np.ones(len(n_in))
    least = 0 if is_further else 1
    if not ((n_in >= 1) & (n_in < HIGHEST) & (n_out >= least) & (n_out < HIGHEST) & (weight >= 0) & (weight < HIGHEST)).all():
        raise _NotPlain  # failed requests, and errors
    if not is_further:
        n_out = n_out - 1
    if "time" in batch:
        _add_times(counted, batch["time"])
    prompts, answers = np.rint(n_in).astype(np.int64), np.maximum(1, np.rint(n_out).astype(np.int64))
    kept = np.ones(len(prompts), bool) if most_tokens is None else prompts + answers <= most_tokens
    counted.rows += len(prompts)
    counted.short += int((n_out < 0.5).sum())
    prompts, answers, weight = prompts[kept], answers[kept], weight[kept]
    longer = weight > 0
    for size in counted.front[:_FRONT_TRIED]:
        longer &= (prompts > size.n_in) | (answers > size.n_out)
    if longer.any():
        known = np.array(counted.front, dtype=np.int64).reshape(-1, 2)
        both = np.concatenate([prompts[longer], known[:, 0]]), np.concatenate([answers[longer], known[:, 1]])
        counted.front = Sizes(*both, np.ones(len(both[0]))).front
    _merge(counted, prompts * CODE + answers, weight)


def _merge(counted: Counted, codes: Ints, weights: Floats) -> None:
    """Add requests to what is counted, ascending in the code and then in the weight; into bins where these are too many."""
    code, weight, copies = merged((counted.codes, counted.weights, counted.copies), codes, weights)
    if len(code) > _MOST_PAIRS:
        code, weight, copies = _in_bins(code, weight, copies)
        counted.binned = True
    counted.codes, counted.weights, counted.copies = code, weight, copies


def merged(counted: Counts, codes: Ints, weights: Floats) -> Counts:
    """Add requests to what is counted; the result is ascending in the code and then in the weight."""
    code, weight = np.concatenate((counted[0], codes)), np.concatenate((counted[1], weights))
    if not len(code):
        return counted
    order = np.lexsort((weight, code))
    code, weight, copies = code[order], weight[order], np.concatenate((counted[2], np.ones(len(codes), np.int64)))[order]
    starts = np.flatnonzero(np.concatenate(([True], (code[1:] != code[:-1]) | (weight[1:] != weight[:-1]))))
    return code[starts], weight[starts], np.add.reduceat(copies, starts)


def _in_bins(code: Ints, weight: Floats, copies: Ints) -> tuple[Ints, Floats, Ints]:
    """Put lengths into bins, each with the mean of its lengths and of its weights."""
    n_in, n_out = code // CODE, code % CODE
    bins = _bin(n_in) * CODE + _bin(n_out)
    _, which = np.unique(bins, return_inverse=True)
    mass, count = np.bincount(which, weight * copies), np.bincount(which, copies)
    by = np.where(mass > 0, mass, 1.0)
    prompts, answers = (np.maximum(1, np.rint(np.bincount(which, n * weight * copies) / by)).astype(np.int64) for n in (n_in, n_out))
    each, number = mass / count, count.astype(np.int64)
    order = np.lexsort((each, prompts * CODE + answers))
    return (prompts * CODE + answers)[order], each[order], number[order]


def _bin(lengths: Ints) -> Ints:
    """Number the bin of each length: of one length below 2 * _STEPS, then of at most 1/_STEPS of it."""
    shift = np.maximum(0, np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) - 6)
    bins: Ints = (lengths >> shift) + shift * _STEPS
    return bins


def _add_times(counted: Counted, column: Any) -> None:
    if pa.types.is_timestamp(column.type):
        moments = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64()).to_numpy(zero_copy_only=False) // 1000 / 1e6
        counted.dated = True
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        moments = column.to_numpy(zero_copy_only=False).astype(np.float64)
    else:
        raise _NotPlain
    moments = moments if counted.last is None else np.concatenate([[counted.last], moments])
    gaps = np.diff(moments)
    if not np.isfinite(moments).all() or (gaps < 0).any():
        raise _NotPlain
    counted.first = float(moments[0]) if counted.first is None else counted.first
    counted.last = float(moments[-1])
    counted.gap_count += len(gaps)
    counted.gaps = np.concatenate([counted.gaps, gaps])
    if len(counted.gaps) > 2 * _MOST_GAPS:
        counted.gaps = np.partition(counted.gaps, len(counted.gaps) - _MOST_GAPS)[-_MOST_GAPS:]
