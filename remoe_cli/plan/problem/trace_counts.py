"""Counts of a file of requests: how many there are of which length, and when they came.

A sentence says how the file was read.

Large plain CSV files are counted in columns (trace_arrow.py), in bounded memory. Of any other file, memory grows with the number of
different lengths, and by 8 bytes for each row with a timestamp: the times between requests are kept.
"""

from __future__ import annotations

import math
from array import array
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.sizes import Size
from remoe_cli.plan.problem.trace_arrow import CODE, HIGHEST, NOTHING, Counted, count_plain, merged
from remoe_cli.plan.problem.trace_formats import MS, NS, US, Key, TraceColumns, failed
from remoe_cli.plan.problem.trace_rows import FORM, read_rows
from remoe_cli.plan.wording import request_tokens

_LATEST_S = 1e12
_MANY = 2**20  # requests whose weights are added at once
_BATCH = 2**17  # rows that are counted, and numbers that are added, at a time
_LAYOUTS = 1000  # different sets of columns that the note speaks of
_NAMED = 8  # columns in one list of names
# Times since 1970 in small units are told by their size: from 1973 on they are at least this, and less than 1,000 times as much until 5138.
_EPOCHS = ((NS, 1e17), (US, 1e14), (MS, 1e11))
_UNIT_NAMES = {1.0: "s", MS: "ms", US: "us", NS: "ns"}


@dataclass(frozen=True)
class Trace:
    """The requests of a file, by length.

    n_in, n_out   int64 [P]: the different lengths, ascending
    weights       float64 [P]: the weight of one request
    copies        int64 [P]: how many requests have this length and weight
    gaps_s        float64 [N - 1]: times between requests in the order of time; empty without timestamps
    per_hour      requests an hour, None without timestamps
    note          a sentence: how many requests over which time, which columns were read, which rows were left out
    gap_count     how many times between requests there are; `gaps_s` has the longest of them
    front         the longest requests (`Sizes.front`), where the lengths above are means of bins; else empty
    """

    n_in: Ints
    n_out: Ints
    weights: Floats
    copies: Ints
    gaps_s: Floats
    per_hour: float | None
    note: str
    gap_count: int = 0
    front: tuple[Size, ...] = ()


def read_trace(path: Path, most_tokens: int | None = None) -> Trace:
    """Count the requests of a file by their lengths.

    most_tokens   leave out requests with more tokens, where the lengths come in bins

    Raises: UsageError for what is not a file of requests, naming the row, the columns that were found and those that are needed.
    """
    with closing(read_rows(path)) as read:
        first = next(read, None)
    if first is not None and all(isinstance(key, int) for key in first[1].n_in):
        counted = count_plain(path, first[1], most_tokens)
        made = None if counted is None else _of_columns(path, first[1], counted)
        if made is not None:
            return made
    return _of_rows(path)


