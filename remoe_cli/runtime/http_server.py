"""The HTTP server of a main function (app.py), which ends on signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import uvicorn

from remoe_cli.runtime.access import Door, Guarded
from remoe_cli.runtime.app import make_app
from remoe_cli.runtime.bearer import with_token
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.main_function import MainFunction

_END_S = 20  # for answers under way when the server ends
# Clients keep an idle connection for 5 s (httpx, and so openai's and anthropic's). A server that ended it as soon, as uvicorn does, would
# now and then end one as its next request comes.
_IDLE_S = 75


class Server(uvicorn.Server):
    """A uvicorn server that ends on SIGINT and SIGTERM without raising the signal again.

    Process 1 of a container does not die of a signal that it raises.
    """

    def __init__(self, config: uvicorn.Config, ending: threading.Event) -> None:
        super().__init__(config)
        self._ending = ending

    def end(self) -> None:
        self.force_exit = self._ending.is_set()  # a second signal ends at once
        self._ending.set()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, lambda *_: self.end()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def http_server(
    loading: Future[MainFunction], model_thread: Executor, ending: threading.Event, door: Door, limits: Limits, token: str | None
) -> Server:
    """Make the HTTP server of a main function that may still be loading.

    `door` and `token` say which requests are answered.
    """
    app = Guarded(with_token(make_app(loading, model_thread, ending, limits), token), door)
    return Server(configured(app), ending)


def configured(app: Any) -> uvicorn.Config:
    """Say how an application is served."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # X-Forwarded-For would say who asks
        timeout_graceful_shutdown=_END_S,
        timeout_keep_alive=_IDLE_S,
    )
