"""Timing experts by the function's own arithmetic.

It runs as `python -m remoe_cli.profile.function_timing PERIOD_S FORM SHARD...`, with the form of function/ready.py.

Each line on stdin is a JSON list of token counts, ascending. The answer is a JSON list of [tokens, median seconds], which ends early when
a call takes too long. Between two lines, whoever started this process may change its CPU quota; this process does not know of it.

Calls come one by one, as they do when a model decodes: before each, the process sleeps for one to two periods of a CPU quota, so that it
starts with its whole quota at a random point of a period. Experts take turns, so that weights come from memory and not from the cache.
Only function/ is imported.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

from remoe_cli.function.expert_ffn import Expert, narrow
from remoe_cli.function.ready import ReadyExperts
from remoe_cli.function.weights import ShardFile

_CALLS, _LEAST_CALLS = 5, 3  # medians of 5 fit as well as medians of 9: the form of the curve errs more than they do
_ENOUGH_S = 2.0  # of calls for one point; a call that takes longer alone is the last of its line


def main(period_s: str, form: str, *paths: str) -> None:
    """Answer each line on stdin until it ends."""
    shards = [ReadyExperts(ShardFile(Path(path)), math.inf, form) for path in paths]
    experts = cycle([shard.get(e) for shard in shards for e in shard.shard.experts])
    random = np.random.default_rng(0)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(list(_points(json.loads(line), experts, float(period_s), random))) + "\n")
        sys.stdout.flush()


def _points(counts: list[int], experts: Iterator[Expert], period_s: float, random: np.random.Generator) -> Iterator[tuple[int, float]]:
    for n in counts:
        first = next(experts)  # all have the same width
        x = narrow(random.standard_normal((n, first.width), dtype=np.float32), first.spec.dtype)
        times: list[float] = []
        while len(times) < _CALLS and (len(times) < _LEAST_CALLS or sum(times) < _ENOUGH_S):
            expert = next(experts)
            time.sleep(period_s * (1 + random.random()))
            start = time.perf_counter()
            expert.run(x)
            times.append(time.perf_counter() - start)
        yield n, statistics.median(times)
        if min(times) > _ENOUGH_S:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
