"""A model whose experts answer over HTTP: the dispatcher, its functions and replicas, and what it refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.model import experts
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import ExpertLayer, attach, expert_layers, run_expert
from remoe_cli.model.spec import read_spec
from remoe_cli.runtime import calls, engine, start_ahead
from remoe_cli.runtime.dispatch import Dispatcher, divide
from remoe_cli.runtime.invoke import Invocation, make_client
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.start_ahead import start_all
from tests.support.endpoint import Endpoint, failed, ok, report
from tests.support.families import build, save
from tests.support.harness import InProcessExperts, greedy, logits


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as made:
        yield made


def remote(local: dict[int, tuple[int, ...]], replicas: int, functions: int = 1) -> dict[int, tuple[RemoteFunction, ...]]:
    """The functions of the experts that are not local, dealt out in turn."""
    remote_ids = {layer: [e for e in range(8) if e not in experts] for layer, experts in local.items()}
    return {
        layer: tuple(RemoteFunction(f"layer-{layer:03d}-{f}", tuple(experts[f::functions]), replicas, 0.0) for f in range(functions))
        for layer, experts in remote_ids.items()
    }


def dispatcher(client: Any, local: dict[int, tuple[int, ...]], replicas: int, pool: ThreadPoolExecutor) -> Dispatcher:
    rows = {layer: {e: i for i, e in enumerate(experts)} for layer, experts in local.items()}
    return Dispatcher(client, rows, remote(local, replicas), pool)


class Answering(Endpoint):
    """Replies as the functions of a whole model would, each after `hold(its name)`."""

    def __init__(self, whole: PreTrainedModel, hold: Callable[[str], object] = lambda name: None) -> None:
        super().__init__()
        served = InProcessExperts(whole)
        handler: Any = self.server.RequestHandlerClass

        def do_POST(this: Any) -> None:
            body = this.rfile.read(int(this.headers["Content-Length"]))
            name = this.path.split("/")[3]
            self.requests.append((name, {}, body))
            answer = b"{}"
            if body[:1] == b'"':
                hold(name)
                batch = unpack(from_wire(body))
                parts = np.split(batch.data, np.cumsum(batch.rows)[:-1])
                layer = int(name.split("-")[1])
                done = [served._expert(layer, e).run(x) for e, x in zip(batch.experts, parts, strict=True)]
                answer = to_wire(pack(Batch(batch.dtype, batch.experts, batch.rows, np.concatenate(done), 5)))
            this.send_response(200)
            this.send_header("X-Amz-Log-Result", report(1.0, 2, 128).decode())
            this.send_header("Content-Length", str(len(answer)))
            this.end_headers()
            this.wfile.write(answer)

        handler.do_POST = do_POST


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_model_served_over_http_answers_as_in_one_process(replicas: int) -> None:
    whole, split = build("mixtral"), build("mixtral")
    local: dict[int, tuple[int, ...]] = {x.layer: (0, 5) for x in expert_layers(whole)}
    for layer in expert_layers(split):
        for name, p in layer.parameters().items():
            setattr(layer.module, name, torch.nn.Parameter(p[[0, 5]].clone(), requires_grad=False))
    with Answering(whole) as endpoint, ThreadPoolExecutor(4) as pool:
        runner = dispatcher(endpoint.client, local, replicas, pool)
        attachment = attach(split, runner)
        assert (logits(split) - logits(whole)).abs().max() < 1e-4
        attachment.check_fired(1)
        sent = runner.take()
        # 40 tokens x top-2, some of them local: 1 invocation a layer, or as many as rows allow with 3 replicas
        assert [c.function for c in sent].count("layer-000-0") == replicas
        assert len(sent) == len(endpoint.requests) == 2 * replicas
        assert runner.take() == []
        assert torch.equal(greedy(split), greedy(whole))
        assert {c.billed_ms for c in runner.take()} == {2}


def test_replicas_share_the_work_of_their_own_function_only() -> None:
    whole = build("mixtral")
    counts = {0: 100, 1: 40, 2: 30, 3: 20, 4: 10, 6: 90, 7: 90}  # the first five as divided by hand in test_divide.py
    functions = (RemoteFunction("layer-000-0", (0, 1, 2, 3, 4), 2, 50.0), RemoteFunction("layer-000-1", (5, 6, 7), 1, 50.0))
    with Answering(whole) as endpoint, ThreadPoolExecutor(3) as pool:
        runner = Dispatcher(endpoint.client, {0: {}}, {0: functions}, pool)
        outputs = runner._send(expert_layers(whole)[0], {e: torch.ones(n, 64) for e, n in counts.items()})()
        assert {e: len(x) for e, x in outputs.items()} == counts
        sent = sorted((name, unpack(from_wire(body)).experts) for name, _, body in endpoint.requests)
    assert sent == [("layer-000-0", (0, 3)), ("layer-000-0", (1, 2, 4)), ("layer-000-1", (6, 7))]


def test_all_functions_of_a_layer_compute_while_local_experts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local experts wait until every function of their layer has its call, and no function answers before one of them has started."""
    whole = save("mixtral", torch.float32, tmp_path, fused=False)
    checkpoint, layers = find(str(tmp_path)), [x.layer for x in expert_layers(whole)]
    started = {layer: threading.Event() for layer in layers}
    asked: dict[int, list[str]] = {layer: [] for layer in layers}

    def hold(name: str) -> None:
        layer = int(name.split("-")[1])
        asked[layer].append(name)
        assert started[layer].wait(10)

    def run_local(layer: ExpertLayer, row: int, x: torch.Tensor) -> torch.Tensor:
        give_up = time.monotonic() + 10
        while len(asked[layer.layer]) < 3 and time.monotonic() < give_up:
            time.sleep(0.01)
        assert sorted(asked[layer.layer]) == [f"layer-{layer.layer:03d}-{f}" for f in range(3)]
        started[layer.layer].set()
        return run_expert(layer, row, x)

    monkeypatch.setattr(start_ahead, "_CONNECTIONS", 1)  # so that those of the layer's functions are all that there are
    monkeypatch.setattr(engine, "load_tokenizer", lambda checkpoint: None)
    functions = remote(dict.fromkeys(layers, (0, 5)), 1, functions=3)
    with Answering(whole, hold) as endpoint:
        expected = logits(whole)
        monkeypatch.setattr(experts, "run_expert", run_local)
        split = engine.start_engine(checkpoint, read_spec(checkpoint), functions, partial(make_client, endpoint.url))
        assert (logits(split.model) - expected).abs().max() < 1e-4
        assert split.dispatcher.client.meta.config.max_pool_connections == 2 * 3
        split.dispatcher.pool.shutdown()
        split.dispatcher.client.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda b: Batch(b.dtype, b.experts[:1], b.rows[:1], b.data[: b.rows[0]]),
        lambda b: Batch(b.dtype, tuple(e + 1 for e in b.experts), b.rows, b.data),
        lambda b: Batch(b.dtype, b.experts, b.rows, b.data[:, :-1]),
        lambda b: Batch("float16", b.experts, b.rows, b.data.astype(np.float16)),
    ],
    ids=["fewer rows", "other experts", "narrower", "another dtype"],
)
def test_an_answer_to_something_else_is_refused(endpoint: Endpoint, change: Callable[[Batch], Batch]) -> None:
    layer = expert_layers(build("mixtral"))[0]
    rows = {2: torch.ones(2, 64), 3: torch.zeros(1, 64)}
    (batch,) = divide({e: x.numpy() for e, x in rows.items()}, "float32", 1, 0.0)
    endpoint.script = [ok(body=to_wire(pack(change(batch))))]
    with ThreadPoolExecutor(1) as pool:
        runner = dispatcher(endpoint.client, {0: (0, 1)}, 1, pool)
        with pytest.raises(InvokeError, match="answered other rows than it was sent"):
            runner._send(layer, rows)()
        # It is billed all the same: five tries, and twice the end of an instance that keeps answering so.
        assert [(c.billed_ms, c.billed_tries, c.retries, c.failed) for c in runner.take()] == [(7 * 13, 7, 4, True)]
        assert [body for _, _, body in endpoint.requests].count(b'{"end": true}') == 2


