"""What remote experts take at worst, under a bound on their tokens. Arrays [L] are over layers.

Notation: the m least used experts of each layer are remote; of n tokens they get at most X = bound.together(n, m), and any one of them
Y = bound.largest(n, m); y memory, z replicas.

**Prefill.** Of experts that get at most Y tokens each and X together, the work sum_k tau_c(y, N_k) is convex in the N_k, so it is most when
floor(X / Y) experts get Y, one the rest, and the others next to none: W. LPT puts at most (z-1)/z of the largest item and 1/z of all on the
fullest of z replicas, so
  max_j ZT_lj <= elapsed((z-1)/z tau_c(y, Y) + W / z) + 2 ((z-1)/z Y + X / z) D / B + t_rem.
LPT looks at the work. That rows on the wire go with it, as the paper has it, is not certain, and little beside the work.

**Decode.** N_out tokens hit X remote experts, so one token hits X / N_out in the mean; how they are spread over the tokens is left to the
worst: the least concave function above rho(h), the time of the remote side for h hits, at that mean.

Source: method.md, sections 6 and 9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from remoe_cli.plan.arrays import Floats
from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.paper.bound import TokenBound
from remoe_cli.plan.problem.problem import Problem

_NEXT_TO_NONE = 1e-9


def prefill_s(problem: Problem, bound: TokenBound, n: float, m: int, memory_mb: Floats, replicas: int) -> Floats:
    """Bound the longest invocation of a prompt of n tokens (max_j ZT_lj), for functions of `memory_mb`.

    Shapes: [L].
    """
    together, largest = bound.together(n, m), bound.largest(n, m)
    if m == 0:
        return np.zeros(len(together))
    work_s = most_work_s(lambda tokens: expert_functions.expert_work_s(problem, memory_mb, tokens), m, together, largest)
    fullest_s = fullest(work_s, expert_functions.expert_work_s(problem, memory_mb, largest), replicas)
    inside_s = expert_functions.inside_s(problem, memory_mb, fullest_s, fullest(together, largest, replicas))
    return expert_functions.warm(problem).elapsed_s + inside_s


def fullest(total: Floats, largest: Floats, replicas: int) -> Floats:
    """Bound what LPT puts on the fullest replica."""
    return (replicas - 1) / replicas * largest + total / replicas


def most_work_s(work_s: Callable[[Floats], Floats], m: int, together: Floats, largest: Floats) -> Floats:
    """Compute W, for the time `work_s` of one expert of each layer.

    Shapes: [L].
    """
    full = np.minimum(m, np.floor(together / np.maximum(largest, _NEXT_TO_NONE) + _NEXT_TO_NONE))
    rest = np.minimum(together, m * largest) - full * largest
    one, last, few = (np.maximum(0.0, work_s(np.maximum(tokens, _NEXT_TO_NONE))) for tokens in (largest, rest, 0.0 * rest))
    most: Floats = full * one + np.where(full < m, last + (m - full - 1) * few, 0.0)
    return most


def decode_s(problem: Problem, bound: TokenBound, m: int, memory_mb: float) -> Floats:
    """Bound the remote side of one decode token, in the mean over a request's.

    Shapes: [L].
    """
    hits = np.arange(min(problem.spec.top_k, m) + 1)
    rho = expert_functions.decode_wait_s(problem, memory_mb, hits)
    return concave_above(rho, bound.together(problem.workload.n_out, m) / problem.workload.n_out)


def concave_above(values: Floats, at: Floats) -> Floats:
    """Evaluate at `at` the least concave function that is nowhere below `values` at 0, 1, 2 .."""
    hull: list[int] = []
    for h in range(len(values)):
        while len(hull) > 1 and _slope(values, hull[-2], hull[-1]) <= _slope(values, hull[-1], h):
            hull.pop()
        hull.append(h)
    return np.interp(at, hull, values[hull])


def _slope(values: Floats, first: int, last: int) -> float:
    return float(values[last] - values[first]) / (last - first)
