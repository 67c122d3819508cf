"""Choices of one column per layer that meet a node's limits: made from its relaxation, then improved."""

from __future__ import annotations

from itertools import product

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.problem.aim import SLACK
from remoe_cli.plan.solve.node import Node

_REPAIRS = 8  # exchanges after which a choice that still breaks a limit is given up


def rounded(node: Node, used: Ints) -> Ints | None:
    """Round a relaxation to the best combination of the columns that it used, repaired and polished.

    Returns None when no combination can be repaired. The best one meets the limits at least cost, or else is nearest to them. A basic
    solution uses several columns in no more layers than there are limits, so there are few combinations.

    Shapes: [L].
    """
    starts = np.searchsorted(node.layer[used], np.arange(1, len(node.starts)))
    combined = [np.array(one) for one in product(*np.split(used, starts))]
    if not combined:
        return None
    chosen = repaired(node, min(combined, key=lambda one: (_violation(node.rows[:, one].sum(axis=1)), node.value(one))))
    return None if chosen is None else polished(node, chosen)


def repaired(node: Node, chosen: Ints) -> Ints | None:
    """Exchange one layer's column at a time while a limit is broken; None when that does not help.

    The exchange that mends most is taken; of equals, the cheapest.

    Shapes: [L].
    """
    layers = np.repeat(np.arange(len(node.starts)), np.diff(np.append(node.starts, len(node.layer))))
    for _ in range(_REPAIRS):
        total = node.rows[:, chosen].sum(axis=1)
        if _violation(total) == 0:
            return chosen
        then = _violation(total[:, None] + node.rows - node.rows[:, chosen][:, layers])
        cost = node.c - node.c[chosen][layers]
        at = int(np.lexsort((cost, then))[0])
        if then[at] >= _violation(total):
            return None
        chosen = np.where(np.arange(len(chosen)) == layers[at], at, chosen)
    return None


def polished(node: Node, chosen: Ints) -> Ints:
    """Take in each layer, one after the other, the cheapest column that the limits leave room for.

    Shapes: [L].
    """
    better = chosen.copy()
    total = node.rows[:, better].sum(axis=1, keepdims=True)
    ends = np.append(node.starts[1:], len(node.layer))
    for layer, (start, end) in enumerate(zip(node.starts.tolist(), ends.tolist(), strict=True)):
        now = int(better[layer])
        rest = total - node.rows[:, now, None]
        fits = (node.rows[:, start:end] + rest <= 1 + SLACK).all(axis=0)
        best = start + int(np.where(fits, node.c[start:end], np.inf).argmin())
        if node.c[best] < node.c[now]:
            better[layer], total = best, rest + node.rows[:, best, None]
    return better if node.meets(better) else chosen


def _violation(total: Floats) -> Floats:
    """Add up by how much the limits are broken; `total` [R] or [R, N]."""
    over: Floats = np.where(total > 1 + SLACK, total - 1, 0.0).sum(axis=0)
    return over
