"""Interrupts: none is lost, also where what the handler raises is swallowed; a second one ends the process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli import digests, interrupts
from remoe_cli.cli import app, output
from remoe_cli.model.checkpoint import find
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shards
from remoe_cli.package.partial_checkpoint import write_partial_checkpoint
from remoe_cli.plan.solve.master_lp import RestrictedMaster
from remoe_cli.predict.medoids import k_medoids, swap_medoids
from remoe_cli.profile.latency import measure
from remoe_cli.runtime import client
from tests.profile.test_run import run, same_bytes, save_checkpoint
from tests.support import forked

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def swallowed(number: int = signal.SIGINT) -> None:
    """An interrupt that lands in a callback of Python itself, which prints what is raised there and goes on."""

    class Gone:
        pass

    gone = Gone()
    callback = weakref.ref(gone, lambda _: signal.raise_signal(number))
    del gone
    assert callback() is None


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    interrupts.check()  # nothing is left of it


@pytest.mark.parametrize("number", SIGNALS)
def test_a_swallowed_interrupt_is_raised_at_the_next_check(number: int) -> None:
    steps = []

    @interrupts.kept()
    def work() -> None:
        for step in range(5):
            interrupts.check()
            steps.append(step)
            if step == 2:
                swallowed(number)

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert steps == [0, 1, 2]
    assert interrupts.exit_code(caught.value) == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_swallowed_interrupt_is_raised_at_the_end(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.kept():
        swallowed(number)


def test_one_that_is_not_swallowed_ends_a_wait() -> None:
    @interrupts.kept()
    def work() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt):
        work()


def test_another_error_is_not_replaced() -> None:
    with pytest.raises(ZeroDivisionError), interrupts.kept():
        raise ZeroDivisionError


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interrupts.kept():
            signal.raise_signal(signal.SIGTERM)
            thread = threading.Thread(target=lambda: run_kept(seen))
            thread.start()
            thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM, 0]


def run_kept(seen: list[int]) -> None:
    with interrupts.kept():
        seen.append(0)


def test_threads_end_at_their_next_check() -> None:
    ended: list[type[BaseException]] = []
    flagged = threading.Event()

    def look() -> None:
        flagged.wait(60)
        try:
            interrupts.check()
        except BaseException as error:
            ended.append(type(error))

    @interrupts.kept()
    def work() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        swallowed()
        flagged.set()
        thread.join()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert ended == [KeyboardInterrupt]


def twice(first: int, second: int, mark: Path) -> None:
    """The first interrupt is swallowed; the second ends the process where it stands, in the middle of what is to be done at last."""
    with interrupts.kept():
        try:
            swallowed(first)
            interrupts.check()
        finally:
            signal.raise_signal(second)
            mark.write_text("went on")


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_second_one_ends_at_once(first: int, second: int, tmp_path: Path) -> None:
    ended = forked.complete(twice, first, second, tmp_path / "mark")
    assert ended.returncode == 128 + second
    assert not (tmp_path / "mark").exists()


# Work of each stage, of which the first step must look.
def _digests(model: Path, out: Path) -> None:
    file = out / "file"
    file.write_bytes(os.urandom(100))
    digests.sha256_of([file])


def _shards(model: Path, out: Path) -> None:
    list(write_shards(find(str(model)), {0: [(0, 1)]}, 1, out))


WORK: dict[str, Callable[[Path, Path], Any]] = {
    "digests": _digests,
    "medoids": lambda model, out: k_medoids(np.eye(9, dtype=np.float32), 3, np.random.default_rng(0)),
    "swaps": lambda model, out: swap_medoids(np.eye(9, dtype=np.float32), np.array([0, 1, 2])),
    "linear programmes": lambda model, out: RestrictedMaster(1, 1, 1.0).solve(),
    "latencies": lambda model, out: measure(load(find(str(model))), 1.0),
    "shards": _shards,
    "the main function's weights": lambda model, out: write_partial_checkpoint(find(str(model)), {}, out),
}


@pytest.mark.parametrize("work", WORK)
def test_long_work_looks_between_its_steps(work: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_received", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        WORK[work](model, tmp_path)
    monkeypatch.undo()


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_profile_ends_after_an_interrupt_that_was_swallowed(after: int, model: Path, tmp_path: Path) -> None:
    """It lands in a display of progress; what is done stays, and the same command ends with the same bytes."""
    expected = run(model, tmp_path / "whole")
    reported: list[int] = []

    def on_written(done: int, total: int) -> None:
        reported.append(done)
        if done == after:
            swallowed()

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", on_written)
    assert reported[-1] == after
    assert not (tmp_path / "out" / "profile.json").exists()
    run(model, tmp_path / "out")
    assert same_bytes(tmp_path / "out", expected.path)


def test_a_profile_whose_end_is_interrupted_is_whole_or_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", lambda done, total: swallowed() if done == total else None)
    run(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["arrays.safetensors", "profile.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("how", [swallowed, signal.raise_signal])
def test_the_exit_code_is_the_shells(how: Callable[[int], None], number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["remoe", "--version"])
    monkeypatch.setattr(output, "line", lambda text: how(number))
    assert app.run() == code


def ask(url: str) -> None:
    with interrupts.kept():
        client.answer(client.Http(url), "w1", 1, lambda text: None)


@pytest.mark.parametrize("number", SIGNALS)
def test_waiting_for_an_answer_ends_at_once(number: int, tmp_path: Path) -> None:
    """The server takes the request and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        child = forked.start(ask, url, stdout=tmp_path / "out", stderr=tmp_path / "err")
        with listener.accept()[0] as connection:
            assert connection.recv(10)
            assert child.pid is not None
            os.kill(child.pid, number)
            child.join(60)
    assert child.exitcode == 1
    assert "KeyboardInterrupt" in (tmp_path / "err").read_text()