def _of_columns(path: Path, columns: TraceColumns, counted: Counted) -> Trace | None:
    """Make the trace of what was counted in columns; None where its times need the reader of rows, or are none."""
    unit, gaps_s, span_s = 1.0, counted.gaps, 0.0
    if columns.times:
        if counted.first is None or counted.last is None or counted.first < 0:
            return None
        ends = np.array([counted.first, counted.last])
        unit = (1.0 if counted.dated else columns.times[0][1]) or epoch_unit(array("d", ends.tolist()))
        span_s, gaps_s = (counted.last - counted.first) / unit, counted.gaps / unit
        if counted.last / unit >= _LATEST_S or span_s < 1e-6:
            return None
    gaps, dated, front = counted.gap_count, counted.dated, counted.front if counted.binned else ()
    note = _note(path, [columns], counted.codes, counted.rows, counted.short, 0, span_s, gaps, dated, unit, front)
    lengths = (counted.codes // CODE, counted.codes % CODE, counted.weights, counted.copies)
    return Trace(*lengths, gaps_s, gaps / span_s * 3600 if gaps else None, note, gaps, front)


def _of_rows(path: Path) -> Trace:
    codes, weights, times = array("q"), array("d"), array("d")
    counted = NOTHING
    layouts: dict[TraceColumns, None] = {}
    rows = left_out = short = dated = known = 0
    with closing(read_rows(path)) as read:
        for number, columns, cells in read:
            if columns not in layouts and len(layouts) < _LAYOUTS:
                layouts[columns] = None
            lengths = None if columns.outcome and failed(columns, cells) else lengths_of(path, number, columns, cells)
            if lengths is None:
                left_out += 1
                continue
            n_in, n_out, weight = lengths
            rows, short = rows + 1, short + (n_out < 0.5)
            codes.append(round(n_in) * CODE + max(1, round(n_out)))
            weights.append(weight)
            if len(codes) >= max(_BATCH, len(counted[0])):
                counted, codes, weights = merged(counted, np.frombuffer(codes, np.int64), np.frombuffer(weights)), array("q"), array("d")
            for key, unit, _ in columns.times:
                if cells[key] not in (None, ""):
                    value, is_date = time_of(path, number, cells[key], unit)
                    times.append(value)
                    dated += is_date
                    known += is_date or unit is not None
                    break
    if not rows:
        failures = f" that were answered: all {left_out} failed, or have no prompt or no answer" if left_out else ""
        raise UsageError(f"{path} holds no requests{failures}.", FORM)
    if times and len(times) < rows:
        raise UsageError(f"{path}: {rows - len(times)} of {rows} rows have no timestamp.", "Give every row one, or none.")
    unit = 1.0 if known else epoch_unit(times)
    gaps_s = _gaps_s(path, times, unit)
    per_hour = len(gaps_s) / total(gaps_s) * 3600 if len(gaps_s) else None
    code, weight_of, copies = merged(counted, np.frombuffer(codes, np.int64), np.frombuffer(weights))
    span_s = float(gaps_s.sum())
    note = _note(path, list(layouts), code, rows, short, left_out, span_s, len(gaps_s), bool(dated), unit, ())
    return Trace(code // CODE, code % CODE, weight_of, copies, gaps_s, per_hour, note, len(gaps_s))


def _note(
    path: Path,
    layouts: list[TraceColumns],
    code: Ints,
    rows: int,
    short: int,
    left_out: int,
    span_s: float,
    gaps: int,
    dated: bool,
    unit: float,
    front: tuple[Size, ...],
) -> str:
    """Write how a file was read."""
    most = max(front, key=lambda size: size.tokens) if front else _most(code)
    per_hour = gaps / span_s * 3600 if gaps else None
    what = ("row" if any(columns.weight for columns in layouts) else "request") + ("" if rows == 1 else "s")
    rate = f" over {_span(span_s)}, {_count(per_hour)} an hour" if per_hour is not None else ""
    parts = (
        f"{_short(path.name)}: {rows:,} {what}{rate}",
        f"the longest of {request_tokens(most.n_in, most.n_out)}",
        *_columns_read(layouts, "dates" if dated else _UNIT_NAMES[unit] if gaps else None),
        f"{left_out:,} of {rows + left_out:,} left out, as they failed or have no prompt or no answer" if left_out else "",
        f"{short:,} {'answer' if short == 1 else 'answers'} of one token counted as two" if short else "",
    )
    return "; ".join(filter(None, parts)) + "."


def _most(code: Ints) -> Size:
    prompts, answers = code // CODE, code % CODE
    longest = int(np.argmax(prompts + answers))
    return Size(int(prompts[longest]), int(answers[longest]))


def total(values: Floats, copies: Ints | None = None) -> float:
    """Sum values, each `copies` times, in order, as the last bit depends on it."""
    batches = [slice(at, at + _BATCH) for at in range(0, len(values), _BATCH)]
    if copies is None:
        return float(sum(chain.from_iterable(values[batch].tolist() for batch in batches)))
    if copies.sum() > _MANY:
        return float(values @ copies)
    repeated = (map(repeat, values[batch].tolist(), copies[batch].tolist()) for batch in batches)
    return float(sum(chain.from_iterable(chain.from_iterable(repeated))))


def lengths_of(path: Path, number: int, columns: TraceColumns, cells: Any) -> tuple[float, float, float] | None:
    """Read prompt tokens, further tokens and weight of a row; None for a failed request."""
    for key in columns.summed:
        requests = _figure(path, number, cells, (key,), "requests", 0)
        if requests is not None and requests > 1:
            raise UsageError(f"{path}: row {number} sums up {requests:,.0f} requests.", "Give a file with one row for each request.")
    n_in = _figure(path, number, cells, columns.n_in, "n_in", 0 if columns.generated and not columns.n_out else 1)
    n_out = _figure(path, number, cells, columns.n_out, "n_out", 0)
    if n_out is None:
        generated = _figure(path, number, cells, columns.generated, "generated", 0)
        if generated is not None:
            if generated < 1 or (n_in is not None and n_in < 1):
                return None
            n_out = generated - 1
    if n_in is None or n_out is None:
        lacking = "prompt" if n_in is None else "answer"
        raise UsageError(f"{path}: row {number} lacks the length of the {lacking}; columns found: {_names(columns)}.", FORM)
    weight = _figure(path, number, cells, columns.weight, "weight", 0)
    return n_in, n_out, 1.0 if weight is None else weight


def _figure(path: Path, number: int, cells: Any, keys: tuple[Key, ...], what: str, least: int) -> float | None:
    for key in keys:
        text = cells[key]
        if text is None or text == "":
            continue
        try:
            value = math.nan if isinstance(text, bool) else float(text)  # true is no number of tokens
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if least <= value < HIGHEST:
            return value
        if isinstance(text, str) and len(text) > 1000:
            raise UsageError(f"{path}: row {number} is not CSV or JSON with numbers: {what} has {len(text):,} characters.", FORM)
        raise UsageError(f"{path}: row {number} has {what} {_short(repr(text))}, not a number of {least} or more.", FORM)
    return None


def time_of(path: Path, number: int, time: Any, unit: float | None) -> tuple[float, bool]:
    """Read a row's time in seconds, and say whether it is a date."""
    for read in (_date_s, float) if isinstance(time, str) and time[4:5] == "-" else (float, _date_s):
        try:
            value = read(time)
        except (TypeError, ValueError, OverflowError):
            continue
        is_date = read is _date_s
        if not is_date:
            value /= unit or 1.0
        if abs(value) < (_LATEST_S if is_date or unit else 1e19):
            return value, is_date
        break
    raise UsageError(f"{path}: row {number} has the timestamp {_short(repr(time))}.", "Give seconds, or dates as 2026-11-25 18:15:46.68.")


def _date_s(date: Any) -> float:
    """Read a date; one without a zone is UTC."""
    moment = datetime.fromisoformat(str(date).strip().removesuffix(" UTC"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def epoch_unit(times: array[float]) -> float:
    """Find how many units a second has: of an epoch time if all are that large, else 1."""
    sizes = np.abs(np.frombuffer(times)) if times else np.zeros(1)
    return next((unit for unit, least in _EPOCHS if sizes.min() >= least and sizes.max() < 1000 * least), 1.0)


def _gaps_s(path: Path, times: array[float], unit: float) -> Floats:
    """Sort times and take their differences in seconds, in place, for there may be millions."""
    moments: Floats = np.frombuffer(times)
    if len(moments) < 2:
        return np.empty(0)
    moments.sort()
    moments /= unit
    if max(-moments[0], moments[-1]) >= _LATEST_S:
        raise UsageError(
            f"{path}: timestamps go from {moments[0]:g} to {moments[-1]:g}, which are no seconds.",
            "Name the column with its unit, as in timestamp_ms, or give seconds or dates.",
        )
    if moments[-1] - moments[0] < 1e-6:  # a date tells no less
        raise UsageError(f"{path}: all requests have the same timestamp.", "Leave the column out, and say --requests-per-hour.")
    for at in range(0, len(moments) - 1, _BATCH):
        end = min(at + _BATCH, len(moments) - 1)
        moments[at:end] = moments[at + 1 : end + 1] - moments[at:end]
    gaps_s = moments[:-1]
    gaps_s.flags.writeable = False
    return gaps_s


def _columns_read(layouts: list[TraceColumns], unit: str | None) -> tuple[str, str]:
    """Write which columns were read, in which unit of time, and which were not, so that a reader sees a wrong one."""
    used = dict.fromkeys(name for columns in layouts for name in columns.used)
    timed = dict.fromkeys(
        f"{name} ({_UNIT_NAMES[per_s] if per_s else unit})" for columns in layouts for _, per_s, name in columns.times[:1] if unit
    )
    ignored = dict.fromkeys(name for columns in layouts for name in columns.ignored if name not in used)
    formats = dict.fromkeys(columns.format.name for columns in layouts if columns.format.name)
    return (
        f"columns {_listed([*used, *timed])} used" + (f" as in {' and '.join(formats)}" if formats else ""),
        f"{_listed(list(ignored))} ignored" if ignored else "",
    )


def _names(columns: TraceColumns) -> str:
    return _listed([*columns.used, *(name for *_, name in columns.times), *columns.ignored]) or "none"


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*map(_short, names[:_NAMED]), *more])


def _short(text: str) -> str:
    """Cut text for a message to 60 characters, and escape those that no terminal should get."""
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _span(seconds: float) -> str:
    """Write a time in its two largest units, such as 1 h 40 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    left, parts = round(seconds), []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])
