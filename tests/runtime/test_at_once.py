"""remoe serve --concurrency: another number of requests at once, where the family and the memory allow it."""

from __future__ import annotations

from typing import Any

import pytest

from remoe_cli.errors import UsageError
from remoe_cli.plan.asked import Served
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import at_once
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.server_config import ServerConfig
from tests.support.api_server import PRICES
from tests.support.batching import engine_of
from tests.support.routing_files import SPEC

SERVED = Served(cover=1, share=1, tokens=99, n_in=60, n_out=59)


def main_of(family: str, served: Served | None = SERVED) -> MainFunction:
    config = ServerConfig(model=ModelRef(path="m", revision="r"), spec=SPEC, functions=(), prices=PRICES, served=served)
    return MainFunction(config, engine_of(family))


def test_as_many_as_fit_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    main = main_of("mixtral")
    assert main.concurrency == 1 and at_once.with_concurrency(main, None) is main
    one = SPEC.kv_cache_bytes(100) + SPEC.hidden_state_bytes * 100
    monkeypatch.setattr(at_once, "_free_bytes", lambda main: 8 * one / 0.9 + 1)
    more = at_once.with_concurrency(main, 8)
    assert more.concurrency == 8 and at_once.with_concurrency(more, 1).concurrency == 1
    with pytest.raises(UsageError, match="9 requests of up to 100 tokens may take") as error:
        at_once.with_concurrency(main, 9)
    assert "--concurrency 8 or less" in error.value.hint


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**26 < at_once._free_bytes(main_of("mixtral")) < 2**50


def test_what_is_not_known_to_be_safe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="family 'minimax' answers one request at a time"):
        at_once.with_concurrency(main_of("minimax"), 2)
    unlimited: Any = main_of("mixtral", None)
    monkeypatch.setattr(type(unlimited.engine), "positions", None)
    with pytest.raises(UsageError, match="no longest request"):
        at_once.with_concurrency(unlimited, 2)
