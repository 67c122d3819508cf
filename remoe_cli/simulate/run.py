"""Let requests arrive at one way of serving, one after another in the order of time.

- A main function paid by use starts an instance for a request that finds none with a free place, and refuses beyond the account's limit.
  The instance that was used last is used next, so the others may go. It is paid while it answers something.
- Rented instances answer as many requests at once as the plan says, in the order of arrival. One that scales to zero wakes with the first.
- Expert functions have as many instances as the requests that run need (`Functions.needed`). Beside a main function that starts, they start
  meanwhile; else the request waits for them.

A list and a heap do this, as a million requests shall take seconds: a general framework of processes takes several microseconds for each of
the events of a request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from remoe_cli.plan.arrays import Bools, Floats
from remoe_cli.simulate.requests import Arrivals
from remoe_cli.simulate.service import Functions, Service


@dataclass(frozen=True)
class Run:
    """What became of the requests.

    ttft_s, tpot_s   float64 [N], NaN for refused ones
    cold, refused    bool [N]: requests that waited for a start, and those without an answer: not taken, or ended by the platform
    usd, over_s      what all of it costs, over how many seconds
    up_share         part of the time in which rented instances were paid
    """

    ttft_s: Floats
    tpot_s: Floats
    cold: Bools
    refused: Bools
    usd: float
    over_s: float
    up_share: float
    tokens: int


class _Warm:
    """The instances of the expert functions: how many are in use, and since when the others are idle."""

    def __init__(self, functions: Functions) -> None:
        self._functions, self._running, self._used = functions, 0, 0
        self._ends: list[float] = []
        self._idle: list[float] = []  # the last one is used next
        self.started = 0

    def begin(self, at_s: float) -> bool:
        """Give a request its functions, and say whether one of each had to start."""
        needed = self._functions.needed
        while self._ends and self._ends[0] <= at_s:
            ended_s = heappop(self._ends)
            self._running -= 1
            while self._used > needed[self._running]:
                self._used -= 1
                self._idle.append(ended_s)
        self._running += 1
        starts = 0
        while self._used < needed[self._running]:
            self._used += 1
            if self._idle and at_s - self._idle[-1] < self._functions.idle_s:
                self._idle.pop()
            else:
                self._idle.clear()
                starts += 1
        self.started += starts
        return starts > 0

    def end(self, at_s: float) -> None:
        heappush(self._ends, at_s)


@dataclass(frozen=True)
class _Times:
    """When each request begins, how long it waits for a start then, and whether it is refused.

    up_s, paid_s   seconds in which rented instances are up, and in which instances that are paid by use answer
    """

    begun_s: Floats
    waits_s: Floats
    main_starts: Bools
    refused: Bools
    up_s: float
    paid_s: float
    function_starts: int


def run(service: Service, arrivals: Arrivals, seed: int) -> Run:
    """Simulate one way of serving."""
    random = np.random.default_rng(seed)
    n_out = arrivals.n_out
    warm_s = np.interp(arrivals.n_in, service.prompts, service.ttft_s)
    # The mean over the tokens of one answer; single tokens differ by the experts that they use.
    noise = random.standard_normal(len(warm_s)) * service.token_sd_s / np.sqrt(np.maximum(1, n_out))
    tpot_s = np.maximum(0.0, service.tpot_s + noise)
    busy_s = warm_s + n_out * tpot_s
    fits = _fits(service, arrivals)
    serve = _by_use if service.instances is None else _rented
    times = serve(service, arrivals.at_s[fits].tolist(), np.minimum(busy_s, service.limit_s)[fits].tolist(), arrivals.over_s)
    taken, begun_s, waits_s = np.zeros(len(fits), dtype=bool), np.zeros(len(fits)), np.zeros(len(fits))
    taken[fits], begun_s[fits], waits_s[fits] = ~times.refused, times.begun_s, times.waits_s
    answered = taken & (waits_s + busy_s <= service.limit_s)
    functions_usd = np.interp(arrivals.n_in, service.prompts, service.prefill_usd) + n_out * service.token_usd
    part = np.minimum(1.0, service.limit_s / np.maximum(busy_s, 1e-12))  # of an answer that the platform ends
    usd = float((functions_usd * part + service.usd_per_request)[taken].sum()) + service.usd_per_s * times.paid_s
    usd += service.start_usd * int(times.main_starts.sum()) + service.usd_per_hour * times.up_s / 3600
    usd += times.function_starts * (service.functions.start_usd if service.functions else 0.0)
    return Run(
        ttft_s=np.where(answered, begun_s - arrivals.at_s + waits_s + warm_s, np.nan),
        tpot_s=np.where(answered, tpot_s, np.nan),
        cold=taken & (waits_s > 0),
        refused=~answered,
        usd=usd,
        over_s=arrivals.over_s,
        up_share=times.up_s / arrivals.over_s if service.instances is not None else 0.0,
        tokens=int((n_out + 1)[answered].sum()),
    )


def _fits(service: Service, arrivals: Arrivals) -> Bools:
    """Say which requests are no longer than those that the deployment takes."""
    n_in, n_out, most = arrivals.n_in, arrivals.n_out, service.longest
    if most is None:
        return np.ones(len(n_in), dtype=bool)
    fits: Bools = (n_in <= most.n_in) & (n_out <= most.n_out) & (n_in + n_out <= most.tokens)
    return fits


@dataclass(eq=False)
class _Instance:
    """An instance that is paid by use: how many requests it answers, and since when it answers any, or is idle."""

    running: int = 0
    since_s: float = 0.0


def _by_use(service: Service, arrivals_s: list[float], busy_s: list[float], over_s: float) -> _Times:
    warm = None if service.functions is None else _Warm(service.functions)
    ends: list[tuple[float, int, _Instance]] = []
    idle: list[_Instance] = []  # the last one is used next
    free: list[_Instance] = []  # answer something, and have a place
    waits, starts, refused = [], [], []
    functions_s, paid_s = service.functions.wait_s if service.functions else 0.0, 0.0

    def end(at_s: float, instance: _Instance) -> float:
        """Take a request off an instance; returns the seconds to pay if it was the last one."""
        instance.running -= 1
        if instance.running:
            if instance.running == service.at_once - 1:
                free.append(instance)
            return 0.0
        if service.at_once > 1:
            free.remove(instance)
        answered_s, instance.since_s = at_s - instance.since_s, at_s
        idle.append(instance)
        return answered_s

    for number, (at_s, work_s) in enumerate(zip(arrivals_s, busy_s, strict=True)):
        while ends and ends[0][0] <= at_s:
            ended_s, _, instance = heappop(ends)
            paid_s += end(ended_s, instance)
        if len(ends) >= service.most:
            refused.append(True)
            starts.append(False)
            waits.append(0.0)
            continue
        started = False
        if free:
            instance = free[-1]
        elif idle and at_s - idle[-1].since_s < service.idle_s:
            instance = idle.pop()
            instance.since_s = at_s
        else:
            idle.clear()  # those below were idle for longer
            started, instance = True, _Instance(since_s=at_s)
        instance.running += 1
        if service.at_once > 1:
            if instance.running == 1:
                free.append(instance)
            if instance.running == service.at_once:
                free.remove(instance)
        functions_started = warm is not None and warm.begin(at_s)
        wait_s = service.start_s if started else functions_s if functions_started else 0.0
        end_s = at_s + min(wait_s + work_s, service.limit_s)
        heappush(ends, (end_s, number, instance))
        if warm is not None:
            warm.end(end_s)
        refused.append(False)
        starts.append(started)
        waits.append(wait_s)
    while ends:
        ended_s, _, instance = heappop(ends)
        paid_s += end(ended_s, instance)
    return _Times(
        np.array(arrivals_s), np.array(waits), np.array(starts, bool), np.array(refused, bool), 0.0, paid_s, warm.started if warm else 0
    )


def _rented(service: Service, arrivals_s: list[float], busy_s: list[float], over_s: float) -> _Times:
    warm = None if service.functions is None else _Warm(service.functions)
    free = [0.0] * ((service.instances or 1) * service.at_once)  # when each place of an instance has nothing to do
    waiting: deque[float] = deque()
    wakes = service.idle_s != float("inf")
    begun, waits, starts, refused = [], [], [], []
    functions_s = service.functions.wait_s if service.functions else 0.0
    up_s, up_since, up_until, ready_s = 0.0, 0.0, -1.0, 0.0
    last_s = 0.0
    for at_s, work_s in zip(arrivals_s, busy_s, strict=True):
        while waiting and waiting[0] <= at_s:
            waiting.popleft()
        working = len(free) if waiting else sum(free_s > at_s for free_s in free)
        if working + len(waiting) >= service.most:
            refused.append(True)
            starts.append(False)
            waits.append(0.0)
            begun.append(at_s)
            continue
        started = wakes and at_s >= up_until
        if started:
            up_s += max(0.0, up_until - up_since)
            up_since, ready_s = at_s, at_s + service.start_s
        begin_s = max(at_s, ready_s if wakes else 0.0, heappop(free))
        functions_started = warm is not None and warm.begin(begin_s)
        # A request that comes while the instance wakes waits for it before its turn, which is no wait for a start of its own.
        wait_s = functions_s if functions_started and not started else 0.0
        last_s = begin_s + wait_s + work_s
        heappush(free, last_s)
        up_until = max(up_until, last_s + service.idle_s)
        if warm is not None:
            warm.end(last_s)
        if begin_s > at_s:
            waiting.append(begin_s)
        refused.append(False)
        starts.append(started)
        begun.append(begin_s - (service.start_s if started and begin_s == ready_s else 0.0))
        waits.append(wait_s + (service.start_s if started and begin_s == ready_s else 0.0))
    end_s = max(over_s, last_s)
    up_s = min(end_s, up_s + max(0.0, min(up_until, end_s) - up_since)) if wakes else end_s
    return _Times(np.array(begun), np.array(waits), np.array(starts, bool), np.array(refused, bool), up_s, 0.0, warm.started if warm else 0)
