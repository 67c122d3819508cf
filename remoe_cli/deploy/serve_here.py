"""Run a deployment's main function on this machine, whatever the target of its expert functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from remoe_cli.deploy.console import Console
from remoe_cli.deploy.target import SERVE_PLAINLY, ServeOptions
from remoe_cli.runtime.address import url
from remoe_cli.runtime.invoke import Connect
from remoe_cli.runtime.kept import Book

if TYPE_CHECKING:
    from remoe_cli.runtime.last_resort import LastResort

_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def serve_here(
    name: str,
    server_json: Path,
    connect: Connect,
    host: str,
    port: int,
    console: Console,
    asked: ServeOptions = SERVE_PLAINLY,
    last_resort: LastResort | None = None,
    *,
    book: Book,
) -> None:
    """Serve from this machine's checkpoint of the model until interrupted.

    The receipts are kept in `book`. `connect` reaches the expert functions, and `last_resort` their shards, where these are not beside
    server.json.

    On loopback only this user's processes are answered (runtime/access.py).

    Raises: what runtime/main_function.py and runtime/server.py raise.
    """
    from remoe_cli.runtime.access import door_of
    from remoe_cli.runtime.at_once import with_concurrency
    from remoe_cli.runtime.keeping import keeping
    from remoe_cli.runtime.load_main import load_here
    from remoe_cli.runtime.main_function import MainFunction
    from remoe_cli.runtime.server import listen, serve
    from remoe_cli.runtime.speculate import with_speculate

    def load() -> MainFunction:
        with console.progress("Loading the model"):
            main = keeping(lambda: load_here(server_json, connect, asked.device, last_resort, asked.cache_experts), book)()
        return with_speculate(with_concurrency(main, asked.concurrency), asked.speculate)

    def ready(main: MainFunction) -> None:
        console.say(f"The model is loaded, on the {_DEVICES[main.engine.device.kind]} {main.engine.device.name}. {main.loading_billed}")
        console.say(f"Serving '{name}' on {url(host, port)}{whom}, as the model '{main.name}'. Ctrl-C ends it.")

    listener = listen(host, port)
    door = door_of(listener, host)
    beyond = "has the token" if asked.token else "reaches that address"
    whom = " to your own processes" if door.own_user else f", to whoever {beyond}"
    console.say(f"Starting '{name}' on {url(host, port)}; GET /ready answers 503 until the model is loaded.")
    serve(load, listener, door, token=asked.token, ready=ready)
