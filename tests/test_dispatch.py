"""Dividing rows into invocations, and a model whose experts answer over HTTP."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remoe_cli.errors import InvokeError
from remoe_cli.function.codec import STORAGE, Batch, from_wire, pack, to_wire, unpack
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.runtime.dispatch import PAYLOAD_LIMIT_BYTES, Dispatcher, RemoteLayer, divide
from tests.endpoint import Endpoint, ok, report
from tests.families import build
from tests.harness import InProcessExperts, greedy, logits

Rows = dict[int, npt.NDArray[Any]]


def numbered(counts: dict[int, int], width: int, dtype: str) -> Rows:
    """Rows that name their expert (column 0) and their place in it (columns 1 and 2); bfloat16 holds 256 values exactly."""
    rows = {}
    for expert, n in counts.items():
        x = np.zeros((n, width), STORAGE[dtype])
        x[:, 0], x[:, 1], x[:, 2] = expert, np.arange(n) // 256, np.arange(n) % 256
        rows[expert] = x
    return rows


def wire(batch: Batch) -> int:
    return len(to_wire(pack(batch)))


# 300 of the widest rows fill 1.8 payloads in float32 and 0.9 in the others, so that experts are divided, and layers too.
@settings(max_examples=60, deadline=None)
@given(
    counts=st.dictionaries(st.integers(0, 255), st.integers(1, 300), min_size=1, max_size=8),
    width=st.sampled_from([3, 64, 2048, 7168]),
    dtype=st.sampled_from(sorted(STORAGE)),
    replicas=st.integers(1, 5),
)
def test_every_row_leaves_once_in_order_and_within_the_limit(counts: dict[int, int], width: int, dtype: str, replicas: int) -> None:
    rows = numbered(counts, width, dtype)
    batches = divide(rows, dtype, replicas)
    parts: dict[int, list[npt.NDArray[Any]]] = {e: [] for e in rows}
    for batch in batches:
        assert wire(batch) <= PAYLOAD_LIMIT_BYTES
        back = unpack(pack(batch))  # the strict reader takes it
        for expert, part in zip(back.experts, np.split(back.data, np.cumsum(back.rows)[:-1]), strict=True):
            parts[expert].append(part)
    for expert, x in rows.items():
        assert np.array_equal(np.concatenate(parts[expert]), x)
        alone = wire(Batch(dtype, (expert,), (len(x),), x))
        assert len(parts[expert]) == 1 or alone > PAYLOAD_LIMIT_BYTES
    everything = sum(wire(Batch(dtype, (e,), (len(x),), x)) for e, x in rows.items())
    if everything <= PAYLOAD_LIMIT_BYTES:
        assert len(batches) <= replicas
    again = divide(dict(reversed(rows.items())), dtype, replicas)
    assert [(b.experts, b.rows) for b in again] == [(b.experts, b.rows) for b in batches]


@pytest.mark.parametrize("dtype", sorted(STORAGE))
def test_a_payload_is_filled_to_the_last_row(dtype: str) -> None:
    """Rows of one expert go out whole up to exactly the limit: one row more than fits makes a second invocation."""
    width = 2048

    def too_large(rows: int) -> bool:
        return wire(Batch(dtype, (0,), (rows,), np.zeros((rows, width), STORAGE[dtype]))) > PAYLOAD_LIMIT_BYTES

    most = bisect.bisect_left(range(5000), True, lo=1, key=too_large) - 1
    assert [b.rows for b in divide({0: np.zeros((most, width), STORAGE[dtype])}, dtype, 1)] == [(most,)]
    assert [b.rows for b in divide({0: np.zeros((most + 1, width), STORAGE[dtype])}, dtype, 4)] == [(most,), (1,)]


def test_decode_stays_one_invocation_however_many_replicas() -> None:
    (batch,) = divide(numbered(dict.fromkeys((9, 2, 5), 1), 8, "float32"), "float32", 4)
    assert (batch.experts, batch.rows) == ((2, 5, 9), (1, 1, 1))


def test_replicas_share_the_rows_longest_first() -> None:
    """LPT by hand: 50 | 40 | 30, then 25 joins 30, 20 joins 40, 15 joins 50, and 10 joins 55."""
    counts = {0: 10, 1: 50, 2: 15, 3: 40, 4: 20, 5: 30, 6: 25}
    batches = divide(numbered(counts, 8, "float32"), "float32", 3)
    assert [b.experts for b in batches] == [(1, 2), (3, 4), (0, 5, 6)]
    assert [sum(b.rows) for b in batches] == [65, 60, 65]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=20), replicas=st.integers(1, 6))
def test_the_fullest_replica_is_within_lpts_bound(counts: list[int], replicas: int) -> None:
    batches = divide(numbered(dict(enumerate(counts)), 4, "float32"), "float32", replicas)
    bins = max(1, min(replicas, sum(counts) // 16, len(counts)))
    assert len(batches) == bins
    # Any list schedule ends within the mean plus (1 - 1/z) of its largest piece.
    assert max(sum(b.rows) for b in batches) <= sum(counts) / bins + (1 - 1 / bins) * max(counts)


def test_few_rows_are_not_worth_a_second_invocation() -> None:
    assert len(divide(numbered({0: 16, 1: 15}, 4, "float32"), "float32", 2)) == 1
    assert len(divide(numbered({0: 16, 1: 16}, 4, "float32"), "float32", 2)) == 2


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    with made.running():
        yield made


def dispatcher(client: Any, local: dict[int, tuple[int, ...]], replicas: int, pool: ThreadPoolExecutor) -> Dispatcher:
    rows = {layer: {e: i for i, e in enumerate(experts)} for layer, experts in local.items()}
    remote = {n: RemoteLayer(f"layer-{n:03d}", tuple(e for e in range(8) if e not in experts), replicas) for n, experts in local.items()}
    return Dispatcher(client, rows, remote, pool)


class Answering(Endpoint):
    """Replies as the functions of a whole model would."""

    def __init__(self, experts: InProcessExperts, layers: dict[str, Any]) -> None:
        super().__init__()
        handler: Any = self.server.RequestHandlerClass

        def do_POST(this: Any) -> None:
            body = this.rfile.read(int(this.headers["Content-Length"]))
            name = this.path.split("/")[3]
            self.requests.append((name, {}, body))
            batch = unpack(from_wire(body))
            parts = np.split(batch.data, np.cumsum(batch.rows)[:-1])
            done = [experts._expert(layers[name].layer, e).run(x) for e, x in zip(batch.experts, parts, strict=True)]
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
    endpoint = Answering(InProcessExperts(whole), {f"layer-{x.layer:03d}": x for x in expert_layers(whole)})
    with endpoint.running(), ThreadPoolExecutor(4) as pool:
        runner = dispatcher(endpoint.client, local, replicas, pool)
        attachment = attach(split, runner)
        assert (logits(split) - logits(whole)).abs().max() < 1e-4
        attachment.check_fired(1)
        sent = runner.take()
        # 40 tokens x top-2, some of them local: 1 invocation a layer, or as many as rows allow with 3 replicas
        assert [c.function for c in sent].count("layer-000") == replicas
        assert len(sent) == len(endpoint.requests) == 2 * replicas
        assert runner.take() == []
        assert torch.equal(greedy(split), greedy(whole))
        assert {c.billed_ms for c in runner.take()} == {2}


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
    (batch,) = divide({e: x.numpy() for e, x in rows.items()}, "float32", 1)
    endpoint.script = [ok(body=to_wire(pack(change(batch))))]
    with ThreadPoolExecutor(1) as pool:
        runner = dispatcher(endpoint.client, {0: (0, 1)}, 1, pool)
        with pytest.raises(InvokeError, match="answered other rows than it was sent"):
            runner._send(layer, rows)()


def test_an_answer_with_a_nan_is_refused(endpoint: Endpoint) -> None:
    layer = expert_layers(build("mixtral"))[0]
    endpoint.script = [ok(body=to_wire(pack(Batch("float32", (2,), (1,), np.full((1, 64), np.nan, np.float32)))))]
    with ThreadPoolExecutor(1) as pool, pytest.raises(InvokeError, match="cannot be read: rows hold an infinity or a NaN"):
        dispatcher(endpoint.client, {0: (0, 1)}, 1, pool)._send(layer, {2: torch.ones(1, 64)})()


def test_warming_pings_every_function_once(endpoint: Endpoint) -> None:
    endpoint.script = [ok(120.0, body=b"{}")]
    with ThreadPoolExecutor(4) as pool:
        started = [f.result() for f in dispatcher(endpoint.client, {0: (), 1: ()}, 2, pool).warm()]
    assert sorted(c.function for c in started) == ["layer-000", "layer-001"]
    assert {c.init_ms for c in started} == {120.0}
    assert {body for _, _, body in endpoint.requests} == {b'{"health": true}'}
