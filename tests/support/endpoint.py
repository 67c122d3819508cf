"""A server that speaks Lambda's Invoke and says what a test tells it to."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from remoe_cli.deploy.local import event_stream
from remoe_cli.runtime.invoke import make_client


def report(duration: float, billed: int, memory: int, init: float | None = None) -> bytes:
    """The log tail as Lambda writes it (a fixed id; a line of the function's own before)."""
    times = f"Duration: {duration:.2f} ms\tBilled Duration: {billed} ms"
    line = f"REPORT RequestId: 8f5e\t{times}\tMemory Size: {memory} MB\tMax Memory Used: 38 MB\t"
    end = "" if init is None else f"Init Duration: {init:.2f} ms\t"
    return base64.b64encode(f"START RequestId: 8f5e\nDuration: 7 ms, says the function\nEND RequestId: 8f5e\n{line}{end}\n".encode())


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # None: the request's own body
    hang_up: bool = False
    cut: bool = False
    closes: bool = False  # the connection, without saying so


def ok(init: float | None = None, body: bytes | None = None) -> Reply:
    return Reply(headers={"X-Amz-Log-Result": report(12.34, 13, 512, init).decode()}, body=body)


def failed(kind: str) -> Reply:
    return Reply(
        headers={"X-Amz-Function-Error": "Unhandled"}, body=json.dumps({"errorType": kind, "errorMessage": f"it was {kind}"}).encode()
    )


def streamed(*parts: bytes, error: bytes | None = None) -> Reply:
    """A response of InvokeWithResponseStream, with the error document of a function that failed."""
    log = report(12.34, 13, 512).decode()
    body = b"".join(map(event_stream.chunk, parts)) + event_stream.complete(error, log)
    return Reply(headers={"Content-Type": event_stream.CONTENT_TYPE}, body=body)


def refused(status: int, kind: str) -> Reply:
    return Reply(status, {"x-amzn-ErrorType": kind}, json.dumps({"Type": "User", "message": "no"}).encode())


class Endpoint:
    """A server that speaks Invoke and gives the replies in `script` in turn, the last one for ever."""

    def __init__(self, make: Callable[[str, int, float], Any] = make_client) -> None:
        self.script: list[Reply] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), body))
                reply = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if reply.hang_up:
                    self.close_connection = True
                    return
                answer = body if reply.body is None else reply.body
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer) + 10 * reply.cut))
                self.end_headers()
                self.wfile.write(answer)
                self.close_connection = reply.cut or reply.closes

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.client = make(self.url, 4, 5.0)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
