"""The requests of a file one by one, in the order of time.

trace_counts.py counts them by length, which is enough for a plan.
"""

from __future__ import annotations

from array import array
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.trace_counts import epoch_unit, lengths_of, time_of
from remoe_cli.plan.problem.trace_formats import failed
from remoe_cli.plan.problem.trace_rows import FORM, read_rows


@dataclass(frozen=True)
class TimedRequests:
    """Requests in the order of time.

    at_s          float64 [N], ascending; empty without timestamps
    n_in, n_out   int64 [N]: prompt tokens, and tokens after the first
    """

    at_s: Floats
    n_in: Ints
    n_out: Ints


def read_requests(path: Path) -> TimedRequests:
    """Read every request of a file, as `read_trace` reads it; weights are left aside.

    Raises: UsageError for what is not a file of requests, naming the row, and for one where only some rows have a timestamp.
    """
    times, n_in, n_out = array("d"), array("q"), array("q")
    known = False
    with closing(read_rows(path)) as read:
        for number, columns, cells in read:
            lengths = None if columns.outcome and failed(columns, cells) else lengths_of(path, number, columns, cells)
            if lengths is None:
                continue
            n_in.append(round(lengths[0]))
            n_out.append(max(1, round(lengths[1])))
            for key, unit, _ in columns.times:
                if cells[key] not in (None, ""):
                    value, is_date = time_of(path, number, cells[key], unit)
                    times.append(value)
                    known = known or is_date or unit is not None
                    break
    if not n_in:
        raise UsageError(f"{path} holds no requests.", FORM)
    if times and len(times) < len(n_in):
        raise UsageError(f"{path}: {len(n_in) - len(times)} of {len(n_in)} rows have no timestamp.", "Give every row one, or none.")
    at_s = np.array(times) / (1.0 if known or not times else epoch_unit(times))
    order = np.argsort(at_s, kind="stable") if times else np.arange(len(n_in))
    return TimedRequests(at_s[order] if times else at_s, np.array(n_in, np.int64)[order], np.array(n_out, np.int64)[order])
