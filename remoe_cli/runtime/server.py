"""Serve the main function over HTTP: on this machine, and in a SageMaker container.

    REMOE_LISTENER=DESCRIPTOR python -m remoe_cli.runtime.server SERVER.json RECEIPTS

Started as above it is the main server of a local deployment: it serves a socket that its parent has opened and keeps open, so that nobody
else gets the port between two runs. It ends when its standard input is closed, so it never outlives its parent. RECEIPTS is the folder in
which it keeps its receipts (kept.py).

app.py says what is answered, and access.py which requests are taken. POST takes application/json only.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from remoe_cli.errors import DeployError, RemoeError
from remoe_cli.runtime import address
from remoe_cli.runtime.access import Door, door_of
from remoe_cli.runtime.invoke import make_caller
from remoe_cli.runtime.keeping import keeping
from remoe_cli.runtime.kept import Book
from remoe_cli.runtime.limits import NO_LIMITS, Limits
from remoe_cli.runtime.load_main import load_here
from remoe_cli.runtime.main_function import MainFunction

_LAST_S = 2.0  # for a step that nobody waits for any more


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises: DeployError for one that cannot be opened."""
    try:
        return address.listen(host, port)
    except OSError as error:
        where = address.place(host, port)
        raise DeployError(f"The main function cannot listen on {where}: {error.strerror}.", "Choose another address or port.") from None


def serve(
    load: Callable[[], MainFunction],
    listener: socket.socket,
    door: Door,
    limits: Limits = NO_LIMITS,
    token: str | None = None,
    ready: Callable[[MainFunction], None] = lambda main: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then end within 20 s; requests are taken while the model loads.

    With a `token`, only those who have it are answered (bearer.py). `ready` is called once the model is loaded and GET /ready says so.

    Raises: what `load` raises.
    """
    model_thread, ending = ThreadPoolExecutor(1, "model"), threading.Event()
    loading = model_thread.submit(load)
    from remoe_cli.runtime.http_server import http_server  # what it imports takes a second, in which the model loads already

    server = http_server(loading, model_thread, ending, door, limits, token)
    loading.add_done_callback(lambda done: server.end() if done.exception() else ready(done.result()))
    with listener:
        server.run(sockets=[listener])
    # Requests whose clients have left may still be answered: what they were billed is kept when the thread takes no more work.
    last = model_thread.submit(lambda: None)
    model_thread.shutdown(wait=False, cancel_futures=not loading.done())
    with suppress(TimeoutError, CancelledError):
        last.result(_LAST_S if loading.done() else 0)
    if loading.done():
        loading.result()


def run(load: Callable[[], MainFunction], listener: socket.socket, door: Door, limits: Limits = NO_LIMITS) -> NoReturn:
    """Run `serve` as a whole program.

    It logs what loading was billed, prints an error and exits with status 1, or exits with status 0.
    """

    def logged() -> MainFunction:
        main = load()
        print(main.loading_billed, file=sys.stderr)
        return main

    try:
        serve(logged, listener, door, limits)
    except RemoeError as error:
        sys.exit(f"error: {error.message}\n  hint: {error.hint}")
    # Not the interpreter's own end, which would wait for a thread that waits for an expert function.
    os._exit(0)


def _end_with_parent() -> None:
    """Exit as soon as standard input is closed: the process that started the server has ended."""
    while os.read(0, 4096):  # not sys.stdin: its lock would trouble the interpreter's own end
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connect = partial(make_caller, os.environ.get("REMOE_ENDPOINT"))
    inherited = socket.socket(fileno=int(os.environ["REMOE_LISTENER"]))
    server_json, receipts = map(Path, sys.argv[1:])
    run(keeping(lambda: load_here(server_json, connect), Book(receipts)), inherited, door_of(inherited, "127.0.0.1"))
