"""A real main server of a tiny model in this process, for clients of its APIs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import address
from remoe_cli.runtime.app import make_app
from remoe_cli.runtime.bearer import with_token
from remoe_cli.runtime.engine import start_engine
from remoe_cli.runtime.http_server import configured
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.receipt import Prices
from remoe_cli.runtime.server_config import ServerConfig

PRICES = Prices(
    catalog="by hand",
    main=MainPrices(rented=False, usd_per_s=0.04, usd_per_request=0.0, usd_per_read=0.0),
    function=FunctionPrices(
        usd_per_gb_second=0.1, usd_per_storage_gb_second=0.0, storage_free_mb=0.0, usd_per_call=0.001, usd_per_read=0.0
    ),
)


def whole_model(folder: Path) -> MainFunction:
    """The main function of a checkpoint, with all its experts."""
    checkpoint = find(str(folder))
    spec = read_spec(checkpoint)
    config = ServerConfig(model=ModelRef(path=checkpoint.name, revision=checkpoint.revision), spec=spec, functions=(), prices=PRICES)
    return MainFunction(config, start_engine(checkpoint, spec, {}, lambda connections, timeout_s: None))


@contextmanager
def serving(main: Any, limits: Limits = Limits(), host: str = "127.0.0.1", token: str | None = None) -> Iterator[str]:  # noqa: B008
    """Serve it from a thread; yields its URL."""
    loading: Future[MainFunction] = Future()
    loading.set_result(main)
    ending = threading.Event()
    with ThreadPoolExecutor(1) as model_thread, address.listen(host, 0) as listener:
        app: Any = with_token(make_app(loading, model_thread, ending, limits), token)
        running = uvicorn.Server(configured(app))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield address.url(host, listener.getsockname()[1])
        finally:
            running.should_exit = True
            ending.set()
            thread.join(30)
            assert not thread.is_alive()
