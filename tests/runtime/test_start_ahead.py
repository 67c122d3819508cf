"""Functions that are started before their calls: which, how the calls wait, and what the receipt has of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest
import torch

from remoe_cli.cages import Mechanism
from remoe_cli.function.codec import Batch
from remoe_cli.model.checkpoint import find
from remoe_cli.runtime.calls import Caller
from remoe_cli.runtime.dispatch import Dispatcher
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.hedging import size_class
from remoe_cli.runtime.invoke import Invocation
from remoe_cli.runtime.receipt import make_receipt
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.server_config import StartPolicy
from remoe_cli.runtime.start_ahead import Starts, chosen, instances, likely_experts, start_all
from tests.support.api_server import PRICES
from tests.support.batching import engine_with
from tests.support.endpoint import Endpoint, failed, ok
from tests.support.families import EXPERTS, save
from tests.support.split import split_model

POLICY = StartPolicy(idle_s=300.0, most_usd=1.0, n_in=20, usd_per_call=0.0)


def function(name: str, share: float = 0.9, start_usd: float = 0.0, replicas: int = 1, expert_usd: float = 0.0) -> RemoteFunction:
    """A function of which a token needs, with that chance, the first of two experts."""
    return RemoteFunction(name, (4, 7), replicas, 0.0, use=(share, 0.0), start_usd=start_usd, expert_usd=expert_usd)


REMOTE = {
    2: [function("first")],
    3: [function("often", 0.5), function("seldom", 0.02)],
    4: [function("always", 1.0)],
}


@pytest.mark.parametrize(
    ("tokens", "policy", "called_s", "names"),
    [
        (8, POLICY, {}, ["often", "always"]),  # the first layer's own call comes as soon; 'seldom' has a chance of 15%
        (64, POLICY, {}, ["often", "seldom", "always"]),
        (64, POLICY, {"often": 900.0, "always": 690.0}, ["seldom", "always"]),  # called 100 s ago, it is warm
        (64, POLICY.model_copy(update={"usd_per_call": 0.1, "most_usd": 0.2}), {}, ["often", "always"]),  # two calls, the likeliest
        (64, POLICY.model_copy(update={"usd_per_call": 0.4}), {}, ["often", "always"]),
    ],
)
def test_what_is_gone_and_likely_and_within_the_cap_is_started(
    tokens: int, policy: StartPolicy, called_s: dict[str, float], names: list[str]
) -> None:
    assert [f.name for f in chosen(REMOTE, called_s, 1000.0, tokens, policy)] == names


def test_a_start_that_may_be_in_vain_counts_by_its_chance() -> None:
    remote = {0: [], 1: [function("f", 0.5, start_usd=0.5, expert_usd=0.5)]}
    allowed = {most_usd: chosen(remote, {}, 0.0, 2, POLICY.model_copy(update={"most_usd": most_usd})) for most_usd in (0.2, 0.3)}
    assert not allowed[0.2] and allowed[0.3]  # a quarter of the prompts of 2 tokens do not need it


def test_a_function_is_not_started_for_experts_that_are_kept_here() -> None:
    """By layer and number. Of a deployment that does not tell the use of its experts nothing is started anyway."""
    assert [f.name for f in chosen(REMOTE, {}, 1000.0, 8, POLICY, held={(4, 4)})] == ["often"]
    assert [f.name for f in chosen(REMOTE, {}, 1000.0, 8, POLICY, held={(3, 4), (4, 7)})] == ["always"]
    unknown = {2: [], 3: [replace(function("old"), use=())]}
    assert chosen(unknown, {}, 1000.0, 8, POLICY, held={(3, 4)}) == []


def test_what_was_started_is_not_started_again_by_the_next_request(endpoint: Endpoint) -> None:
    """Although the request before has not called it: its prompt needed none of the experts, or it was cancelled."""
    endpoint.script = [ok(init=50.0, body=b"{}")]
    with ThreadPoolExecutor(2) as pool:
        dispatcher = Dispatcher(endpoint.client, {}, REMOTE, pool, policy=POLICY)
        for _ in range(2):
            dispatcher.start_ahead(8)
            dispatcher.settle()
    assert sorted(path.split("/")[3] for path, _, _ in endpoint.requests) == ["always", "often"]


def test_experts_are_read_that_a_prompt_will_probably_need() -> None:
    remote = RemoteFunction("f", (3, 5, 6, 9), 1, 0.0, use=(0.1, 0.3, 0.02, 0.2))
    assert [likely_experts(remote, tokens) for tokens in (1, 3, 8, 100)] == [(), (5,), (3, 5, 9), (3, 5, 6, 9)]
    assert likely_experts(replace(remote, use=()), 100) == (), "an older deployment does not tell the use of its experts"


def test_as_many_instances_start_as_the_rows_will_be_divided_among() -> None:
    assert [instances(function("f", 0.5, replicas=2), tokens) for tokens in (4, 64, 1000)] == [1, 2, 2]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as made:
        yield made


BATCH = Batch("float32", (1,), (2,), np.ones((2, 8), np.float32))


def test_a_call_is_sent_when_its_function_has_started(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(2) as pool:
        caller, holding = Caller(endpoint.client, pool, []), Event()
        sent: list[Invocation] = []
        starts = Starts(lambda: holding.wait(5) and endpoint.client, sent)
        endpoint.script = [ok(init=50.0, body=b"{}"), ok()]
        # The start begins in a thread of its own, which waits here for the client.
        begun = ThreadPoolExecutor(1).submit(starts.begin, REMOTE[4][0], 1, (4,))
        holding.set()
        begun.result()
        call = caller.begin(4, REMOTE[4][0], BATCH, time.monotonic(), after=starts.take("always"))
        (answer,) = caller.finish([call], lambda: None)
        assert answer.data.tobytes() == BATCH.data.tobytes()
        assert endpoint.requests[0][2] == b'{"health": true, "bring": [4]}' and endpoint.requests[1][2][:1] == b'"'
        starts.collect()
        (start,), (called,) = sent, caller.sent
        assert (start.starts_ahead, start.cold_tries, start.plain) == (1, 1, False)
        assert called.after_start and not called.plain, "a call that makes experts ready is no sample of a warm one"
        assert not caller._known["always"].latencies.get(size_class(2)), "nor does it tell when to send a call again"


def test_a_start_that_fails_leaves_the_call_its_own_tries(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(2) as pool:
        caller, sent = Caller(endpoint.client, pool, []), list[Invocation]()
        starts = Starts(lambda: endpoint.client, sent)
        endpoint.script = [failed("Runtime.InitError"), ok()]
        starts.begin(REMOTE[4][0], 1, (4,))
        call = caller.begin(4, REMOTE[4][0], BATCH, time.monotonic(), after=starts.take("always"))
        assert len(caller.finish([call], lambda: None)) == 1
        starts.settle()
        assert sent[0].failed and sent[0].starts_ahead == 1 and caller.sent[0].retries == 0


def test_when_a_main_function_loads_all_functions_read_what_its_plans_prompts_need(endpoint: Endpoint) -> None:
    endpoint.script, sent = [ok(init=50.0, body=b"{}")], list[Invocation]()
    starting = start_all(REMOTE, lambda connections, timeout_s: endpoint.client, sent, POLICY.model_copy(update={"n_in": 8}))
    with starting.pool:
        assert [start.result() for start in starting.starts] == [None] * 4
    bodies = {path.split("/")[3]: body for path, _, body in endpoint.requests}
    reads, plain = b'{"health": true, "bring": [4]}', b'{"health": true}'
    assert bodies == {"first": reads, "often": reads, "always": reads, "seldom": plain} and len(sent) == 4


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, probed: Mechanism) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("twin")
    save("mixtral", torch.float32, folder / "model", fused=False)
    every = {0: [tuple(range(EXPERTS))], 1: [tuple(range(4)), tuple(range(4, EXPERTS))]}
    with split_model(find(str(folder / "model")), {0: (), 1: ()}, every, Path(folder / "twin"), probed) as made:
        model, dispatcher = made
        dispatcher.remote = {
            layer: [replace(f, use=(0.5,) * len(f.experts)) for f in of_layer] for layer, of_layer in dispatcher.remote.items()
        }
        dispatcher.policy = POLICY
        yield engine_with(model, dispatcher)


def test_the_later_layers_start_at_once_and_every_start_is_billed_once(twin: Engine) -> None:
    cold, warm = (twin.generate(list(range(2, 22)), 2) for _ in range(2))
    assert cold.token_ids == warm.token_ids
    receipt = make_receipt(cold, PRICES)
    assert (receipt.starts_ahead, receipt.cold_starts) == (2, 3), "a call did not wait for its function, and started another instance"
    assert sum(line.starts_ahead for line in receipt.functions) == 2 and receipt.invocations == len(cold.invocations)
    assert [call.init_ms for call in cold.invocations if call.after_start] == [None, None]
    receipt = make_receipt(warm, PRICES)
    assert (receipt.starts_ahead, receipt.cold_starts) == (0, 0) and "starts_ahead" not in receipt.model_dump_json()


def test_a_call_that_nobody_waits_for_is_not_sent(endpoint: Endpoint) -> None:
    """Its pass has failed while its function started."""
    endpoint.script, start = [ok()], Future[Invocation]()
    with ThreadPoolExecutor(1) as pool:
        caller = Caller(endpoint.client, pool, [])
        caller.begin(4, REMOTE[4][0], BATCH, time.monotonic(), after=start)
        ends = Timer(0.1, start.set_result, [None])
        ends.start()
        caller.settle(None)
    assert not endpoint.requests
