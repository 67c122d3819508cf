"""What one Invoke request costs its caller: botocore's client, ours (remoe_cli/runtime/direct.py), and a layer's whole call, in turns.

    python docs/measure/invoke_cost.py [--calls 300] [--rounds 5]

A small server in a process of its own answers each call with what it was sent: one token of 2,048 bfloat16 numbers, as an expert function
does. Printed are the processor's ms of the caller for each call, and the ms until its answer is there. A layer's call also packs and reads
frames, goes through a thread of the pool, and decides about second tries (remoe_cli/runtime/calls.py).
"""

from __future__ import annotations

import argparse
import base64
import math
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from statistics import median
from typing import Any

import numpy as np

from remoe_cli.function.codec import Batch, pack, to_wire
from remoe_cli.runtime.calls import Caller, RemoteFunction
from remoe_cli.runtime.invoke import attempt, make_caller, make_client

TOKEN = Batch("bfloat16", (0,), (1,), np.zeros((1, 2048), np.uint16))
BODY = to_wire(pack(TOKEN))
LOG = base64.b64encode(b"REPORT RequestId: 0\tDuration: 0.10 ms\tBilled Duration: 1 ms\tMemory Size: 128 MB\n").decode()


class _Echo(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("X-Amz-Log-Result", LOG)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _serve(listener: socket.socket) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Echo, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    while True:  # one connection after the other, each until it is closed
        server.handle_request()


def _ms(work: Callable[[], object], calls: int) -> tuple[float, float]:
    """Return the processor's ms of a call, and the median ms that one lasts."""
    lasted, before = [], time.process_time()
    for _ in range(calls):
        start = time.perf_counter()
        work()
        lasted.append(time.perf_counter() - start)
    return (time.process_time() - before) / calls * 1e3, median(lasted) * 1e3


def _call(caller: Caller) -> None:
    call = caller.begin(0, RemoteFunction("f", (0,), 1, 1.0), TOKEN, time.monotonic(), math.inf)
    caller.finish([call], lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"botocore": [], "ours": [], "a layer's call": []}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(options.rounds):
            for name, make in (("botocore", make_client), ("ours", make_caller)):
                client = make(url, 1, 5.0)
                attempt(client, "f", BODY)  # connects
                found[name].append(_ms(lambda client=client: attempt(client, "f", BODY), options.calls))  # type: ignore[misc]
                if name == "ours":
                    caller = Caller(client, ThreadPoolExecutor(1), [])
                    found["a layer's call"].append(_ms(lambda caller=caller: _call(caller), options.calls))  # type: ignore[misc]
                    caller.pool.shutdown()
                client.close()
        server.terminate()
        server.join()
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {options.rounds} rounds"
    )
    print("client          processor, ms   answer after, ms")
    for name, rounds in found.items():
        print(f"{name:<16}{median(ms for ms, _ in rounds):>13.2f}{median(ms for _, ms in rounds):>19.2f}")


if __name__ == "__main__":
    main()