def test_an_answer_with_a_nan_is_refused(endpoint: Endpoint) -> None:
    layer = expert_layers(build("mixtral"))[0]
    endpoint.script = [ok(body=to_wire(pack(Batch("float32", (2,), (1,), np.full((1, 64), np.nan, np.float32)))))]
    with ThreadPoolExecutor(1) as pool, pytest.raises(InvokeError, match="cannot be read: rows hold an infinity or a NaN"):
        dispatcher(endpoint.client, {0: (0, 1)}, 1, pool)._send(layer, {2: torch.ones(1, 64)})()


def test_warming_pings_every_function_once(endpoint: Endpoint) -> None:
    endpoint.script = [ok(120.0, body=b"{}")]
    functions, started = remote({0: ()}, 1, functions=3) | remote({1: ()}, 2), list[Invocation]()
    starting = start_all(functions, lambda connections, timeout_s: endpoint.client, started, None)
    with starting.pool:
        assert [f.result() for f in starting.starts] == [None] * 4
    assert sorted(c.function for c in started) == ["layer-000-0", "layer-000-1", "layer-000-2", "layer-001-0"]
    assert {c.init_ms for c in started} == {120.0}
    assert {body for _, _, body in endpoint.requests} == {b'{"health": true}'}


def test_calls_that_fail_or_that_nobody_waits_for_any_more_are_kept(endpoint: Endpoint) -> None:
    """The first function fails at once; the others of the layer answer later, and are billed."""
    died = failed("Runtime.OutOfMemory")
    died.headers["X-Amz-Log-Result"] = report(700.0, 701, 512).decode()
    late = threading.Event()

    class Client:
        """Fails for one function, and lets the others wait for that."""

        def invoke(self, FunctionName: str, **given: Any) -> Any:
            if FunctionName != "layer-000-0":
                assert late.wait(10)
            return endpoint.client.invoke(FunctionName=FunctionName, **given)

    endpoint.script = [died, ok()]
    functions = tuple(RemoteFunction(f"layer-000-{e}", (e,), 1, 0.0) for e in range(3))
    with ThreadPoolExecutor(3) as pool:
        runner = Dispatcher(Client(), {0: {}}, {0: functions}, pool)
        wait = runner._send(expert_layers(build("mixtral"))[0], {e: torch.ones(1, 64) for e in range(3)})
        with pytest.raises(InvokeError, match=r"The expert function layer-000-0 of layer 0 failed: Runtime\.OutOfMemory"):
            wait()
        late.set()
        runner.settle()
        kept = runner.take()
    assert sorted((c.function, c.billed_ms, c.billed_tries, c.failed) for c in kept) == [
        ("layer-000-0", 701, 1, True),
        ("layer-000-1", 13, 1, False),
        ("layer-000-2", 13, 1, False),
    ]


