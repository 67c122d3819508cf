"""Faults while a model is served by real workers of the twin: the tokens stay those of the whole model, and the receipt adds up.

docs/measure/faults.py does the same with many requests, and measures times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from docs.measure.faults import Billed, Row
from remoe_cli.cages import Mechanism
from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import Batch
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.model.loader import load
from remoe_cli.runtime import breaker
from remoe_cli.runtime.budget import HEDGES
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.invoke import Invocation, make_client
from remoe_cli.runtime.last_resort import LastResort
from tests.support import faults
from tests.support.families import save
from tests.support.faults import Proxy
from tests.support.harness import greedy
from tests.support.split import SplitTwin

PARTS = ((1, 5), (3, 7))
TOKENS = 8
VALUES: Any = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).numpy()
ROWS = Batch("float32", (1,), (1,), VALUES[:1])


@dataclass(frozen=True)
class Served:
    """A model whose odd experts are remote, behind a proxy; `marks` is the folder that makes workers go wrong."""

    split: SplitTwin
    proxy: Proxy
    model: PreTrainedModel
    local: dict[int, tuple[int, ...]]
    expected: torch.Tensor
    marks: Path

    @contextmanager
    def dispatcher(self, last_resort: bool = True) -> Iterator[Dispatcher]:
        """A dispatcher that knows nothing yet of the functions."""
        rows = {layer: {e: row for row, e in enumerate(experts)} for layer, experts in self.local.items()}
        with ThreadPoolExecutor(4 * self.split.calls) as pool:
            client = make_client(self.proxy.url, 4 * self.split.calls, 20)
            made = Dispatcher(client, rows, self.split.functions, pool)
            if last_resort:
                made.caller.last_resort = LastResort(str(self.split.shards))
            attach(self.model, made)
            self.proxy.fault = faults.healthy
            self.proxy.sent.clear()
            try:
                yield made
            finally:
                self.proxy.fault = faults.healthy
                client.close()

    def billed(self) -> int:
        """What the twin has billed so far."""
        return sum(pool.counters.billed_ms for pool in self.split.twin.twin.pools.values())

    def answer(self, dispatcher: Dispatcher) -> list[Invocation]:
        """Generate, which must give the whole model's tokens; returns what was sent."""
        assert torch.equal(greedy(self.model, TOKENS), self.expected)
        dispatcher.settle()
        return dispatcher.take()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, probed: Mechanism) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faults")
    save("mixtral", torch.float32, folder / "model", fused=False)
    checkpoint = find(str(folder / "model"))
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.path, experts_implementation="eager")
    local = {x.layer: tuple(range(0, x.experts, 2)) for x in expert_layers(whole)}
    with faults.faulty_twin(checkpoint, dict.fromkeys(local, PARTS), folder, probed) as (split, proxy, marks):
        yield Served(split, proxy, load(checkpoint, local), local, greedy(whole, TOKENS), marks)


def summed(sent: list[Invocation]) -> dict[str, int]:
    figures = ("billed_ms", "billed_tries", "retries", "hedges", "fallbacks", "unreported")
    return {figure: sum(getattr(each, figure) for each in sent) for figure in figures}


def test_without_a_fault_every_call_is_one_try(served: Served) -> None:
    with served.dispatcher() as dispatcher:
        before = served.billed()
        sent = summed(served.answer(dispatcher))
        assert sent["billed_tries"] == served.proxy.sent.total() > 0
        assert sent["billed_ms"] == served.billed() - before
        assert not any(sent[figure] for figure in ("retries", "fallbacks", "unreported"))


@pytest.mark.parametrize("fault", [faults.fails, faults.throttles, faults.truncates, faults.flips_a_bit], ids=lambda fault: fault.__name__)
def test_a_share_of_calls_that_fail_costs_no_token(served: Served, fault: faults.Fault) -> None:
    with served.dispatcher() as dispatcher:
        before = served.billed()
        served.proxy.fault = faults.some(0.2, fault, seed=1)
        sent = summed(served.answer(dispatcher))
        assert sent["retries"] + sent["fallbacks"] > 0
        assert (sent["billed_ms"], sent["unreported"]) == (served.billed() - before, 0)


