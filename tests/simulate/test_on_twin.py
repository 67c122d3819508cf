"""The simulation beside the real thing: a main function's scheduler and batch, and expert functions in workers of the twin.

Requests come at random times. The simulation gets the times that these very requests took for prompts and steps, so what is compared is
turns, queues, shared steps, and which requests find the expert functions gone; docs/measure/simulate_twin.py compares with the cost model's
times. A round trip of some milliseconds makes most of each step, so that a busy machine changes little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.cages import Mechanism
from remoe_cli.model.checkpoint import find
from remoe_cli.plan.arrays import Floats
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.batch import Batch
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.scheduler import Job, Scheduler
from remoe_cli.simulate import alone, shared
from remoe_cli.simulate.load import Load
from remoe_cli.simulate.service import Functions, Service
from tests.support.batching import engine_with
from tests.support.families import EXPERTS, save
from tests.support.split import split_model

pytestmark = pytest.mark.alone

RTT_MS, IDLE_S = 15.0, 2.0
REQUESTS, PROMPT = 20, list(range(2, 22))
WITHIN = 0.15


@dataclass(frozen=True)
class Played:
    """What became of the requests, in seconds since the first came.

    tokens_s   of each request, when each of its tokens was there
    cold       whether it started functions
    n_out      tokens after the first
    """

    at_s: Floats
    begun_s: Floats
    tokens_s: list[Floats]
    cold: Any
    n_out: Any

    @property
    def first_s(self) -> Floats:
        return np.array([each[0] for each in self.tokens_s])

    @property
    def end_s(self) -> Floats:
        return np.array([each[-1] for each in self.tokens_s])

    @property
    def own_s(self) -> Floats:
        """From its turn to its first token."""
        return self.first_s - self.begun_s


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, probed: Mechanism) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("twin")
    save("mixtral", torch.float32, folder / "model", fused=False)
    # A layer in two functions, so that none has replicas, of which one might be cold alone.
    every = {0: [tuple(range(EXPERTS))], 1: [tuple(range(4)), tuple(range(4, EXPERTS))]}
    nothing: dict[int, tuple[int, ...]] = {0: (), 1: ()}
    times = {"rtt_ms": RTT_MS, "idle_ttl_s": IDLE_S}
    with split_model(find(str(folder / "model")), nothing, every, Path(folder / "twin"), probed, **times) as (model, dispatcher):
        yield engine_with(model, dispatcher)


def play(engine: Engine, at_once: int, gaps_s: Floats, n_out: Any) -> Played:
    """Let requests come to a main function that answers so many of them at once; an endless gap outlasts the functions."""
    at_s, jobs, answers, left = list[float](), list[Job](), dict[int, Generated](), threading.Semaphore(0)
    main: Any = SimpleNamespace(concurrency=at_once, engine=engine)

    def answering(number: int) -> Any:
        return (yield engine.sequence(PROMPT, int(n_out[number]) + 1))

    def ended(number: int, how: Any) -> None:
        answers[number] = how
        left.release()

    def wait_for_all() -> None:
        for _ in range(len(jobs) - waited[0]):
            assert left.acquire(timeout=60)
        waited[0] = len(jobs)

    waited = [0]
    with ThreadPoolExecutor(1) as thread:
        scheduler = Scheduler(thread, lambda: main)
        begun_s = time.monotonic()
        for number, gap_s in enumerate(gaps_s):
            if np.isinf(gap_s):
                wait_for_all()
            time.sleep(1.5 * IDLE_S if np.isinf(gap_s) else gap_s)
            at_s.append(time.monotonic() - begun_s)
            jobs.append(Job(partial(answering, number), partial(ended, number)))
            scheduler.submit(jobs[-1])
        wait_for_all()
    turns_s = np.array([job.begun_s for job in jobs]) - begun_s
    tokens_s = [turns_s[number] + np.array(answers[number].token_times_s) for number in range(len(jobs))]
    cold = [any(call.init_ms is not None for call in answers[number].invocations) for number in range(len(jobs))]
    return Played(np.array(at_s), turns_s, tokens_s, np.array(cold), n_out)


def traffic(engine: Engine, load: float, at_once: int, seed: int) -> tuple[Floats, Any]:
    """Draw gaps in bursts, by what a request takes here now, and lengths."""
    random = np.random.default_rng(seed)
    n_out, gaps_s = random.integers(2, 9, REQUESTS), random.gamma(0.4, 1.0, REQUESTS)
    begun_s = time.monotonic()
    for _ in range(3):
        engine.generate(PROMPT, int(n_out.mean()) + 1)
    return gaps_s * ((time.monotonic() - begun_s) / 3 / at_once / load / gaps_s.mean()), n_out


def test_turns_and_cold_starts_are_the_twins(engine: Engine) -> None:
    gaps_s, n_out = traffic(engine, 0.8, 1, 1)
    gaps_s = np.minimum(gaps_s, IDLE_S / 2)
    gaps_s[[0, REQUESTS // 2]] = np.inf
    seen = play(engine, 1, gaps_s, n_out)
    warm_s = float(np.median(seen.own_s[~seen.cold]))
    functions = Functions(np.zeros(1), 0.0, IDLE_S, (0, *[1] * REQUESTS))
    made = Service("it", "it", 1, np.ones(1), np.ones(1), np.zeros(1), np.zeros(2), np.zeros(2), functions=functions)
    load = Load(
        at_s=seen.at_s,
        n_in=np.full(REQUESTS, len(PROMPT)),
        prompt_s=np.where(seen.cold, warm_s, seen.own_s),
        prompt_usd=np.zeros(REQUESTS),
        tpot_s=(seen.end_s - seen.first_s) / n_out,
        n_out=n_out,
        cold_s=np.where(seen.cold, seen.own_s - warm_s, float((seen.own_s[seen.cold] - warm_s).mean())),
        over_s=float(seen.at_s[-1]),
    )
    times = alone.serve(made, load)
    assert np.flatnonzero(times.cold).tolist() == np.flatnonzero(seen.cold).tolist() == [0, REQUESTS // 2]
    waited_s = seen.begun_s - seen.at_s
    assert waited_s.max() > warm_s, "nobody waited for another, so nothing is told"
    assert (times.first_s - seen.own_s - seen.at_s).mean() == pytest.approx(waited_s.mean(), rel=WITHIN)
    assert np.percentile(times.first_s - seen.at_s, 95) == pytest.approx(np.percentile(seen.first_s - seen.at_s, 95), rel=WITHIN)


def test_requests_that_share_steps_take_what_they_take_in_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = 3
    gaps_s, n_out = traffic(engine, 0.5, at_once - 1, 2)  # a long queue would multiply what steps differ in
    prompts_s, step_s = timed(monkeypatch, at_once)
    seen = play(engine, at_once, gaps_s, n_out)
    steps_s = np.array([0.0, *(np.mean(each) for each in step_s.values())])
    made = Service("it", "it", 1, np.ones(1), np.ones(1), np.zeros(1), steps_s, np.zeros(at_once + 1), at_once=at_once)
    nothing = np.zeros(REQUESTS)
    times = shared.serve(
        made, Load(seen.at_s, np.full(REQUESTS, len(PROMPT)), np.array(prompts_s), nothing, nothing, n_out, nothing, float(seen.at_s[-1]))
    )
    assert (times.first_s - seen.at_s).mean() == pytest.approx((seen.first_s - seen.at_s).mean(), rel=WITHIN)
    assert ((times.end_s - times.first_s) / n_out).mean() == pytest.approx(((seen.end_s - seen.first_s) / n_out).mean(), rel=WITHIN)


def timed(monkeypatch: pytest.MonkeyPatch, at_once: int) -> tuple[list[float], dict[int, list[float]]]:
    """Note what reading each prompt takes, and each decode step, by its number of requests."""
    prompts_s, steps_s = list[float](), {number: list[float]() for number in range(1, at_once + 1)}
    read, decode = Batch._read, Batch._decode

    def timed_read(self: Batch, sequence: Any) -> Any:
        begun_s = time.monotonic()
        left = read(self, sequence)
        prompts_s.append(time.monotonic() - begun_s)
        return left

    def timed_decode(self: Batch) -> Any:
        begun_s, number = time.monotonic(), len(self.decoding)
        left = decode(self)
        steps_s[number].append(time.monotonic() - begun_s)
        return left

    monkeypatch.setattr(Batch, "_read", timed_read)
    monkeypatch.setattr(Batch, "_decode", timed_decode)
    return prompts_s, steps_s
