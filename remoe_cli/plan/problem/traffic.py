"""How long requests are and how often they come: one length, a distribution, or a trace of real requests."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from remoe_cli.errors import UsageError
from remoe_cli.plan.document import Lengths

KINDS = 4  # kinds of requests that stand for a distribution: what a plan costs bends with the length of prompts, but not sharply
# A file's columns, under remoe's names and those of Azure's published traces; generated tokens count the first one, n_out does not.
_COLUMNS = {
    "n_in": ("n_in", "ContextTokens", "prompt_tokens"),
    "n_out": ("n_out",),
    "generated": ("GeneratedTokens", "generated_tokens"),
    "time": ("timestamp", "TIMESTAMP", "time"),
    "weight": ("weight",),
}
_FORM = "Give CSV or JSON lines with n_in and n_out (or ContextTokens and GeneratedTokens), and timestamp or weight if you have them."


@dataclass(frozen=True)
class Traffic:
    """`gaps_s` are the times between requests, ascending in time, where a trace tells; `per_hour` is None where nothing does."""

    lengths: tuple[Lengths, ...]
    per_hour: float | None = None
    gaps_s: tuple[float, ...] = ()

    def cold_share(self, idle_ttl_s: float) -> float:
        """Share of requests that find nothing warm: those after a gap of at least `idle_ttl_s`. Without a trace, requests come
        at random (a Poisson process); without traffic none is cold."""
        if self.gaps_s:
            return sum(gap >= idle_ttl_s for gap in self.gaps_s) / len(self.gaps_s)
        return math.exp(-self.per_hour * idle_ttl_s / 3600) if self.per_hour is not None else 0.0


def one_length(n_in: int, n_out: int, per_hour: float | None = None) -> Traffic:
    """Requests of one length; raises UsageError for one below 1."""
    if min(n_in, n_out) < 1:
        raise UsageError("The workload needs at least 1 prompt token and 1 generated token.", "Give lengths of 1 or more.")
    return Traffic((Lengths(share=1.0, n_in=n_in, n_out=n_out),), per_hour)


def read_traffic(path: Path) -> Traffic:
    """A file of requests, one a row, all weighted alike unless there is a weight; at most KINDS kinds stand for them, each with the mean
    lengths of its equal part of the prompts by length. With timestamps it gives the traffic too.

    Raises UsageError for what is not such a file, naming the row.
    """
    rows = _rows(path)
    if not rows:
        raise UsageError(f"{path} holds no requests.", _FORM)
    parsed = [_request(path, number, row) for number, row in enumerate(rows, 1)]
    per_hour: float | None = None
    gaps: tuple[float, ...] = ()
    times = [time for *_, time in parsed if time is not None]
    if times and len(times) < len(parsed):
        raise UsageError(f"{path}: {len(parsed) - len(times)} of {len(parsed)} rows have no timestamp.", "Give every row one, or none.")
    if len(times) > 1:
        times.sort()
        gaps = tuple(later - earlier for earlier, later in pairwise(times))
        if times[-1] - times[0] < 1e-6:  # a date tells no less
            raise UsageError(f"{path}: all requests have the same timestamp.", "Leave the column out, and say --requests-per-hour.")
        per_hour = len(gaps) / sum(gaps) * 3600
    total = sum(weight for _, _, weight, _ in parsed)
    weighty = [(n_in, n_out, weight) for n_in, n_out, weight, _ in parsed if total > 0 and weight / total > 0]
    if not weighty:
        raise UsageError(f"{path}: all requests have the weight 0.", "Give a weight above 0, or leave the column out.")
    return Traffic(_kinds(weighty), per_hour, gaps)


def _kinds(requests: list[tuple[int, int, float]]) -> tuple[Lengths, ...]:
    """Equal parts by weight of the requests in order of length, each with its mean lengths; equal means are one kind."""
    requests = sorted(requests)
    total = sum(weight for *_, weight in requests)
    parts: list[list[tuple[int, int, float]]] = [[] for _ in range(KINDS)]
    before = 0.0
    for n_in, n_out, weight in requests:
        parts[min(KINDS - 1, int(before / total * KINDS + 1e-9))].append((n_in, n_out, weight))
        before += weight
    shares: dict[tuple[int, int], float] = {}
    for part in filter(None, parts):
        held = sum(weight for *_, weight in part)
        means = [max(1, round(sum(row[at] * row[2] for row in part) / held)) for at in (0, 1)]
        shares[means[0], means[1]] = shares.get((means[0], means[1]), 0.0) + held / total
    return tuple(Lengths(share=share, n_in=n_in, n_out=n_out) for (n_in, n_out), share in sorted(shares.items()))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", _FORM) from None
    if not text.lstrip().startswith("{"):
        reader = csv.DictReader(text.splitlines())
        try:
            return list(reader)
        except csv.Error as error:
            raise UsageError(f"{path}: row {max(1, reader.line_num)} is not CSV: {error}.", _FORM) from None
    rows = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise UsageError(f"{path}: row {number} is not a JSON object.", _FORM) from None
    return rows


def _request(path: Path, number: int, row: Mapping[str, Any]) -> tuple[int, int, float, float | None]:
    """Prompt tokens, further tokens, weight and time in seconds of one row."""

    def figure(what: str, least: float) -> float | None:
        text = next((row[name] for name in _COLUMNS[what] if row.get(name) not in (None, "")), None)
        if text is None:
            return None
        try:
            value = float(text)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not least <= value < 1e9:
            raise UsageError(f"{path}: row {number} has {what} {text!r}, not a number of {least:g} or more.", _FORM)
        return value

    n_in, n_out, generated, weight = figure("n_in", 1), figure("n_out", 1), figure("generated", 1), figure("weight", 0)
    if n_out is None and generated is not None:
        n_out = max(1.0, generated - 1)
    if n_in is None or n_out is None:
        raise UsageError(f"{path}: row {number} lacks the length of the {'prompt' if n_in is None else 'answer'}.", _FORM)
    time = next((row[name] for name in _COLUMNS["time"] if row.get(name) not in (None, "")), None)
    return round(n_in), round(n_out), 1.0 if weight is None else weight, None if time is None else _seconds(path, number, time)


def _seconds(path: Path, number: int, time: Any) -> float:
    """A date without a zone is UTC: no trace gets an hour more or less where this machine's clocks are changed."""
    try:
        seconds = float(time)
    except (TypeError, ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(str(time))
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            seconds = math.nan
    if not abs(seconds) < 1e12:
        raise UsageError(f"{path}: row {number} has the timestamp {time!r}.", "Give seconds, or dates as 2026-11-25 18:15:46.68.")
    return seconds