@pytest.mark.parametrize(
    ("missing", "unreported", "adds_up"),
    [(Billed(0, 0), 2, True), (Billed(2, 9), 2, True), (Billed(3, 9), 2, False), (Billed(0, 9), 2, False), (Billed(1, 0), 1, False)],
)
def test_a_bill_adds_up_where_no_more_is_missing_than_is_unreported(missing: Billed, unreported: int, adds_up: bool) -> None:
    """Of the table that docs/measure/faults.py prints."""
    counted = {field.name: 0 for field in fields(Row)} | {"missing": missing, "unreported": unreported}
    assert Row(**counted).adds_up is adds_up  # type: ignore[arg-type]


def test_the_answer_of_another_layer_is_noticed(served: Served) -> None:
    """It is a frame of the same experts with as many rows, and right by its check: only its origin tells."""
    other = {f"layer-{layer:03d}-{part}": f"layer-{1 - layer:03d}-{part}" for layer in (0, 1) for part in (0, 1)}
    with served.dispatcher() as dispatcher:
        served.proxy.fault = faults.some(0.3, faults.of_another(other))
        sent = summed(served.answer(dispatcher))
        assert sent["retries"] + sent["fallbacks"] > 0


def test_killed_workers_cost_no_token(served: Served) -> None:
    with served.dispatcher() as dispatcher, faults.killing(served.split.twin, 0.25) as killed:
        before, sent = served.billed(), list[Invocation]()
        while len(killed) < 2:
            sent += served.answer(dispatcher)
        assert summed(sent)["billed_ms"] == served.billed() - before


def test_a_worker_that_answers_garbage_is_ended(served: Served) -> None:
    name = served.split.functions[0][0].name
    with served.dispatcher() as dispatcher, faults.marked(served.marks, f"broken-{name}") as mark:
        faults.kill(faults.workers(served.split.twin, name))
        sent = served.answer(dispatcher) + served.answer(dispatcher)
        assert not mark.exists()
        assert summed(sent)["fallbacks"] <= 1
        assert summed(served.answer(dispatcher))["retries"] == 0


def test_a_short_time_without_a_network_costs_no_token(served: Served) -> None:
    with served.dispatcher() as dispatcher:
        served.proxy.fault = faults.no_network(time.monotonic() + 0.5)
        sent = summed(served.answer(dispatcher))
        assert sent["retries"] > 0


