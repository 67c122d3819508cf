"""Choices of one column a layer that meet a node's limits: made from its relaxation, and made better layer by layer."""

from __future__ import annotations

from itertools import product

import numpy as np

from remoe_cli.plan.node import SLACK, Node
from remoe_cli.plan.workload import Floats, Ints

_MORE = (1.0, 1.001, 1.01, 1.05, 1.2, 1.6, 2.5)  # times the multipliers, until what is cheapest under them meets the limits


def rounded(node: Node, u: Floats, used: Ints) -> Ints | None:
    """[L], or None: the cheapest that meets the limits of what can be combined of the columns that the relaxation's solution uses, or else
    the cheapest columns under a little more than its multipliers; then polished.

    A basic solution uses several columns in no more layers than there are limits, so there are few combinations.
    """
    starts = np.searchsorted(node.layer[used], np.arange(len(node.starts)))
    options = [part.tolist() for part in np.split(used, starts[1:])]
    combined = [np.array(one) for one in product(*options)] if all(options) else []
    chosen = min(filter(node.meets, combined), key=node.value, default=None)
    if chosen is None:
        chosen = next(filter(node.meets, (node.reduced(u * more)[1] for more in _MORE)), None)
    return None if chosen is None else polished(node, chosen)


def polished(node: Node, chosen: Ints) -> Ints:
    """[L]: in place of each layer's column, layer after layer, the cheapest that the limits leave room for."""
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
