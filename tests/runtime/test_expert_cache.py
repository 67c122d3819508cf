"""Remote experts in the main process's spare memory: the same tokens, fewer calls, and what they saved in the receipt."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from remoe_cli.cages import Mechanism
from remoe_cli.function.weights import Array, Shard
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.runtime import expert_cache
from remoe_cli.runtime.answer import Generated, Saved, together
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.expert_cache import ExpertCache, cache_of
from remoe_cli.runtime.last_resort import LastResort, ShardPlace
from remoe_cli.runtime.receipt import make_receipt
from remoe_cli.runtime.shares import Owed, divide_saved
from tests.support.api_server import PRICES
from tests.support.batching import engine_with
from tests.support.families import EXPERTS, save
from tests.support.split import split_model

TOKENS, PER_CALL_USD = 8, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("twin")


@pytest.fixture(scope="module")
def engine(folder: Path, probed: Mechanism) -> Iterator[Engine]:
    """An engine with a function for half of the experts of each layer."""
    save("mixtral", torch.float32, folder / "model", fused=False)
    local: dict[int, tuple[int, ...]] = {0: tuple(range(4)), 1: tuple(range(4))}
    parts = {layer: [tuple(range(4, EXPERTS))] for layer in (0, 1)}
    with split_model(find(str(folder / "model")), local, parts, folder / "twin", probed) as (model, dispatcher):
        yield engine_with(model, dispatcher)


@pytest.fixture
def cache(engine: Engine, folder: Path) -> Iterator[ExpertCache]:
    shards = LastResort(str(folder / "twin" / "bundle"))
    made = ExpertCache(engine.dispatcher.remote, EXPERTS, shards.shard, lambda function, memory_mb, billed_ms: PER_CALL_USD)
    engine.dispatcher.cache = made
    yield made
    made.settle()
    engine.dispatcher.cache = None


def answered(engine: Engine) -> Generated:
    made = engine.generate(list(range(2, 22)), TOKENS)
    if engine.dispatcher.cache:
        engine.dispatcher.cache.settle()
    return made


def filled(engine: Engine, cache: ExpertCache) -> None:
    """Let the cache hold all experts that the prompt and its answer use."""
    for layer in expert_layers(engine.model):
        for expert in range(4, EXPERTS):
            cache.use(layer, [expert])
            cache.settle()


def test_calls_whose_experts_are_here_are_not_made_and_tokens_are_the_same(engine: Engine, cache: ExpertCache) -> None:
    engine.dispatcher.cache = None
    without = answered(engine)
    engine.dispatcher.cache = cache
    answered(engine)  # whose calls tell what calls cost
    filled(engine, cache)
    made = answered(engine)
    assert made.token_ids == without.token_ids
    assert without.invocations and not made.invocations and made.saved.calls == sum(call.rows > 0 for call in without.invocations)
    receipt = make_receipt(made, PRICES)
    assert (receipt.saved_calls, receipt.saved_usd) == (made.saved.calls, pytest.approx(PER_CALL_USD * made.saved.calls))
    assert "saved_calls" not in make_receipt(without, PRICES).model_dump_json()


def test_a_call_of_which_some_experts_are_here_is_made_with_the_others(engine: Engine, cache: ExpertCache) -> None:
    engine.dispatcher.cache = None
    without = answered(engine)
    engine.dispatcher.cache = cache
    cache.room = 3
    for _ in range(3):
        made = answered(engine)
        assert made.token_ids == without.token_ids
    assert len(cache.held) == 3, "it holds more than there is room for, or not all that fits"
    assert sum(call.rows for call in made.invocations) < sum(call.rows for call in without.invocations)
    calls = [sum(call.rows > 0 for call in each.invocations) for each in (without, made)]  # not those that a slow one was hedged with
    assert made.saved.calls + calls[1] == calls[0]


def test_an_expert_gives_its_place_to_one_that_is_used_clearly_more(engine: Engine, cache: ExpertCache) -> None:
    layer = expert_layers(engine.model)[0]
    use = partial(cache.use, layer)
    cache.room = 1
    held = []
    for experts in ([4], [4], [5], [5], [5], [5], [5], [4]):
        use(experts)
        cache.settle()
        held += [expert for _, expert in cache.held]
    assert held == [4, 4, 4, 4, 4, 4, 5, 5], "5 has to be used more than half as often again as 4"


def test_a_batch_pays_calls_by_the_rows_that_were_sent(engine: Engine) -> None:
    """One sequence's expert is at hand: it sends nothing, and pays nothing."""
    batch = engine.batch()
    (layer, (function, *_)) = next(iter(engine.dispatcher.remote.items()))
    first, second = function.experts[:2]
    chosen = [(layer, np.array([[first], [second]]))]
    assert batch._sent(2, chosen)[function.name] == [1, 1]
    engine.dispatcher.at_hand[layer] = {first}
    assert batch._sent(2, chosen)[function.name] == [0, 1]


