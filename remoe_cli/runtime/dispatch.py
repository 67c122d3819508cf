"""Compute the experts of one MoE layer while serving, local and remote ones at the same time.

The rows of all remote experts leave before the local experts start, in one invocation of each function that holds some of them. Only two
things divide an invocation: a payload above Lambda's limit, and, in prefill, replicas. Replicas share a function's experts by LPT, longest
processing time first (docs/reference/method.md, section 9).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from remoe_cli.function.codec import Batch, frame_bytes, wire_bytes
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES
from remoe_cli.model.exchange import Exchange
from remoe_cli.model.experts import ExpertLayer, run_experts
from remoe_cli.model.ffn import from_storage, to_storage
from remoe_cli.model.gpu_experts import GpuExperts
from remoe_cli.runtime import calls
from remoe_cli.runtime.answer import NOTHING_SAVED, Saved, Stop
from remoe_cli.runtime.calls import Caller
from remoe_cli.runtime.expert_cache import ExpertCache
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.server_config import StartPolicy
from remoe_cli.runtime.start_ahead import ROWS_PER_REPLICA, Starting, Starts, chosen, instances, likely_experts

Array = npt.NDArray[Any]


@dataclass
class Dispatcher:
    """Calls local and remote experts for the hook (model/experts.py).

    local    hidden layer -> expert id -> row of the layer's stacked weights on the host
    remote   hidden layer -> functions that hold all other experts
    gpu      hidden layer -> its experts on the GPU
    starts   hidden layer -> what gives the GPU more work before the layer waits (model/shared_experts.py)
    pool     threads that wait for invocations; with as many threads and connections as a layer has calls, no call waits for another
    sent     invocations since the last `take`, in the order of their answers: also those that failed, or that nobody waited for
    stopped  asked while a layer waits for its calls: when the main function's own time ends, it waits no longer
    seen     called with each layer and the ids of the experts that its tokens chose
    filling  marks tokens of a pass that stand for nothing: no expert computes them. None: there are none
    policy   when functions are started ahead; None: never
    called_s   when each function was called or started last, by `time.monotonic()`
    cache    has remote experts that are used as local ones; None: there is none
    at_hand  hidden layer -> remote experts of the last pass that the cache had
    deadline_s   when that is, by `time.monotonic()`: the latest of all requests that are being answered
    caller   makes the calls
    """

    client: Any
    local: Mapping[int, Mapping[int, int]]
    remote: Mapping[int, Sequence[RemoteFunction]]
    pool: ThreadPoolExecutor
    sent: list[Invocation] = field(default_factory=list)
    stopped: Callable[[], Stop | None] = lambda: None
    seen: Callable[[int, Array], None] = lambda layer, ids: None
    filling: Tensor | None = None
    deadline_s: float = math.inf
    gpu: Mapping[int, GpuExperts] = field(default_factory=dict)
    starts: Mapping[int, Callable[[Tensor], None]] = field(default_factory=dict)
    policy: StartPolicy | None = None
    called_s: dict[str, float] = field(default_factory=dict)
    cache: ExpertCache | None = None
    at_hand: dict[int, Collection[int]] = field(default_factory=dict)
    _saved: Saved = NOTHING_SAVED
    _exchange: Exchange = field(default_factory=Exchange)
    _under_way: dict[Future[Any], str] = field(default_factory=dict)
    caller: Caller = field(init=False)
    _ahead: Starts = field(init=False)

    def __post_init__(self) -> None:
        self.caller = Caller(self.client, self.pool, self.sent)
        self._ahead = Starts(lambda: self.caller.client, self.sent)

    def __call__(self, layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        n = layer.layer
        if self.filling is not None:
            index = index.masked_fill(self.filling, layer.experts)
        meanwhile, seen = self.starts.get(n, _nothing), partial(self.seen, n)
        return run_experts(layer, hidden, index, weights, self.local[n], self._send, self._exchange, self.gpu.get(n), meanwhile, seen)

    def take(self) -> list[Invocation]:
        """Return the invocations since the last call, and forget them."""
        self._ahead.collect()
        sent = self.sent[:]
        del self.sent[: len(sent)]  # a try that ends late may add to it meanwhile, in a thread of its own
        if self.cache:
            for call in sent:
                self.cache.learn(call)
            sent += self.cache.reads()
        return sent

    def take_saved(self) -> Saved:
        """Return the calls that the cache has saved since the last call, and forget them."""
        saved, self._saved = self._saved, NOTHING_SAVED
        return saved

    def settle(self) -> None:
        """Wait until no call is under way, so that whatever they are billed is in `sent`.

        A pass that failed may leave some.
        Where there is no time for that, they count as unreported, and what they are billed is in what the next `take` returns.
        """
        limit_s = calls.LAST_S if self.stopped() == "time-limit" else None
        late = wait_for(self._under_way, limit_s).not_done
        self.sent += [calls.lost(self._under_way[call]) for call in late]
        self._under_way.clear()
        self.caller.settle(limit_s)
        self._ahead.settle()

    def started(self, starting: Starting) -> None:
        """Take over the starts of all functions, so that `settle` waits for them."""
        self.called_s.update(dict.fromkeys(starting.starts.values(), time.monotonic()))
        self._under_way |= starting.starts

    def start_ahead(self, tokens: int) -> None:
        """Start the functions that a prompt of so many tokens will probably need.

        Those that are probably still there are left out (start_ahead.py).
        """
        if self.policy is not None:
            now_s, held = time.monotonic(), self.cache.held if self.cache else {}
            for function in chosen(self.remote, self.called_s, now_s, tokens, self.policy, held):
                self._ahead.begin(function, instances(function, tokens), likely_experts(function, tokens))
                self.called_s[function.name] = now_s

    def _send(self, layer: ExpertLayer, rows: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        dtype = next(iter(rows.values())).dtype
        stored = str(dtype).removeprefix("torch.")
        cache = self.cache
        here = cache.use(layer, list(rows)) if cache else {}
        self.at_hand[layer.layer] = here.keys()
        batches: list[tuple[RemoteFunction, Batch]] = []
        for function in self.remote[layer.layer]:
            needed = [e for e in function.experts if e in rows]
            if there := {e: to_storage(rows[e]) for e in needed if e not in here}:
                batches += [(function, batch) for batch in divide(there, stored, function.replicas, function.expert_rows)]
            elif needed and cache:
                self._saved += cache.saving(function.name, sum(len(rows[e]) for e in needed))
        start = time.monotonic()
        self.called_s.update({function.name: start for function, _ in batches})
        begun = [
            self.caller.begin(layer.layer, function, batch, start, self.deadline_s, self._ahead.take(function.name))
            for function, batch in batches
        ]

        def wait() -> dict[int, Tensor]:
            computed = {e: cache.run(layer, module, rows[e]) for e, module in here.items()} if cache else {}
            parts: dict[int, list[Array]] = {}
            for answer in self.caller.finish(begun, self.stopped):
                ends = np.cumsum(answer.rows)
                for expert, n, end in zip(answer.experts, answer.rows, ends, strict=True):
                    parts.setdefault(expert, []).append(answer.data[end - n : end])
            return computed | {e: from_storage(np.concatenate(p), dtype) for e, p in parts.items()}

        return wait


def _nothing(hidden: Tensor) -> None:
    pass


def divide(rows: Mapping[int, Array], dtype: str, replicas: int, expert_rows: float) -> list[Batch]:
    """Divide one function's rows into as few invocations as replicas and payload limit allow.

    The batches balance the work that the planner balances: `expert_rows` plus its own rows for each expert. An expert's rows stay together
    and in order, unless they alone exceed the payload limit.

    Shapes: rows[expert] is [rows of this expert, hidden width].

    >>> rows = {expert: np.zeros((count, 8), np.float32) for expert, count in ((0, 30), (1, 20), (2, 12))}
    >>> [batch.experts for batch in divide(rows, "float32", replicas=2, expert_rows=1.5)]
    [(0,), (1, 2)]
    """
    total = sum(len(x) for x in rows.values())
    bins = max(1, min(replicas, total // ROWS_PER_REPLICA, len(rows)))
    loads = [0.0] * bins
    groups: list[dict[int, Array]] = [{} for _ in range(bins)]
    for expert in sorted(rows, key=lambda e: (-len(rows[e]), e)):
        least = loads.index(min(loads))
        loads[least] += expert_rows + len(rows[expert])
        groups[least][expert] = rows[expert]
    return [batch for group in groups for batch in _within_limit(group, dtype)]


def _within_limit(group: Mapping[int, Array], dtype: str) -> list[Batch]:
    """Make one batch of a group of experts, or several where one would exceed the payload limit."""
    width = next(iter(group.values())).shape[1]
    pieces: list[tuple[int, Array]] = []
    # Rows of one expert that fill a payload (base64 makes 4 bytes of 3, between 2 quotes), so that no batch takes two pieces of it.
    head_bytes = frame_bytes(0, 1, width, dtype)
    fits = ((PAYLOAD_LIMIT_BYTES - 2) // 4 * 3 - head_bytes) // (frame_bytes(1, 1, width, dtype) - head_bytes)
    for expert in sorted(group):
        x = group[expert]
        pieces += [(expert, x[i : i + fits]) for i in range(0, len(x), fits)]
    batches: list[Batch] = []
    open_pieces: list[tuple[int, Array]] = []
    for piece in pieces:
        rows = sum(len(x) for _, x in (*open_pieces, piece))
        if open_pieces and wire_bytes(frame_bytes(rows, len(open_pieces) + 1, width, dtype)) > PAYLOAD_LIMIT_BYTES:
            batches.append(_batch(open_pieces, dtype))
            open_pieces = []
        open_pieces.append(piece)
    return [*batches, _batch(open_pieces, dtype)]


def _batch(pieces: Sequence[tuple[int, Array]], dtype: str) -> Batch:
    return Batch(dtype, tuple(e for e, _ in pieces), tuple(len(x) for _, x in pieces), np.concatenate([x for _, x in pieces]))
