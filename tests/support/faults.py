"""Faults on purpose, between a main function and the real twin: a proxy of its Invoke API, and workers that go wrong.

A fault is a function of what was asked and of the way to the twin; what it returns is what the caller gets.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from remoe_cli.cages import Mechanism
from remoe_cli.function.codec import from_wire, to_wire
from remoe_cli.model.checkpoint import Checkpoint
from tests.support.damage import flipped
from tests.support.split import SplitTwin, split_twin
from tests.support.twin import Running

# A worker of an expert function that goes wrong when a file in $FAULTS says so: `hungry-NAME` while it is there, `broken-NAME` for the
# process that takes it away.
HANDLER = "faulty.handle"
WORKER = """
import base64, os
from pathlib import Path
from function import handler

FAULTS, NAME = Path(os.environ["FAULTS"]), os.environ["AWS_LAMBDA_FUNCTION_NAME"]
try:
    (FAULTS / f"broken-{NAME}").unlink()
    broken = True
except FileNotFoundError:
    broken = False

def handle(event, context):
    if (FAULTS / f"hungry-{NAME}").exists():
        blocks = []
        while True:
            blocks.append(b"x" * (1 << 20))
    answer = handler.handle(event, context)
    return os.urandom(len(answer)) if broken and isinstance(answer, bytes) else answer
"""


@dataclass(frozen=True)
class Seen:
    """One invocation that a caller sends: its path, the function in it, headers and body."""

    path: str
    function: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_call(self) -> bool:
        return self.body[:1] == b'"'


@dataclass(frozen=True)
class Reply:
    """What the caller gets. `cut`: less than its head promises; `silent`: nothing but the end of the connection."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: bool = False
    silent: bool = False


Send = Callable[[Seen], Reply]
Fault = Callable[[Seen, Send], Reply]


def healthy(seen: Seen, send: Send) -> Reply:
    return send(seen)