def test_no_more_is_kept_than_half_of_the_free_memory(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(spare_experts=10, spec=SimpleNamespace(expert_bytes=1000), prices=None)
    for free, room in ((9_000, 4), (1_000_000, 10)):
        monkeypatch.setattr(expert_cache, "available_bytes", lambda free=free: free)
        made = cache_of(config, engine.dispatcher.remote, LastResort("shards"))  # type: ignore[arg-type]
        assert made is not None and made.room == room
    monkeypatch.setattr(expert_cache, "available_bytes", lambda: 100)
    assert cache_of(config, engine.dispatcher.remote, LastResort("shards")) is None  # type: ignore[arg-type]
    assert "this machine has no memory for them" in caplog.text


def test_nothing_is_loaded_after_three_failures_and_the_log_says_so(
    engine: Engine, cache: ExpertCache, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[ShardPlace] = []

    def broken(place: ShardPlace) -> None:
        tried.append(place)
        raise OSError("no such shard")

    cache.shard = broken  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        made = answered(engine), answered(engine)
        for expert in range(4, EXPERTS):
            cache.use(expert_layers(engine.model)[0], [expert])
            cache.settle()
    assert made[0].token_ids == made[1].token_ids and len(tried) == 3
    (said,) = [record.message for record in caplog.records if "No more experts are kept" in record.message]
    assert "OSError: no such shard" in said


def test_every_read_of_s3_is_billed_and_no_shard_stays_open(engine: Engine, cache: ExpertCache) -> None:
    """Also reads of a shard's head, and of an expert that cannot be read."""
    opened: list[Reading] = []

    class Reading:
        """A shard in S3, of which the first one that is opened cannot be read to its end."""

        def __init__(self, shard: Shard) -> None:
            self.shard, self.reads, self.fails, self.closed = shard, 1, not opened, False
            opened.append(self)

        def tensors(self, expert: int) -> Mapping[str, Array]:
            self.reads += 3
            if self.fails:
                raise OSError("the connection broke")
            return self.shard.tensors(expert)

        def close(self) -> None:
            self.closed = True

    shard = cache.shard
    cache.shard = lambda place: Reading(shard(place))  # type: ignore[assignment,return-value]
    for expert in (4, 4, 5):
        cache.use(expert_layers(engine.model)[0], [expert])
        cache.settle()
    assert len(cache.held) == 2 and all(each.closed for each in opened)
    assert sum(call.reads for call in cache.reads()) == 4 + 4 + 4 and not cache.reads()


def test_what_is_saved_is_divided_like_what_is_billed() -> None:
    owed: list[Owed] = [{}, {}]
    first, second = divide_saved(Saved(3, 1.0), owed), divide_saved(Saved(3, 1.0), owed)
    assert sum((*first, *second), Saved()) == Saved(6, 2.0)
    assert [a.calls + b.calls for a, b in zip(first, second, strict=True)] == [3, 3]
    one = Generated((1,), (2,), "a", "stop", (0.5,), (), saved=Saved(2, 0.5))
    assert together([one, one]).saved == Saved(4, 1.0)