def test_a_function_that_is_gone_is_named_at_once_and_computed_here(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_S", 60.0)
    gone = served.split.functions[1][0]
    with served.dispatcher() as dispatcher, faults.deleted(served.split.twin, gone.name), caplog.at_level(logging.WARNING):
        sent = served.answer(dispatcher)
        first = caplog.records[0]
        assert f"The expert function {gone.name} of layer 1 failed" in first.getMessage() and "ResourceNotFound" in first.getMessage()
        assert {each.function for each in sent if each.fallbacks} == {gone.name}
        assert summed(sent)["retries"] == 0
        assert served.proxy.sent[gone.name] == 1 < summed(sent)["fallbacks"]  # it is not asked again before the pause is over


def test_without_a_shard_a_function_that_is_gone_ends_the_answer_and_is_named(served: Served) -> None:
    gone = served.split.functions[1][0].name
    hidden = served.split.shards / f"{gone}.safetensors"
    with faults.deleted(served.split.twin, gone):
        with (
            served.dispatcher(last_resort=False) as dispatcher,
            pytest.raises(InvokeError, match=rf"The expert function {gone} of layer 1 failed: .*ResourceNotFound"),
        ):
            greedy(served.model, TOKENS)
        dispatcher.settle()
        with served.dispatcher() as dispatcher:
            kept = hidden.read_bytes()
            hidden.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            with pytest.raises(InvokeError, match=f"{gone} of layer 1 failed: .*could not compute its experts itself: ShardDigestError"):
                greedy(served.model, TOKENS)
            dispatcher.settle()
            hidden.write_bytes(kept)


def test_a_function_out_of_memory_is_computed_here(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_S", 60.0)
    name = served.split.functions[0][1].name
    with served.dispatcher() as dispatcher, faults.marked(served.marks, f"hungry-{name}"):
        before = served.billed()
        sent = served.answer(dispatcher)
        assert {each.function for each in sent if each.fallbacks} == {name}
        assert summed(sent)["billed_ms"] == served.billed() - before
        assert served.proxy.sent[name] == 1 < summed(sent)["fallbacks"]  # it would fail again


def test_a_slow_call_is_overtaken_by_a_second_one_and_both_are_billed(served: Served) -> None:
    function, before, slow, released = served.split.functions[0][0], served.billed(), threading.Event(), threading.Event()

    def once(seen: faults.Seen, send: faults.Send) -> faults.Reply:
        if slow.is_set():
            slow.clear()
            released.wait(10)
        return send(seen)

    with served.dispatcher() as dispatcher:
        served.proxy.fault = once
        for number in range(26):
            if number in (5, 25):  # too few calls are known, and then enough
                slow.set()
            if number == 5:
                threading.Timer(0.5, released.set).start()
            if number == 25:  # whatever a busy machine has spent before
                dispatcher.caller._hedges = replace(HEDGES, tokens=1.0)
            call = dispatcher.caller.begin(0, function, ROWS, time.monotonic())
            dispatcher.caller.finish([call], lambda: None)
            if number == 5:
                assert released.is_set() and served.proxy.sent.total() == 6
                released.clear()
        assert not released.is_set() and served.proxy.sent.total() == 26 + sum(each.hedges for each in dispatcher.sent)
        last = [each for each in dispatcher.take() if not each.late][-1]
        dispatcher.settle()
        assert not released.is_set()  # the answer is there: what is still under way is hardly waited for
        assert sum(each.unreported for each in dispatcher.take()) == 1
        released.set()
    (late,) = dispatcher.take()  # when it has ended
    assert (last.hedges, last.billed_tries, last.late) == (1, 1, False)
    assert (late.hedges, late.billed_tries, late.late) == (0, 1, True) and not late.plain and not last.plain
    assert served.billed() - before > last.billed_ms + late.billed_ms > 0


def test_a_call_has_its_share_of_the_time_that_a_request_has(served: Served) -> None:
    """A function that does not answer at all is computed here while there is time."""
    name, released = served.split.functions[0][0].name, threading.Event()

    def silent(seen: faults.Seen, send: faults.Send) -> faults.Reply:
        if seen.function == name:
            released.wait(10)
        return send(seen)

    with served.dispatcher() as dispatcher:
        served.proxy.fault = silent
        dispatcher.deadline_s = time.monotonic() + 0.5
        assert torch.equal(greedy(served.model, 1), served.expected[:, : served.expected.shape[1] - TOKENS + 1])
        assert not released.is_set()
        released.set()
        dispatcher.settle()
        assert name in {each.function for each in dispatcher.take() if each.fallbacks}


def test_attempts_stay_within_the_budget_once_it_is_spent(served: Served) -> None:
    with served.dispatcher() as dispatcher:
        served.proxy.fault = faults.some(0.3, faults.fails, seed=1)
        while any(known.retries.allows for known in dispatcher.caller._known.values()) or not dispatcher.caller._known:
            served.answer(dispatcher)
        served.proxy.sent.clear()
        calls = sum(not each.late for _ in range(3) for each in served.answer(dispatcher))
        assert served.proxy.sent.total() <= 1.1 * calls + len(served.proxy.sent)  # each function may have most of a token left


def test_the_main_function_computes_the_same_bits(served: Served) -> None:
    """Also for prompts: float32 on one thread, as the functions have it."""
    function, batch = served.split.functions[0][0], Batch("float32", (1, 5), (2, 3), VALUES)
    with served.dispatcher() as dispatcher:
        (remote,) = dispatcher.caller.finish([dispatcher.caller.begin(0, function, batch, time.monotonic())], lambda: None)
        here = LastResort(str(served.split.shards)).compute(function.shard, batch)
        assert remote.data.tobytes() == here.data.tobytes()