class Proxy:
    """A server between a caller and the twin at `endpoint`, with one fault at a time."""

    def __init__(self, endpoint: str) -> None:
        self.fault: Fault = healthy
        self.sent: Counter[str] = Counter()  # invocations of callers with rows, by function
        self._host = endpoint.removeprefix("http://")
        self._local = threading.local()
        self._count = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen = Seen(self.path, self.path.split("/")[3], dict(self.headers), body)
                if seen.is_call:
                    with outer._count:
                        outer.sent[seen.function] += 1
                reply = outer.fault(seen, outer.send)
                if reply.silent:
                    self.close_connection = True
                    return
                head = [f"HTTP/1.1 {reply.status} X\r\nContent-Length: {len(reply.body)}\r\n"]
                head += [f"{name}: {value}\r\n" for name, value in reply.headers.items()]
                self.wfile.write(("".join(head) + "\r\n").encode() + (reply.body[: len(reply.body) // 2] if reply.cut else reply.body))
                self.close_connection = reply.cut

            def finish(self) -> None:
                super().finish()
                if hasattr(outer._local, "connection"):
                    outer._local.connection.close()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a caller that has gone

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def send(self, seen: Seen) -> Reply:
        """Bring an invocation to the twin, over this thread's own connection."""
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(self._host, timeout=30)
            self._local.connection.connect()
            self._local.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {name: value for name, value in seen.headers.items() if name.lower() not in ("host", "connection")}
        self._local.connection.request("POST", f"/2015-03-31/functions/{seen.function}/invocations", seen.body, headers)
        answer = self._local.connection.getresponse()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("content-length", "date", "server")}
        return Reply(answer.status, kept, answer.read())

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextmanager
def faulty_twin(
    checkpoint: Checkpoint, parts: Mapping[int, Sequence[tuple[int, ...]]], folder: Path, mechanism: Mechanism
) -> Iterator[tuple[SplitTwin, Proxy, Path]]:
    """A model's twin whose workers can go wrong, the proxy before it, and the folder of the marks that make them."""
    marks = folder / "marks"
    marks.mkdir()
    code, environment = {"faulty.py": WORKER}, {"FAULTS": str(marks)}
    with (
        split_twin(
            checkpoint, parts, folder / "split", mechanism, memory_mb=256, handler=HANDLER, code=code, environment=environment
        ) as split,
        Proxy(split.twin.endpoint).running() as proxy,
    ):
        yield split, proxy, marks


def _refused(status: int, kind: str, **headers: str) -> Reply:
    return Reply(status, {"x-amzn-ErrorType": kind, "Content-Type": "application/json", **headers}, b'{"message": "on purpose"}')


def some(share: float, fault: Fault, seed: int = 0) -> Fault:
    """The fault for a share of the calls."""
    draw, one = random.Random(seed), threading.Lock()

    def maybe(seen: Seen, send: Send) -> Reply:
        with one:
            hit = seen.is_call and draw.random() < share
        return fault(seen, send) if hit else send(seen)

    return maybe


def fails(seen: Seen, send: Send) -> Reply:
    return _refused(500, "ServiceException")


def throttles(seen: Seen, send: Send) -> Reply:
    return _refused(429, "TooManyRequestsException", **{"Retry-After": "0.01"})


def truncates(seen: Seen, send: Send) -> Reply:
    return replace(send(seen), cut=True)


def flips_a_bit(seen: Seen, send: Send) -> Reply:
    answer = send(seen)
    frame = from_wire(answer.body)
    return replace(answer, body=to_wire(flipped(frame, 8 * len(frame) - 20)))


def slow_share(share: float, times: float, last: int = 200, seed: int = 0) -> Fault:
    """A share of the calls reach the twin so late that they take this many times the median of the last calls."""
    took_s: deque[float] = deque(maxlen=last)

    def late(seen: Seen, send: Send) -> Reply:
        if took_s:
            time.sleep((times - 1) * statistics.median(list(took_s)))
        return send(seen)

    chosen = some(share, late, seed)

    def timed(seen: Seen, send: Send) -> Reply:
        begun = time.perf_counter()
        answer = send(seen)
        took_s.append(time.perf_counter() - begun)
        return answer

    return lambda seen, send: chosen(seen, lambda each: timed(each, send))


def of_another(functions: dict[str, str]) -> Fault:
    """The answer is that of another function, to the same rows."""
    return lambda seen, send: send(replace(seen, function=functions[seen.function]))


def no_network(until_s: float) -> Fault:
    """No connection is kept until then, by `time.monotonic()`."""
    return lambda seen, send: Reply(silent=True) if time.monotonic() < until_s else send(seen)


def workers(twin: Running, function: str | None = None) -> list[int]:
    """The processes of a function, or of all."""
    some = [each for each in twin.status()["functions"] if function in (None, each["name"])]
    return [instance["pid"] for each in some for instance in each["instances"] if instance["pid"]]


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def killing(twin: Running, every_s: float) -> Iterator[list[int]]:
    """Kill a worker every so often; yields those that were killed."""
    ended, killed = threading.Event(), list[int]()

    def kill_some() -> None:
        while not ended.wait(every_s):
            if pids := workers(twin):
                kill(pids := [random.choice(pids)])
                killed.extend(pids)

    thread = threading.Thread(target=kill_some)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def no_network_for(seconds: float) -> Fault:
    """The same, for so long from the first call on."""
    until_s = list[float]()

    def fault(seen: Seen, send: Send) -> Reply:
        if not until_s:
            until_s.append(time.monotonic() + seconds)
        return no_network(until_s[0])(seen, send)

    return fault


@contextmanager
def deleted(twin: Running, function: str) -> Iterator[None]:
    """The function does not exist meanwhile."""
    pools: Any = twin.twin.pools
    pool = pools.pop(function)
    try:
        yield
    finally:
        pools[function] = pool


@contextmanager
def marked(folder: Path, mark: str) -> Iterator[Path]:
    """A file in $FAULTS while the context is open."""
    path = folder / mark
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
