"""Requests arrive at instances that answer several at once, and share their steps.

How long each takes depends on who else is answered. As in runtime/batch.py, an instance makes decode steps, each of which gives every
request whose prompt is read its next token. Between two steps it reads one prompt, while the others wait, or a part of it where it is long:
prompts take turns, and a part takes what a prompt of its length does. So events are the ends of steps at which a prompt is read, or a
request ends; between them the requests of an instance stay the same, and so does the time of a step.

- An instance paid by use takes a request while it has a free place, the youngest one first; else a new one starts, and beyond the account's
  limit a request is refused. It is paid while it answers anything.
- Of rented instances the one with the fewest requests takes the next one, in the order of arrival. Those that scale to zero wake with the
  first request.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from remoe_cli.simulate.load import Load, Times
from remoe_cli.simulate.service import Service
from remoe_cli.simulate.warm import Warm

_EXACT = 1e-9  # of a step, so that rounding makes no step of its own


@dataclass(eq=False)
class _Instance:
    """An instance, as it is at `at_s`; until then it reads a prompt or starts, where that is later than now.

    steps      decode steps that it has made
    ends       of requests whose prompt is read: the step after which each has its whole answer
    reading    requests whose prompt is not read yet
    read_at    the step before which the next prompt is read
    looked     times that its next event has changed: what was said of it before does not count
    since_s    since when it answers anything, or is idle
    """

    at_s: float = 0.0
    steps: float = 0.0
    ends: dict[int, int] = field(default_factory=dict)
    reading: deque[int] = field(default_factory=deque)
    read_at: float = 0.0
    looked: int = 0
    since_s: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.ends) + len(self.reading)


class _Shared:
    """All instances of one way of serving, and what becomes of the requests."""

    def __init__(self, service: Service, load: Load) -> None:
        count = len(load.at_s)
        self.service, self.load, self.warm = service, load, Warm(service.functions)
        self.step_s, self.token_usd = service.step_s.tolist(), service.token_usd.tolist()
        self.at_s, self.prompt_s, self.n_out = load.at_s.tolist(), load.prompt_s.tolist(), load.n_out.tolist()
        self.prompt_usd, self.cold_s, self.unread = load.prompt_usd.tolist(), load.cold_s.tolist(), load.n_in.tolist()
        self.wait_s, self.first_s, self.end_s, self.begun_s = ([math.nan] * count for _ in range(4))
        self.taken, self.cut = [False] * count, [False] * count
        self.events: list[tuple[float, int, int, _Instance]] = []  # when, which request is ended by the platform (-1: none), looked
        self.instances = [] if service.instances is None else [_Instance() for _ in range(service.instances)]
        self.waiting: deque[int] = deque()
        self.open = self.main_starts = 0
        self.up_s, self.up_since, self.up_until, self.ready_s = 0.0, 0.0, -1.0, 0.0
        self.paid_s = self.usd = 0.0
        self.idle: list[_Instance] = []  # paid by use; the last one is used next

    def run(self) -> Times:
        for number, at_s in enumerate(self.at_s):
            self._until(at_s)
            if self.open >= self.service.most:
                continue
            self.taken[number] = True
            self.open += 1
            if self.service.instances is None:
                self._by_use(number, at_s)
            else:
                self._rented(number, at_s)
        self._until(math.inf)
        first_s, end_s, waits_s = np.array(self.first_s), np.array(self.end_s), np.array(self.wait_s)
        taken, cut = np.array(self.taken), np.array(self.cut)
        last_s = max(self.load.over_s, float(np.nanmax(end_s, initial=0.0)))
        if self.service.instances is not None:
            always = math.isinf(self.service.idle_s)
            self.up_s = last_s if always else min(last_s, self.up_s + max(0.0, min(self.up_until, last_s) - self.up_since))
        return Times(
            first_s=first_s,
            end_s=end_s,
            cold=taken & (waits_s > 0),
            taken=taken,
            answered=taken & ~cut,
            main_starts=self.main_starts,
            function_starts=self.warm.started,
            up_s=self.up_s,
            paid_s=self.paid_s,
            functions_usd=self.usd,
        )

    def _by_use(self, number: int, at_s: float) -> None:
        """Give a request an instance that has a free place, or is idle, or starts."""
        with_room = [each for each in self.instances if each.requests < self.service.at_once]
        started = False
        if with_room:
            instance = with_room[-1]
        else:
            if self.idle and at_s - self.idle[-1].since_s < self.service.idle_s:
                instance = self.idle.pop()
            else:
                self.idle.clear()  # those below were idle for longer
                started, instance = True, _Instance()
                self.main_starts += 1
            instance.since_s = at_s
            self.instances.append(instance)
        self._begin(instance, number, at_s, self.service.start_s if started else 0.0, started)
        self._look(instance)

    def _rented(self, number: int, at_s: float) -> None:
        """Give a request a place, or let it wait for one."""
        started = self.open == 1 and not math.isinf(self.service.idle_s) and at_s >= self.up_until
        if started:
            self.up_s += max(0.0, self.up_until - self.up_since)
            self.up_since, self.ready_s = at_s, at_s + self.service.start_s
            self.main_starts += 1
        instance = min(self.instances, key=lambda each: each.requests)
        if instance.requests < self.service.at_once:
            # A request that comes while the instance wakes waits for it before its turn, which is no wait for a start of its own.
            instance.at_s = max(instance.at_s, self.ready_s if not started else 0.0)
            self._begin(instance, number, at_s, self.service.start_s if started else 0.0, started)
            self._look(instance)
        else:
            self.waiting.append(number)

    def _begin(self, instance: _Instance, number: int, at_s: float, wait_s: float, started: bool) -> None:
        """Give a request a place of an instance: its prompt is read after the step under way."""
        if self.warm.begin(at_s) and not started:
            wait_s = self.cold_s[number]
        self.begun_s[number], self.wait_s[number] = at_s, wait_s
        self._advance(instance, at_s)
        instance.read_at = max(instance.read_at, math.ceil(instance.steps - _EXACT))
        instance.reading.append(number)
        if not math.isinf(self.service.limit_s):
            heappush(self.events, (at_s + self.service.limit_s, number, -1, instance))

    def _look(self, instance: _Instance) -> None:
        """Note when something happens next in an instance."""
        instance.looked += 1
        ends, at_s = instance.ends, instance.at_s
        if ends:
            step: float = min(ends.values())
            if instance.reading and instance.read_at < step:
                step = instance.read_at
            if step > instance.steps:
                at_s += (step - instance.steps) * self.step_s[len(ends)]
        elif not instance.reading:
            return
        heappush(self.events, (at_s, -1, instance.looked, instance))

    def _advance(self, instance: _Instance, to_s: float) -> None:
        """Let an instance make decode steps until then."""
        if to_s <= instance.at_s:
            return
        if running := len(instance.ends):
            made = (to_s - instance.at_s) / self.step_s[running]
            instance.steps += made
            self.usd += made * running * self.token_usd[running]
        instance.at_s = to_s

    def _until(self, to_s: float) -> None:
        """Let everything happen that happens until then."""
        while self.events and self.events[0][0] <= to_s:
            at_s, ended, looked, instance = heappop(self.events)
            if ended >= 0:
                self._end_early(instance, ended, at_s)
            elif looked == instance.looked:
                self._happens(instance, at_s)

    def _happens(self, instance: _Instance, at_s: float) -> None:
        """At the end of a step: requests end, and the next prompt is read."""
        self._advance(instance, at_s)
        instance.steps = float(round(instance.steps))
        for number in [number for number, end in instance.ends.items() if end <= instance.steps]:
            del instance.ends[number]
            self._ended(instance, number, at_s)
        if instance.reading and (instance.read_at <= instance.steps or not instance.ends):
            self._read(instance, instance.reading.popleft())
            instance.read_at = instance.steps + 1
        self._look(instance)

    def _read(self, instance: _Instance, number: int) -> None:
        """Read a prompt, or a part of it where it is long and others are answered, whose turn is next then."""
        whole, unread = self.load.n_in[number], self.unread[number]
        if unread == whole:
            instance.at_s += self.wait_s[number]
        part = min(unread, self.service.part_tokens) if instance.requests else unread
        if part == whole:
            seconds, usd = self.prompt_s[number], self.prompt_usd[number]
        else:
            seconds, usd = (float(np.interp(part, self.service.prompts, of)) for of in (self.service.prefill_s, self.service.prefill_usd))
        instance.at_s += seconds
        self.usd += usd
        self.unread[number] -= part
        if self.unread[number]:
            instance.reading.append(number)
            return
        self.first_s[number] = instance.at_s
        instance.ends[number] = int(instance.steps) + self.n_out[number]

    def _ended(self, instance: _Instance, number: int, at_s: float) -> None:
        """Free the place of a request."""
        self.end_s[number] = at_s
        self.open -= 1
        self.warm.end(at_s)
        if self.waiting:
            self._begin(instance, self.waiting.popleft(), at_s, 0.0, False)
        elif not instance.requests and self.service.instances is None:
            self.paid_s += at_s - instance.since_s
            instance.since_s = at_s
            self.instances.remove(instance)
            self.idle.append(instance)
        if not self.open:
            self.up_until = at_s + self.service.idle_s

    def _end_early(self, instance: _Instance, number: int, at_s: float) -> None:
        """End an answer that has taken as long as the platform lets it, if it still goes on."""
        if number in instance.ends:
            self._advance(instance, at_s)
            del instance.ends[number]
        elif number in instance.reading:
            instance.reading.remove(number)
        else:
            return
        self.cut[number] = True
        self._ended(instance, number, at_s)
        self._look(instance)


def serve(service: Service, load: Load) -> Times:
    """Let the requests arrive at instances that answer several at once."""
    return _Shared(service, load).run()
