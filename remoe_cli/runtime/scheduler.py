"""Let requests wait for their turn, and answer several of them at once in one thread.

Each step of the batch is a piece of work for that thread, so other work for it, such as counting tokens, comes between two steps.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from remoe_cli.errors import DeployError
from remoe_cli.runtime.main_function import Answer, Answering, MainFunction

if TYPE_CHECKING:
    from remoe_cli.runtime.batch import Batch
    from remoe_cli.runtime.sequence import TokenSequence


@dataclass(eq=False)
class Job:
    """A request that waits or is answered.

    begin     begins to answer it
    ended     called once, with its answer or why there is none
    client    who asks, as far as that is known
    asked_s, begun_s   when it came, and when its turn came, by `time.monotonic()`
    """

    begin: Callable[[], Answering]
    ended: Callable[[Answer | Exception], None]
    client: str = ""
    asked_s: float = field(default_factory=time.monotonic)
    begun_s: float = 0.0


@dataclass
class Scheduler:
    """Answers as many requests at once as the main function may.

    Clients take turns: the next request is the oldest of the client with the fewest that are answered, and of these of the one that waits
    longest, since its last turn ended or since it came. So a client with many requests delays others by those that are answered, and not by
    those that wait; and none waits for ever while others come and go.

    thread   does one piece of work at a time
    main     the loaded main function
    """

    thread: Executor
    main: Callable[[], MainFunction]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: deque[Job] = field(default_factory=deque)
    _running: dict[TokenSequence, tuple[Job, Answering]] = field(default_factory=dict)
    _turns: dict[str, float] = field(default_factory=dict)
    _busy: bool = False
    _batch: Batch | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn. May be called in any thread."""
        with self._lock:
            self._waiting.append(job)
            idle, self._busy = not self._busy, True
        if idle:
            self._go_on()

    def withdraw(self, job: Job) -> bool:
        """Take back a request that still waits; tells whether it did."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def _go_on(self) -> None:
        try:
            self.thread.submit(self._turn)
        except RuntimeError:  # the thread takes no more work
            self._fail_all(DeployError("The main function is ending.", "Ask again."))

    def _turn(self) -> None:
        """Begin requests that have their turn, and do one step of those that are answered."""
        try:
            main = self.main()
            while self.running < main.concurrency and (job := self._next()):
                job.begun_s = time.monotonic()
                answering = job.begin()
                self._advance(main, job, answering, partial(next, answering))
            if self._batch is not None and self._running:
                for sequence in self._batch.step():
                    job, answering = self._running.pop(sequence)
                    if (error := sequence.error) is None:
                        self._advance(main, job, answering, partial(answering.send, sequence.generated()))
                    else:
                        self._advance(main, job, answering, partial(answering.throw, error))
        except Exception as error:  # of our own code: nobody may wait for ever
            self._fail_all(error)
        with self._lock:
            self._busy = again = bool(self._running or self._waiting)
        if again:
            self._go_on()

    def _next(self) -> Job | None:
        with self._lock:
            if not self._waiting:
                return None
            answered = Counter(job.client for job, _ in self._running.values())
            job = min(self._waiting, key=lambda job: (answered[job.client], max(job.asked_s, self._turns.get(job.client, 0.0))))
            self._waiting.remove(job)
            here = answered.keys() | {each.client for each in self._waiting}
            self._turns = {client: turn_s for client, turn_s in self._turns.items() if client in here} | {job.client: time.monotonic()}
            return job

    def _advance(self, main: MainFunction, job: Job, answering: Answering, go: Callable[[], TokenSequence]) -> None:
        """Go on with a request until it needs another sequence or ends."""
        try:
            sequence = go()
        except StopIteration as end:
            ended: Answer | Exception = end.value
        except Exception as error:
            ended = error
        else:
            self._batch = self._batch or main.engine.batch()
            self._batch.add(sequence)
            self._running[sequence] = job, answering
            return
        self._turns[job.client] = time.monotonic()
        _tell(job, ended)

    def _fail_all(self, error: Exception) -> None:
        """End all requests with an error, with the receipt of what each was billed."""
        with self._lock:
            running, waiting = [*self._running.values()], [*self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._batch, self._busy = None, False
        for job, answering in running:
            try:
                answering.throw(_copied(error))
            except Exception as failed:
                _tell(job, failed)
        for job in waiting:
            _tell(job, error)


def _copied(error: Exception) -> Exception:
    """Copy an error, so that each request's receipt is in one of its own."""
    try:
        return copy(error)
    except TypeError:  # it is made of more than its message
        return DeployError(f"{type(error).__name__}: {error}", "Ask again.")


def _tell(job: Job, ended: Answer | Exception) -> None:
    """Tell a request how it ended, unless nobody is there any more."""
    with suppress(RuntimeError):  # the loop of a server that has ended
        job.ended(ended)
