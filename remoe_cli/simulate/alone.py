"""Requests arrive at instances that answer one at a time: how long each takes is known when it begins.

- Instances paid by use: a request that finds none idle starts one, and is refused beyond the account's limit. The instance that was used
  last is used next, so the others may go. It is paid while it answers.
- Rented instances answer in the order of arrival. One that scales to zero wakes with the first request.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import numpy as np

from remoe_cli.simulate.load import Load, Times
from remoe_cli.simulate.service import Service
from remoe_cli.simulate.warm import Warm


def serve(service: Service, load: Load) -> Times:
    """Let the requests arrive at instances that answer one at a time."""
    busy_s = load.prompt_s + load.n_out * load.tpot_s
    part = np.minimum(1.0, service.limit_s / np.maximum(busy_s, 1e-12))  # of an answer that the platform ends
    begins = _by_use if service.instances is None else _rented
    begun = begins(service, load, np.minimum(busy_s, service.limit_s).tolist())
    began_s, waits_s, taken = np.array(begun.began_s), np.array(begun.waits_s), ~np.array(begun.refused, dtype=bool)
    first_s = began_s + waits_s + load.prompt_s
    return Times(
        first_s=first_s,
        end_s=first_s + load.n_out * load.tpot_s,
        cold=taken & (waits_s > 0),
        taken=taken,
        answered=taken & (waits_s + busy_s <= service.limit_s),
        main_starts=begun.main_starts,
        function_starts=begun.function_starts,
        up_s=begun.up_s,
        paid_s=begun.paid_s,
        functions_usd=float(((load.prompt_usd + load.n_out * service.token_usd[1]) * part)[taken].sum()),
    )


class _Begun:
    """When requests began and how long they waited for a start then, as one after the other comes."""

    def __init__(self) -> None:
        self.began_s: list[float] = []
        self.waits_s: list[float] = []
        self.refused: list[bool] = []
        self.main_starts = self.function_starts = 0
        self.up_s = self.paid_s = 0.0

    def add(self, began_s: float, wait_s: float, refused: bool = False) -> None:
        self.began_s.append(began_s)
        self.waits_s.append(wait_s)
        self.refused.append(refused)


def _by_use(service: Service, load: Load, busy_s: list[float]) -> _Begun:
    begun, warm = _Begun(), Warm(service.functions)
    ends: list[float] = []
    idle: list[float] = []  # since when; the last one is used next
    for at_s, work_s, functions_s in zip(load.at_s.tolist(), busy_s, load.cold_s.tolist(), strict=True):
        while ends and ends[0] <= at_s:
            idle.append(heappop(ends))
        if len(ends) >= service.most:
            begun.add(at_s, 0.0, refused=True)
            continue
        started = not idle or at_s - idle[-1] >= service.idle_s
        if started:
            idle.clear()  # those below were idle for longer
            begun.main_starts += 1
        else:
            idle.pop()
        functions_started = warm.begin(at_s)
        wait_s = service.start_s if started else functions_s if functions_started else 0.0
        end_s = at_s + min(wait_s + work_s, service.limit_s)
        heappush(ends, end_s)
        warm.end(end_s)
        begun.paid_s += end_s - at_s
        begun.add(at_s, wait_s)
    begun.function_starts = warm.started
    return begun


def _rented(service: Service, load: Load, busy_s: list[float]) -> _Begun:
    begun, warm = _Begun(), Warm(service.functions)
    free = [0.0] * (service.instances or 1)  # when each instance has nothing to do
    waiting: deque[float] = deque()
    wakes = service.idle_s != float("inf")
    up_s, up_since, up_until, ready_s, last_s = 0.0, 0.0, -1.0, 0.0, 0.0
    for at_s, work_s, functions_s in zip(load.at_s.tolist(), busy_s, load.cold_s.tolist(), strict=True):
        while waiting and waiting[0] <= at_s:
            waiting.popleft()
        working = len(free) if waiting else sum(free_s > at_s for free_s in free)
        if working + len(waiting) >= service.most:
            begun.add(at_s, 0.0, refused=True)
            continue
        started = wakes and at_s >= up_until
        if started:
            up_s += max(0.0, up_until - up_since)
            up_since, ready_s = at_s, at_s + service.start_s
            begun.main_starts += 1
        begin_s = max(at_s, ready_s if wakes else 0.0, heappop(free))
        functions_started = warm.begin(begin_s)
        # A request that comes while the instance wakes waits for it before its turn, which is no wait for a start of its own.
        wait_s = functions_s if functions_started and not started else 0.0
        ended_s = begin_s + wait_s + work_s
        heappush(free, ended_s)
        up_until = max(up_until, ended_s + service.idle_s)
        warm.end(ended_s)
        last_s = max(last_s, ended_s)  # an earlier request may take longer
        if begin_s > at_s:
            waiting.append(begin_s)
        woken_s = service.start_s if started and begin_s == ready_s else 0.0
        begun.add(begin_s - woken_s, wait_s + woken_s)
    end_s = max(load.over_s, last_s)
    begun.up_s = min(end_s, up_s + max(0.0, min(up_until, end_s) - up_since)) if wakes else end_s
    begun.function_starts = warm.started
    return begun
