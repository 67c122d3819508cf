"""An S3 with one object, that fails as a test tells it to."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "secret/key", "AWS_SESSION_TOKEN": "token==", "AWS_REGION": "eu-west-1"}


class Front:
    """An S3 that has one object; each request takes the next of `script`, None for an honest answer, which is also what follows."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.script: list[Any] = []
        self.connections: Counter[tuple[str, int]] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                front.connections[self.client_address] += 1
                front.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                match front.script.pop(0) if front.script else None:
                    case None:
                        self.answer(*front.range(self.headers["Range"]))
                    case "slow":
                        time.sleep(0.2)
                        self.answer(*front.range(self.headers["Range"]))
                    case "reset":
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                    case "cut":
                        status, headers, body = front.range(self.headers["Range"])
                        self.answer(status, headers | {"Content-Length": str(len(body))}, body[:-7])
                        self.close_connection = True
                    case "whole":
                        self.answer(200, {}, data)
                    case "other range":
                        self.answer(206, {"Content-Range": f"bytes 1-10/{len(data)}"}, data[1:11])
                    case int(status), code:
                        self.answer(status, {}, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.environment = KEYS | {"AWS_ENDPOINT_URL_S3": f"http://{self.host}"}

    def range(self, header: str) -> tuple[int, dict[str, str], bytes]:
        first, last = map(int, header.removeprefix("bytes=").split("-"))
        if first >= len(self.data):
            return 416, {}, b"<Error><Code>InvalidRange</Code></Error>"
        body = self.data[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(self.data)}"}, body

    @contextmanager
    def running(self) -> Iterator[Front]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()
