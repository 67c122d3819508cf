"""Columns of the exact programme: per layer every (remote set, memory, replicas) that may be part of an optimal plan.

With the main spec fixed, a column's share of TTFT, TPOT and cost is a constant, so the max() and the products of the
paper's non-linear programme disappear (planning study, section 1). C columns of all layers lie one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan import cost
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.workload import Bools, Floats, Ints


@dataclass(frozen=True)
class Columns:
    """All arrays run over the C columns, ascending in layer, except `starts` [L], the first column of each layer.

    members         bool [C, E]    the remote set
    memory_mb       0 for the empty set; replicas likewise
    count           experts in the set (m)
    local_s         prefill of the local experts at the profile's own speed
    zt_s, bill_usd  remote prefill, remote bill: see cost.RemoteSide
    local_hits, call_s, shares    [P_max, C]: hit law and its remote times, padded with share 0
    """

    starts: Ints
    layer: Ints
    members: Bools
    memory_mb: Ints
    replicas: Ints
    count: Ints
    local_s: Floats
    zt_s: Floats
    bill_usd: Floats
    local_hits: Floats
    call_s: Floats
    shares: Floats

    def prefill_s(self, speed: float) -> Floats:
        """[C]: max(local, ZT) of section 3 at a main function of relative speed `speed`."""
        return np.maximum(self.local_s / speed, self.zt_s)

    def decode_s(self, speed: float, local_step_s: float) -> Floats:
        """[C]: E[max(local, remote)] of one decode token."""
        total = np.zeros(len(self.layer))
        for hits, call_s, share in zip(self.local_hits, self.call_s, self.shares, strict=True):
            total += share * np.maximum(hits * (local_step_s / speed), call_s)
        return total

    def layer_plans(self, problem: cost.Problem, chosen: Ints) -> tuple[LayerPlan, ...]:
        """The layers of a plan from one chosen column per layer, ascending."""
        return tuple(
            LayerPlan(
                layer=problem.spec.moe_layers[index],
                remote=tuple(np.flatnonzero(self.members[column]).tolist()),
                memory_mb=int(self.memory_mb[column]),
                replicas=int(self.replicas[column]),
            )
            for index, column in enumerate(chosen)
        )


def build_columns(problem: cost.Problem, candidates: tuple[Bools, ...], payload_limited: bool = True) -> Columns:
    """Columns for the candidate sets [S, E] of each layer.

    Left out: what does not fit the function's memory or the payload, and, among the columns of one set, what another is as
    good as in remote prefill, remote decode and bill. Those are the only ways in which they differ, so nothing is lost.
    """
    layers = [_layer_columns(problem, index, sets, payload_limited) for index, sets in enumerate(candidates)]
    width = max(len(layer["shares"]) for layer in layers)
    sizes = [len(layer["count"]) for layer in layers]
    padded = {"local_hits", "call_s", "shares"}

    def join(name: str) -> Floats:
        if name in padded:
            return np.concatenate([np.pad(layer[name], ((0, width - len(layer[name])), (0, 0))) for layer in layers], axis=1)
        return np.concatenate([layer[name] for layer in layers])

    return Columns(
        starts=np.cumsum([0, *sizes[:-1]]),
        layer=np.repeat(np.arange(len(layers)), sizes),
        **{name: join(name) for name in layers[0]},  # type: ignore[arg-type]
    )


def _layer_columns(problem: cost.Problem, index: int, sets: Bools, payload_limited: bool) -> dict[str, Floats]:
    side, workload = problem.catalog.function, problem.workload
    tokens = workload.prefill_tokens[index]
    law = cost.hit_law(workload, index, sets)
    local_hits, _, shares = law
    count = sets.sum(axis=1)
    menu = np.array(side.memory_menu_mb)
    fits = cost.function_memory_bytes(problem, count, sets @ tokens)[:, None] <= menu * cost.MB
    by_replicas = [cost.remote_side(problem, index, sets, side.memory_menu_mb, z, law) for z in range(1, side.max_replicas + 1)]
    # [S, Y * z], memory first: of equally good columns the one of least memory, then of fewest replicas, is kept.
    zt = np.stack([r.zt_s for r in by_replicas], axis=2).reshape(len(sets), -1)
    bill = np.stack([r.bill_usd for r in by_replicas], axis=2).reshape(len(sets), -1)
    rows = np.stack([r.rows for r in by_replicas], axis=2).reshape(len(sets), -1)
    usable = np.repeat(fits, side.max_replicas, axis=1) & (count > 0)[:, None]
    if payload_limited:
        usable &= cost.payload_bytes(problem, rows) <= side.payload_limit_bytes
    calls = by_replicas[0].call_s
    keep = usable & ~_dominated(np.where(usable, zt, np.inf), np.repeat(calls, side.max_replicas, axis=0), np.where(usable, bill, np.inf))
    at_set, at = np.nonzero(keep)
    at_memory, at_replicas = at // side.max_replicas, at % side.max_replicas + 1
    empty = np.flatnonzero(count == 0)[:1]  # the empty set is one column, without memory and replicas
    at_all = np.concatenate([empty, at_set])
    none = np.zeros(len(empty))
    return {
        "members": sets[at_all],
        "memory_mb": np.concatenate([none, menu[at_memory]]).astype(np.int64),
        "replicas": np.concatenate([none, at_replicas]).astype(np.int64),
        "count": count[at_all],
        "local_s": cost.local_prefill_s(problem, tokens, sets)[at_all],
        "zt_s": np.concatenate([none, zt[at_set, at]]),
        "bill_usd": np.concatenate([none, bill[at_set, at]]),
        "local_hits": np.repeat(local_hits[:, None], len(at_all), axis=1).astype(np.float64),
        "call_s": np.concatenate([np.zeros((len(local_hits), len(empty))), calls[at_memory].T], axis=1),
        "shares": shares[at_all].T,
    }


def _dominated(zt: Floats, calls: Floats, bill: Floats) -> Bools:
    """[S, n]: whether another column of the same set is no worse in `zt` [S, n], every call [n, P] and `bill` [S, n], and better in one
    of them, or equal and earlier."""
    out = np.zeros(zt.shape, dtype=bool)
    order = np.arange(zt.shape[1])
    for other in order:
        no_slower, faster = (calls[other] <= calls).all(axis=1), (calls[other] < calls).any(axis=1)
        no_worse = (zt[:, other, None] <= zt) & no_slower & (bill[:, other, None] <= bill)
        better = (zt[:, other, None] < zt) | faster | (bill[:, other, None] < bill)
        out |= no_worse & (better | (other < order))
    return out