def test_a_layer_does_not_wait_longer_than_the_main_function_has_time(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has spent so far would be lost; a call that ends later is billed with the next request."""
    monkeypatch.setattr(calls, "LOOK_S", 0.01)
    monkeypatch.setattr(calls, "LAST_S", 0.01)
    late, reasons = threading.Event(), iter([None, None, *["time-limit"] * 9])

    class Client:
        def invoke(self, **given: Any) -> Any:
            assert late.wait(10)
            return endpoint.client.invoke(**given)

    endpoint.script = [ok()]
    with ThreadPoolExecutor(1) as pool:
        runner = dispatcher(Client(), {0: (0, 1)}, 1, pool)
        runner.stopped = lambda: next(reasons)
        with pytest.raises(InvokeError, match="time ended while the expert function layer-000-0 of layer 0 was computing"):
            runner._send(expert_layers(build("mixtral"))[0], {2: torch.ones(1, 64)})()
        runner.settle()
        assert [(c.function, c.unreported, c.billed_ms) for c in runner.take()] == [("layer-000-0", 1, 0)]
        late.set()
    assert [(c.unreported, c.billed_ms) for c in runner.take()] == [(0, 13)]


def test_what_is_noted_while_invocations_are_taken_is_taken_the_next_time() -> None:
    class Growing(list[Any]):
        """A try that ends late notes itself in between."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            if isinstance(key, slice):
                self.append("late")
            return found

    with ThreadPoolExecutor(1) as pool:
        runner = Dispatcher(None, {}, {}, pool, sent=Growing(["first"]))
        assert runner.take() == ["first"] and list(runner.sent) == ["late"]
