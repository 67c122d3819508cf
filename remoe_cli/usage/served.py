"""The workload of a plan with the routing of served requests.

Served requests say how often each expert was used, not which experts one token used together, and a plan's cost depends on that. So the
tokens that the profile traced are weighed anew: as little as possible, but so that each expert is used as often as it was in serving.
This is generalised iterative scaling, whose result is the distribution of that property that is nearest to the traced one.

Source: Darroch and Ratcliff, "Generalized Iterative Scaling for Log-Linear Models", 1972.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.hits import Pattern
from remoe_cli.plan.problem.problem import Problem

_STEPS, _CLOSE = 200, 0.01
_RARELY = 1e-9  # the first weight of a set of experts that the profile did not trace


def with_routing(problem: Problem, prefill: Ints, decode: Ints) -> Problem:
    """Give a problem's requests the routing of served requests.

    A phase that nothing was served of stays as it is.

    Shapes: prefill and decode [L, E].
    """
    workload, use, patterns = problem.workload, problem.workload.use, problem.workload.patterns
    consecutive = workload.consecutive
    if prefill.sum(axis=1).all():
        use = prefill / prefill.sum(axis=1, keepdims=True) * problem.spec.top_k
    if decode.sum(axis=1).all():
        # One token of the profile is added, so that no expert of its tokens is never used.
        wanted = decode + workload.decode_hits
        patterns = tuple(tilted(pattern, row) for pattern, row in zip(patterns, wanted, strict=True))
        consecutive = None  # which tokens followed each other, serving does not tell: rows of a draft are drawn independently
    return replace(problem, workload=replace(workload, use=use, patterns=patterns, consecutive=consecutive))


def tilted(pattern: Pattern, wanted: Floats) -> Pattern:
    """Weigh sets of experts so that each expert is used as often as wanted.

    Shapes: wanted [E], in any unit.

    >>> sets, weights = tilted((np.array([[0, 1], [0, 2], [1, 2]]), np.array([4, 4, 4])), np.array([1.0, 0.5, 0.5]))
    >>> (weights / weights.sum()).round(2).tolist()
    [0.5, 0.5, 0.01]
    """
    sets, counts = pattern
    k, experts = sets.shape[1], len(wanted)
    wanted = wanted / wanted.sum()
    traced = np.zeros(experts + 1, dtype=bool)
    traced[sets] = True
    if lacking := [expert for expert in np.flatnonzero(wanted > 0).tolist() if not traced[expert]]:
        usual = np.argsort(-wanted, kind="stable").tolist()
        more = [sorted([expert, *[other for other in usual if other != expert][: k - 1]]) for expert in lacking]
        sets = np.concatenate([sets, np.array(more, dtype=sets.dtype)])
        counts = np.concatenate([counts, np.full(len(more), _RARELY * counts.sum())])
    factors = np.zeros(experts + 1)  # logarithms; the last is of an empty slot, which is -1
    weights = counts.astype(np.float64)
    for _ in range(_STEPS):
        weights = counts * np.exp(factors[sets].sum(axis=1))
        weights *= counts.sum() / weights.sum()
        used = np.bincount(sets.ravel() % (experts + 1), np.repeat(weights, k), experts + 1)[:experts]
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where((used > 0) & (wanted > 0), np.log(wanted * used.sum() / used), 0.0)
        factors[:experts] += step / k
        if np.abs(step).max(initial=0.0) < _CLOSE:
            break
    return sets, weights
