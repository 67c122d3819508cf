"""What SageMaker is between a client and a container: its runtime API in front of the container's own HTTP, event streams included."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

import boto3
import httpx
from botocore.config import Config

ENDPOINT = "tiny-main"
PART_BYTES = 50  # so that lines are cut anywhere, as SageMaker may cut them


def message(headers: dict[str, str], payload: bytes) -> bytes:
    """One message of application/vnd.amazon.eventstream."""
    packed = b"".join(
        struct.pack(">B", len(name)) + name.encode() + struct.pack(">BH", 7, len(value)) + value.encode() for name, value in headers.items()
    )
    prelude = struct.pack(">II", 16 + len(packed) + len(payload), len(packed))
    head = prelude + struct.pack(">I", crc32(prelude)) + packed + payload
    return head + struct.pack(">I", crc32(head))


@contextmanager
def sagemaker(container: str) -> Iterator[Any]:
    """A client of sagemaker-runtime whose one endpoint is the container at this URL. A request that says "break" breaks its stream."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != f"/endpoints/{ENDPOINT}/invocations-response-stream":
                self._refuse(400, "ValidationError", {"Message": "Endpoint of account 123456789012 not found."})
                return
            with (
                httpx.Client(trust_env=False, timeout=60, verify=False) as client,
                client.stream("POST", f"{container}/invocations", content=body, headers={"Content-Type": "application/json"}) as response,
            ):
                if response.status_code != 200:
                    reply = response.read().decode()
                    reported = {
                        "OriginalStatusCode": response.status_code,
                        "OriginalMessage": reply,
                        "Message": f"Received error with {reply}",
                    }
                    self._refuse(424, "ModelError", reported)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/vnd.amazon.eventstream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for chunk in response.iter_bytes(PART_BYTES):
                    kind = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
                    self._chunk(message(kind, chunk))
                    if b"break" in body:
                        kind = {":message-type": "exception", ":exception-type": "ModelStreamError", ":content-type": "application/json"}
                        self._chunk(message(kind, json.dumps({"Message": "The stream broke.", "ErrorCode": "StreamBroken"}).encode()))
                        break
                self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def _refuse(self, status: int, kind: str, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("x-amzn-ErrorType", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    client = boto3.client(
        "sagemaker-runtime",
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        config=Config(proxies={}, retries={"total_max_attempts": 1}),
    )
    try:
        yield client
    finally:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join()
