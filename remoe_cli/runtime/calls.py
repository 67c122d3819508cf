"""Make the calls of one MoE layer in a forward pass, and bring an answer to each, whatever fails.

A call is a batch of rows for one expert function. It is tried, and

- tried again after a failure that may pass, while the function's budget allows it (failures.py, budget.py);
- sent a second time when it takes longer than nearly all calls before it (hedging.py). The first good answer counts;
- computed by the main function itself, from the function's shard, when no try has an answer in time, when the function has failed too
  often (breaker.py), or is gone (last_resort.py).

Experts are pure functions of rows, so a call may be made any number of times, and answers once. Every try is billed in the receipt.

One thread drives all calls of a layer, the one that waits for them, so nothing here needs a lock. Threads of a pool only make the tries. A
try that nobody waits for any more is not broken off: Lambda would run and bill it to its end anyway, and only its answer says how much.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import Batch, FrameError, check_of, from_wire, origin_of, pack, to_wire, unpack
from remoe_cli.lambda_limits import read_timeout_s
from remoe_cli.redaction import redacted
from remoe_cli.runtime import budget
from remoe_cli.runtime.answer import Stop
from remoe_cli.runtime.breaker import CLOSED, Breaker
from remoe_cli.runtime.budget import Budget
from remoe_cli.runtime.failures import DAMAGED, EXPIRED_CREDENTIALS, failure, pause_s
from remoe_cli.runtime.hedging import Latencies, size_class
from remoe_cli.runtime.invoke import Attempt, Invocation, attempt, end_instance, failed_call, together
from remoe_cli.runtime.last_resort import LastResort, LastResortError
from remoe_cli.runtime.remote_function import RemoteFunction

LOOK_S = 0.5  # between two looks at the clock while a layer waits
LAST_S = 1.0  # for tries under way when time has ended
_LATE_S = 0.25  # for those whose calls have their answers, at the end of a request
_SHARE = 0.5  # of the time that is left to a request, which its calls may take: the rest is for computing here
_DAMAGED = 2  # damaged answers in a row, after each of which an instance is ended
_SAY_AGAIN_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """What became of a try: usually one attempt, and the batch of its answer if that is good."""

    attempts: tuple[Attempt, ...]
    batch: Batch | None = None


@dataclass(eq=False)
class Call:
    """One call under way; times are of `time.monotonic()`.

    begun_s      when its layer began
    until_s      when its tries have to end
    running      its tries under way, and when each began
    ended        the others
    retry_at_s   when it is tried again, after a failure
    after        the start of its function, which its tries wait for (start_ahead.py)
    abandoned    nobody waits for its tries any more
    """

    layer: int
    function: RemoteFunction
    batch: Batch
    body: bytes
    check: int
    begun_s: float
    until_s: float = math.inf
    after: Future[Invocation] | None = None
    running: dict[Future[Tried], float] = field(default_factory=dict)
    ended: list[Attempt] = field(default_factory=list)
    retries: int = 0
    hedges: int = 0
    retry_at_s: float | None = None
    renewed: bool = False
    abandoned: bool = False
    answer: Batch | None = None

    @property
    def where(self) -> str:
        return f"{self.function.name} of layer {self.layer}"


@dataclass
class _Known:
    """What is known of a function: budget of retries, breaker, and what calls take, by their size.

    damaged    answers in a row that were damaged
    last       the last failure, in words
    silent_s   until when nothing is said of it in the log; `unsaid` counts what was not
    """

    retries: Budget = budget.RETRIES
    breaker: Breaker = CLOSED
    latencies: dict[int, Latencies] = field(default_factory=dict)
    damaged: int = 0
    last: str = ""
    silent_s: float = 0.0
    unsaid: int = 0


@dataclass
class Caller:
    """Makes calls, and remembers how the functions do.

    sent          invocations, in the order of their answers
    last_resort   computes what no function answers; None: a call without an answer is an error
    renew         makes a client with credentials that were read again
    """

    client: Any
    pool: ThreadPoolExecutor
    sent: list[Invocation]
    last_resort: LastResort | None = None
    renew: Callable[[], Any] | None = None
    _hedges: Budget = budget.HEDGES
    _known: dict[str, _Known] = field(default_factory=dict)
    _open: list[Call] = field(default_factory=list)
    _late: dict[Future[Tried], Call] = field(default_factory=dict)

    def begin(
        self,
        layer: int,
        function: RemoteFunction,
        batch: Batch,
        begun_s: float,
        deadline_s: float = math.inf,
        after: Future[Invocation] | None = None,
    ) -> Call:
        """Start a call whose request has to be answered by `deadline_s`. It is sent when `after` is over."""
        frame, now = pack(batch), time.monotonic()
        call = Call(layer, function, batch, to_wire(frame), check_of(frame), begun_s, after=after)
        if self.last_resort:
            call.until_s = now + min(read_timeout_s(function.timeout_s), max(LAST_S, _SHARE * (deadline_s - now)))
        self._open.append(call)
        if not self._is_avoided(call, now):
            self._start(call, now)
        return call

    def finish(self, calls: Sequence[Call], stopped: Callable[[], Stop | None]) -> list[Batch]:
        """Wait until each call has its answer.

        Raises: FailedCall for one that has none, InvokeError when the main function's own time ends before.
        """
        while waiting := [call for call in calls if call.answer is None]:
            now = time.monotonic()
            for call in waiting:
                self._step(call, now)
            waiting = [call for call in waiting if call.answer is None]
            running = {future for call in waiting for future in call.running}
            if not waiting or any(future.done() for future in running):
                continue
            wait_s = min(LOOK_S, max(0.0, min(self._next_s(call) for call in waiting) - time.monotonic()))
            if not running:
                time.sleep(wait_s)
            elif not wait_for(running, wait_s, FIRST_COMPLETED).done and stopped() == "time-limit":
                raise InvokeError(
                    f"The main function's time ended while the expert function {waiting[0].where} was computing.",
                    "Ask for fewer tokens, or plan again for requests as long as this one.",
                )
        self._collect()
        return [call.answer for call in calls if call.answer is not None]

    def settle(self, limit_s: float | None) -> None:
        """Wait until no try is under way, `limit_s` at most, and note what all were billed.

        Those that last on are noted when they end.
        """
        for call in self._open:
            self._abandon(call)
            if call.ended:
                self._note(call)
        self._open.clear()
        needed = [future for future, call in self._late.items() if call.answer is None]
        wait_for(needed, limit_s)
        wait_for(self._late, _LATE_S)
        self._collect()
        for future, call in self._late.items():
            self.sent.append(lost(call.function.name))
            future.add_done_callback(lambda done, call=call: self.sent.append(_late(call, done.result())))  # type: ignore[misc]
        self._late.clear()

    def _step(self, call: Call, now: float) -> None:
        """Do what is due for a call: take an answer, try again, send it a second time, or compute it here."""
        for future in [future for future in call.running if future.done()]:
            del call.running[future]
            tried = future.result()
            call.ended += tried.attempts
            if tried.batch is not None:
                self._succeeded(call, tried)
                return
            self._failed(call, tried.attempts[-1], now)
        if call.running:
            if now >= call.until_s:
                self._give_up(call, now)
            elif now >= self._hedge_at_s(call):
                known = self._of(call)
                self._hedges, known.retries = self._hedges.spent(), known.retries.spent()
                call.hedges += 1
                self._start(call, now)
            return
        known = self._of(call)
        if call.retry_at_s is None:
            call.retry_at_s = self._retry_at_s(call, now)
            if call.retry_at_s is None:
                self._give_up(call, now)
                return
            known.retries = known.retries.spent()
        if now >= call.retry_at_s:
            call.retries, call.retry_at_s = call.retries + 1, None
            self._start(call, now, end_first=known.damaged > 0 and known.damaged % _DAMAGED == 0)

    def _start(self, call: Call, now: float, end_first: bool = False) -> None:
        call.running[self.pool.submit(_try, self.client, call, end_first)] = now

    def _succeeded(self, call: Call, tried: Tried) -> None:
        known, last = self._of(call), tried.attempts[-1]
        known.breaker, known.retries, known.damaged = CLOSED, known.retries.earned(), 0
        self._hedges = self._hedges.earned()
        if last.report and last.report.init_ms is None and call.after is None:
            known.latencies.setdefault(size_class(len(call.batch.data)), Latencies()).add(last.elapsed_s)
        call.answer = tried.batch
        self._abandon(call)
        self._note(call)
        self._open.remove(call)

    def _failed(self, call: Call, failed: Attempt, now: float) -> None:
        known = self._of(call)
        known.breaker = known.breaker.failed(now, failure(failed.kind).lasts)
        known.damaged = known.damaged + 1 if failed.kind == DAMAGED else 0
        known.last = failed.message

    def _retry_at_s(self, call: Call, now: float) -> float | None:
        """Return when a call is tried again of which no try is under way; None: not at all."""
        if not call.ended:
            return None
        last, known = call.ended[-1], self._of(call)
        if last.kind in EXPIRED_CREDENTIALS and self.renew and not call.renewed:
            call.renewed = True
            with suppress(Exception):  # what is wrong with the credentials, the failure itself says
                self.client = self.renew()
            return now
        wait_s = pause_s(last.kind, call.retries, last.retry_after_s)
        if wait_s is None or now + wait_s >= call.until_s or not known.retries.allows or self._is_avoided(call, now):
            return None
        return now + wait_s

    def _hedge_at_s(self, call: Call) -> float:
        """Return when a call is sent a second time; never, where that is not allowed."""
        known = self._of(call)
        taken = known.latencies.get(size_class(len(call.batch.data)))
        after_s = taken.hedge_after_s() if taken else None
        if (
            after_s is None
            or call.after is not None
            or call.hedges
            or not (self._hedges.allows and known.retries.allows)
            or known.breaker.failures
        ):
            return math.inf
        return min(call.running.values()) + after_s

    def _next_s(self, call: Call) -> float:
        """Return when something is due for a call, if no try ends before."""
        if call.running:
            return min(call.until_s, self._hedge_at_s(call))
        return call.until_s if call.retry_at_s is None else call.retry_at_s

    def _is_avoided(self, call: Call, now: float) -> bool:
        return self.last_resort is not None and self._of(call).breaker.is_open(now)

    def _give_up(self, call: Call, now: float) -> None:
        """Compute a call here. Raises: FailedCall when that fails, or is not possible."""
        known = self._of(call)
        why = "no answer came in time" if call.running else call.ended[-1].message if call.ended else f"after failures: {known.last}"
        if call.running:
            known.breaker = known.breaker.failed(now)
        self._abandon(call)
        self._open.remove(call)
        attempts = call.ended or [Attempt(None, None, 0.0, message=why)]
        if self.last_resort is None:
            raise failed_call(call.where, attempts, self._note(call))
        reads = self.last_resort.reads
        try:
            call.answer = self.last_resort.compute(call.function.shard, call.batch)
        except LastResortError as error:
            here = f". The main function could not compute its experts itself: {redacted(str(error))}."
            raise failed_call(call.where, attempts, self._note(call, self.last_resort.reads - reads), here) from error
        self._note(call, self.last_resort.reads - reads)
        if now < known.silent_s:
            known.unsaid += 1
            return
        more = f", and {known.unsaid} calls more since it was last said" if known.unsaid else ""
        _log.warning("The expert function %s failed (%s); the main function computed its experts%s.", call.where, redacted(why), more)
        known.silent_s, known.unsaid = now + _SAY_AGAIN_S, 0

    def _note(self, call: Call, reads: int = 0) -> Invocation:
        """Put what a call took so far into `sent`, with the `reads` of S3 that computing it here took."""
        made = together(call.function.name, call.body if call.ended else b"", call.ended, time.monotonic() - call.begun_s, call.retries)
        computed_here = call.answer is not None and made.failed
        compute_s = call.answer.compute_us / 1e6 if call.answer is not None and not computed_here else 0.0
        made = replace(made, experts=len(call.batch.experts), rows=sum(call.batch.rows), after_start=call.after is not None)
        made = replace(made, compute_s=compute_s, hedges=call.hedges, fallbacks=int(computed_here), reads=made.reads + reads)
        self.sent.append(made)
        return made

    def _abandon(self, call: Call) -> None:
        call.abandoned = True
        self._late |= dict.fromkeys(call.running, call)
        call.running = {}

    def _collect(self) -> None:
        """Note the tries that ended after their calls."""
        for future in [future for future in self._late if future.done()]:
            self.sent.append(_late(self._late.pop(future), future.result()))

    def _of(self, call: Call) -> _Known:
        return self._known.setdefault(call.function.name, _Known())


def _try(client: Any, call: Call, end_first: bool) -> Tried:
    """Make a try, in a thread of the pool.

    With `end_first`, an instance of the function is ended before that.
    """
    name = call.function.name
    if call.after is not None:
        wait_for([call.after])
        if call.abandoned:  # nobody waits for it any more
            return Tried(())
    before = (end_instance(client, name),) if end_first else ()
    made = attempt(client, name, call.body)
    if made.answer is None:
        return Tried((*before, made))
    try:
        batch = read_answer(call, made.answer)
    except FrameError as error:
        return Tried((*before, replace(made, answer=None, kind=DAMAGED, message=str(error))))
    return Tried((*before, made), batch)


def read_answer(call: Call, answer: bytes) -> Batch:
    """Read the answer to a call.

    Raises: FrameError for one that is damaged, of another function, or to other rows.
    """
    try:
        batch = unpack(from_wire(answer))
    except FrameError as error:
        raise FrameError(f"its answer cannot be read: {error}") from None
    asked, got = ((b.experts, b.rows, b.dtype, b.data.shape) for b in (call.batch, batch))
    if asked != got:
        raise FrameError("it answered other rows than it was sent")
    if call.function.shard and batch.origin != origin_of(call.function.shard.head_sha256, call.check):
        raise FrameError("its answer is one of another function, or to other rows")
    return batch


def lost(function: str) -> Invocation:
    """Make the invocation of a try of which nobody knows what it was billed."""
    return replace(together(function, b"", (), 0.0), unreported=1)


def _late(call: Call, tried: Tried) -> Invocation:
    made = together(call.function.name, call.body if tried.attempts else b"", tried.attempts, 0.0, retries=0)
    return replace(made, late=call.answer is not None)
