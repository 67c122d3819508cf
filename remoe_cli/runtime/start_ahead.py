"""Start the expert functions that a prompt will need, before its forward pass comes to them.

A function that had no call for some time has no running instance any more. A pass would find the functions of one layer cold, then those
of the next, and wait for each start. So when a request begins, the functions that are probably gone and probably needed start at once,
each by a health call, while the main function computes the first layers. In this call they also read the experts that the prompt will
probably need. A call of rows waits for the start of its function, as a second call would only start a second instance.

A prompt of n tokens needs an expert with chance 1 - (1 - p)^n, where p is the share of prompt tokens of the plan's requests that need it,
and a function with the chance that it needs any of its experts. What has a chance of at least one half is started and read, the likeliest
functions first, as long as what this is expected to waste stays within a share of what a mean request costs. The first layer's functions
are not among them: their own calls come as soon.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from remoe_cli.lambda_limits import read_timeout_s
from remoe_cli.plan.arrays import Floats
from remoe_cli.runtime.calls import lost
from remoe_cli.runtime.invoke import Connect, FailedCall, Invocation, ping, start_instance
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.server_config import StartPolicy

_LIKELY = 0.5
_GONE = 0.9  # of the time without a call after which an instance is gone: the pass comes to it only some time later
ROWS_PER_REPLICA = 16  # fewer are not worth a second invocation
_AT_ONCE = 16  # starts: an account may have few concurrent calls, and a machine few cores
# Calls under way at once while functions start; in a forward pass there are at most as many as a layer has replicas, of all functions.
_CONNECTIONS = 8
_LATE_S = 0.25  # for starts under way at the end of a request


def missed(function: RemoteFunction, tokens: int) -> Floats:
    """Compute for each expert of a function the chance that a prompt of so many tokens does not need it.

    There are none where nobody knows the use of its experts.

    >>> missed(RemoteFunction("f", (0, 1), 1, 0.0, use=(0.5, 0.0)), tokens=3).tolist()
    [0.125, 1.0]
    """
    chances: Floats = function.not_used**tokens
    return chances


def likely_experts(function: RemoteFunction, tokens: int) -> tuple[int, ...]:
    """List the experts of a function that a prompt of so many tokens will probably need."""
    return tuple(function.experts[i] for i in np.flatnonzero(missed(function, tokens) <= 1.0 - _LIKELY).tolist())


def wasted_usd(function: RemoteFunction, miss: Floats, policy: StartPolicy) -> float:
    """Compute what starting an instance is expected to waste.

    That is a health call, a start in vain, and experts that are read in vain.
    """
    in_vain = float(miss[miss <= 1.0 - _LIKELY].sum())
    return policy.usd_per_call + float(miss.prod()) * function.start_usd + in_vain * function.expert_usd


def chosen(
    remote: Mapping[int, Sequence[RemoteFunction]],
    called_s: Mapping[str, float],
    now_s: float,
    tokens: int,
    policy: StartPolicy,
    held: Collection[tuple[int, int]] = (),
) -> list[RemoteFunction]:
    """Choose the functions to start for a prompt, in the order of their layers.

    `called_s` tells when each was called or started last. Experts that are `held` here, by layer and number, need no function.
    """
    later = [(layer, f) for layer in sorted(remote)[1:] for f in remote[layer]]
    gone = [(layer, f) for layer, f in later if now_s - called_s.get(f.name, float("-inf")) >= _GONE * policy.idle_s]
    miss = {f.name: missed(f, tokens) for _, f in gone}
    if held:
        miss |= {f.name: np.where([(layer, e) in held for e in f.experts], 1.0, miss[f.name]) for layer, f in gone if f.use}
    unused = {name: float(of_experts.prod()) for name, of_experts in miss.items()}
    likely = sorted((f for _, f in gone if unused[f.name] <= 1.0 - _LIKELY), key=lambda f: unused[f.name])
    left_usd, names = policy.most_usd, set[str]()
    for f in likely:
        left_usd -= instances(f, tokens) * wasted_usd(f, miss[f.name], policy)
        if left_usd < 0:
            break
        names.add(f.name)
    return [f for _, f in later if f.name in names]


def instances(function: RemoteFunction, tokens: int) -> int:
    """Count the instances among which the dispatcher will probably divide the rows of a prompt."""
    return max(1, min(function.replicas, int(tokens * sum(function.use)) // ROWS_PER_REPLICA, len(function.experts)))


@dataclass(frozen=True)
class Starting:
    """The functions of a main function that is being loaded, as they start.

    client   reaches them
    renew    makes a client with credentials that are read again
    starts   one for each, by what is waited for
    """

    client: Any
    renew: Callable[[], Any]
    pool: ThreadPoolExecutor
    sent: list[Invocation]
    starts: dict[Future[None], str]


def start_all(
    functions: Mapping[int, Sequence[RemoteFunction]], connect: Connect, sent: list[Invocation], policy: StartPolicy | None
) -> Starting:
    """Start one instance of every function at once, so that the first pass meets no cold start.

    Each reads the experts that a prompt of the plan will probably need. It goes on while torch is imported and the model loads.
    """
    every = [f for of_layer in functions.values() for f in of_layer]
    connections = max(_CONNECTIONS, *(sum(f.replicas for f in of_layer) for of_layer in functions.values())) if functions else 1
    # One client for all: each function's own timeout ends its calls, and none of them is given up before that.
    longest_s = max((f.timeout_s for f in every), default=0)
    # Twice the connections and threads: a try that nobody waits for any more keeps its own until it ends, as it is billed.
    renew = partial(connect, 2 * connections, read_timeout_s(longest_s))
    client = renew() if every else None
    # Threads only wait for answers, so there may be more of them than cores.
    pool = ThreadPoolExecutor(max_workers=2 * connections, thread_name_prefix="invoke")
    tokens = policy.n_in if policy else 0

    def start(function: RemoteFunction) -> None:
        try:
            sent.append(ping(client, function.name, likely_experts(function, tokens)))
        except FailedCall as error:
            sent.append(error.invocation)
            raise

    return Starting(client, renew, pool, sent, {pool.submit(start, function): function.name for function in every})


@dataclass
class Starts:
    """Starts functions ahead, and knows which starts are under way.

    client   makes the calls; asked each time
    sent     gets an invocation for each start
    """

    client: Callable[[], Any]
    sent: list[Invocation]
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_AT_ONCE, "start"))
    _starting: dict[str, list[Future[Invocation]]] = field(default_factory=dict)
    _awaited: set[Future[Invocation]] = field(default_factory=set)
    _untold: dict[Future[Invocation], str] = field(default_factory=dict)

    def begin(self, function: RemoteFunction, count: int, experts: Sequence[int]) -> None:
        """Start instances of a function, unless some are being started, and let them read some experts."""
        if any(not start.done() for start in self._starting.get(function.name, ())):
            return
        begun = [self._pool.submit(start_instance, self.client(), function.name, experts) for _ in range(count)]
        self._starting[function.name] = list(begun)
        self._untold |= dict.fromkeys(begun, function.name)

    def take(self, function: str) -> Future[Invocation] | None:
        """Return the start that the next call of a function has to wait for; None where there is none.

        One that is over is returned too, if no call has waited for it: the call after it still makes experts ready.
        """
        starts = self._starting.get(function)
        if not starts:
            return None
        if len(starts) > 1:
            return starts.pop(0)
        start = starts[0]
        if not start.done():
            self._awaited.add(start)
            return start
        del self._starting[function]
        if start in self._awaited:
            self._awaited.remove(start)
            return None
        return start

    def collect(self) -> None:
        """Note the starts that are over."""
        for start in [start for start in self._untold if start.done()]:
            del self._untold[start]
            self.sent.append(start.result())

    def settle(self) -> None:
        """Wait a moment for what is under way, and note what all were billed.

        What lasts on counts as unreported, and is noted when it ends.
        """
        wait_for(self._untold, _LATE_S)
        self.collect()
        for start, function in self._untold.items():
            self.sent.append(replace(lost(function), starts_ahead=1))
            start.add_done_callback(lambda done: self.sent.append(replace(done.result(), starts_ahead=0, late=True)))
        self._untold.clear()
