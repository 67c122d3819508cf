"""Requests that share a batch when something goes wrong outside of a step: each ends, with the receipt of what it was billed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from remoe_cli.errors import DeployError
from remoe_cli.runtime import batch
from remoe_cli.runtime.kept import Ended
from remoe_cli.runtime.main_function import Answer, Answering, MainFunction, Request
from remoe_cli.runtime.scheduler import Job, Scheduler
from tests.support.api_server import whole_model
from tests.support.by_hand import PROMPT_IDS, by_hand

NEW = 6


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> MainFunction:
    folder = tmp_path_factory.mktemp("model")
    by_hand(folder, ())
    made = whole_model(folder / "model")
    return replace(made, config=made.config.model_copy(update={"concurrency": 4}))


@pytest.fixture
def kept() -> list[Ended]:
    return []


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Turns:
    """A scheduler with one turn at a time. `begun` has the clients whose requests were begun, none before `go`."""

    def __init__(self, main: MainFunction, thread: ThreadPoolExecutor) -> None:
        self.main = replace(main, config=main.config.model_copy(update={"concurrency": 1}))
        self.scheduler, self.begun = Scheduler(thread, lambda: self.main), list[str]()
        self.every, self.started = threading.Semaphore(0), threading.Event()

    def ask(self, client: str, end: Callable[[str], None] = lambda client: None) -> None:
        def ended(how: Answer | Exception) -> None:
            end(client)
            self.every.release()

        self.scheduler.submit(Job(partial(self._begin, client), ended, client))

    def go(self) -> None:
        self.started.set()

    def wait(self) -> None:
        assert self.every.acquire(timeout=60)

    def _begin(self, client: str) -> Answering:
        self.started.wait()  # until all are there
        self.begun.append(client)
        return self.main.answering(Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=1), lambda piece: None, lambda: None)


def test_clients_take_turns(main: MainFunction, thread: ThreadPoolExecutor) -> None:
    """One that asks six times does not come six times before the others."""
    turns, clients = Turns(main, thread), ["many"] * 6 + ["two", "one", "two"]
    for client in clients:
        turns.ask(client)
    turns.go()
    for _ in clients:
        turns.wait()
    assert turns.begun == ["many", "two", "one", "many", "two", "many", "many", "many", "many"]


def test_who_asked_before_others_came_is_not_overtaken_by_each_of_them(main: MainFunction, thread: ThreadPoolExecutor) -> None:
    """Clients that ask again after each answer are new ones each time: one that had a turn already would wait for ever."""
    turns = Turns(main, thread)

    def again(client: str) -> None:
        if client != "twice" and len(turns.begun) < 12:
            threading.Timer(0.005, turns.ask, (client, again)).start()  # when another one has its turn

    for client in ("twice", "twice", "one", "two", "three"):
        turns.ask(client, again)
    turns.go()
    while len(turns.begun) < 12:
        turns.wait()
    assert turns.begun[:1] == ["twice"] and "twice" in turns.begun[1:6]


def answers(main: MainFunction, thread: ThreadPoolExecutor, count: int) -> list[Answer | Exception]:
    """Ask for the same answer several times at once, and wait for all ends."""
    scheduler, ended, every = Scheduler(thread, lambda: main), [], threading.Event()

    def end(how: Answer | Exception) -> None:
        ended.append(how)
        if len(ended) == count:
            every.set()

    hold = threading.Event()
    thread.submit(hold.wait)  # all of them wait when the first has its turn
    request = Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=NEW)
    for _ in range(count):
        scheduler.submit(Job(lambda: main.answering(request, lambda piece: None, lambda: None), end))
    hold.set()
    assert every.wait(60)
    return ended


def test_one_that_finds_no_memory_fails_alone(
    main: MainFunction, kept: list[Ended], thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    join, calls = batch.join, iter(range(100))

    def full(*arguments: Any) -> None:
        if next(calls) == 1:
            raise MemoryError
        join(*arguments)

    monkeypatch.setattr(batch, "join", full)
    ended = answers(replace(main, keep=kept.append), thread, 3)
    failed = [each for each in ended if isinstance(each, Exception)]
    whole = main.answer(Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=NEW)).token_ids
    assert len(failed) == 1 and [each.token_ids for each in ended if isinstance(each, Answer)] == [whole] * 2
    assert sorted(each.kind for each in kept) == ["answered", "answered", "failed"]


def test_a_cache_that_cannot_be_cut_is_made_again(main: MainFunction, thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(batch, "keep", full)
    whole = main.answer(Request(prompt_token_ids=PROMPT_IDS, max_new_tokens=NEW)).token_ids
    ended = answers(main, thread, 3)
    assert [each.token_ids for each in ended if isinstance(each, Answer)] == [whole] * 3


def test_a_fault_of_our_own_ends_all_and_loses_no_receipt(
    main: MainFunction, kept: list[Ended], thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = iter(range(100)), batch.Batch.step

    def broken(self: batch.Batch) -> Any:
        if next(steps) == 4:
            raise DeployError("A fault.", "Ask again.")
        return step(self)

    monkeypatch.setattr(batch.Batch, "step", broken)
    ended = answers(replace(main, keep=kept.append), thread, 3)
    assert [type(each) for each in ended] == [DeployError] * 3
    assert len({id(each) for each in ended}) == 3, "each has a receipt of its own"
    assert [each.kind for each in kept] == ["failed"] * 3
