"""The function's own S3 client: signatures, ranges, connections that are kept, and what it makes of what can go wrong."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

from remoe_cli.function import s3
from remoe_cli.function.errors import ShardDeniedError, ShardMissingError, ShardTruncatedError, ShardUnreachableError
from remoe_cli.function.s3 import Credentials, S3Object, signed

DATA = bytes(range(256)) * 100
KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "secret/key", "AWS_SESSION_TOKEN": "token==", "AWS_REGION": "eu-west-1"}
URL = "s3://bucket/functions/layer-001/x.safetensors"


class Front:
    """An S3 that has one object; each request takes the next of `script`, None for an honest answer, which is also what follows."""

    def __init__(self) -> None:
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
                        self.answer(200, {}, DATA)
                    case "other range":
                        self.answer(206, {"Content-Range": f"bytes 1-10/{len(DATA)}"}, DATA[1:11])
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
        self.object = S3Object(URL, KEYS | {"AWS_ENDPOINT_URL_S3": f"http://{self.host}"})

    @staticmethod
    def range(header: str) -> tuple[int, dict[str, str], bytes]:
        first, last = map(int, header.removeprefix("bytes=").split("-"))
        if first >= len(DATA):
            return 416, {}, b"<Error><Code>InvalidRange</Code></Error>"
        body = DATA[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(DATA)}"}, body


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    monkeypatch.setattr(s3, "_FIRST_PAUSE_S", 0.001)
    made = Front()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.object.close()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.mark.parametrize("token", ["", "a/token+of=="])
@pytest.mark.parametrize("path", ["/functions/layer-003/0a1b.safetensors", "/bucket/a%20b/c%2Bd.zip"])
def test_a_request_is_signed_as_botocore_signs_it(token: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same time, for the same headers."""
    host, wanted = "bucket.s3.eu-west-1.amazonaws.com", {"range": "bytes=5-99"}
    theirs = AWSRequest("GET", f"https://{host}{path}", headers=wanted)
    S3SigV4Auth(BotoCredentials("AKID", "secret/key", token or None), "s3", "eu-west-1").add_auth(theirs)
    now = theirs.context["timestamp"]
    monkeypatch.setattr(s3.time, "gmtime", lambda _: s3.time.strptime(now, "%Y%m%dT%H%M%SZ"))
    ours = signed(host, path, wanted, Credentials("AKID", "secret/key", token, "eu-west-1"), 0.0)
    assert ours.pop("host") == host
    assert ours == {name.lower(): value for name, value in theirs.headers.items()}


def test_secrets_are_not_shown(front: Front) -> None:
    shown = repr(Credentials.of(KEYS))
    assert "AKID" in shown and "secret" not in shown and "token" not in shown.replace("token=", "")
    front.script = [(403, "SignatureDoesNotMatch")]
    with pytest.raises(ShardDeniedError) as raised:
        front.object.read(0, 10)
    assert not re.search("AKID|secret|token", str(raised.value))


def test_a_range_and_the_size_of_the_whole_are_read_from_the_bucket_in_the_path(front: Front) -> None:
    assert front.object.read(10, 20) == (DATA[10:20], len(DATA))
    ((path, headers),) = front.requests
    assert path == "/bucket/functions/layer-001/x.safetensors"
    assert headers["range"] == "bytes=10-19" and headers["host"] == front.host


@pytest.mark.parametrize(
    ("region", "host"),
    [("eu-west-1", "bucket.s3.eu-west-1.amazonaws.com"), ("cn-north-1", "bucket.s3.cn-north-1.amazonaws.com.cn")],
)
def test_without_an_endpoint_the_bucket_is_in_the_hosts_name_and_the_connection_is_tls(region: str, host: str) -> None:
    made = S3Object(URL, KEYS | {"AWS_REGION": region})
    assert (made._host, made._path) == (host, "/functions/layer-001/x.safetensors")
    assert isinstance(made._take(), s3.http.client.HTTPSConnection)
    assert made._context is not None and made._context.check_hostname


def test_ranges_come_in_chunks_side_by_side_on_connections_that_are_kept(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "CHUNK_BYTES", 1000)
    ranges = [(100, 5000), (7000, 7001), (9000, 12345)]
    into = bytearray(len(DATA))

    def write(data: memoryview, at: int) -> None:
        into[at : at + len(data)] = data

    front.object.fetch(ranges, write)
    there = set().union(*(range(first, last) for first, last in ranges))
    assert all(into[i] == (DATA[i] if i in there else 0) for i in range(len(DATA)))
    asked = sorted(tuple(map(int, headers["range"].removeprefix("bytes=").split("-"))) for _, headers in front.requests)
    assert len(asked) == 5 + 1 + 4 and all(last - first < 1000 for first, last in asked)
    assert 1 <= len(front.connections) <= 4


def test_nothing_is_written_any_more_once_it_has_failed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "CHUNK_BYTES", 1000)
    front.script = [(404, "NoSuchKey"), *["slow"] * 7]
    written: list[int] = []
    with pytest.raises(ShardMissingError):
        front.object.fetch([(0, 8000)], lambda data, at: written.append(len(data)))
    assert sum(written) == 7000


@pytest.mark.parametrize("failure", [(500, "InternalError"), (503, "SlowDown"), "reset", "cut"])
def test_what_may_pass_is_tried_again(failure: Any, front: Front) -> None:
    front.script = [failure, failure]
    assert front.object.read(0, 100)[0] == DATA[:100]
    assert len(front.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message"), [((503, "SlowDown"), "S3 answers 503 SlowDown"), ("reset", "Remote end closed"), ("cut", "ended early")]
)
def test_what_does_not_pass_is_unreachable(failure: Any, message: str, front: Front) -> None:
    front.script = [failure] * 9
    with pytest.raises(ShardUnreachableError, match=f"could not be read in 3 tries: .*{message}"):
        front.object.read(0, 100)
    assert len(front.requests) == 3


def test_a_connection_that_went_stale_while_the_function_slept_is_made_anew(front: Front) -> None:
    front.object.read(0, 10)
    front.script = ["reset"]
    assert front.object.read(10, 20)[0] == DATA[10:20]
    assert len(front.connections) == 2


def test_no_s3_at_all_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_FIRST_PAUSE_S", 0.001)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, and nobody listens
        made = S3Object(URL, KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{held.getsockname()[1]}"})
        with pytest.raises(ShardUnreachableError, match="Connection refused"):
            made.read(0, 10)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ((404, "NoSuchKey"), ShardMissingError, "S3 answers 404 NoSuchKey"),
        ((404, "NoSuchBucket"), ShardMissingError, "S3 answers 404 NoSuchBucket"),
        ((403, "AccessDenied"), ShardDeniedError, "S3 answers 403 AccessDenied"),
        ((400, "ExpiredToken"), ShardDeniedError, "S3 answers 400 ExpiredToken"),
        ((301, "PermanentRedirect"), ShardDeniedError, "S3 answers 301 PermanentRedirect"),
        ("whole", ShardDeniedError, "S3 answers 200"),
        ("other range", ShardTruncatedError, "does not have bytes 0 to 100"),
    ],
)
def test_what_would_be_so_again_is_named_at_once(failure: Any, kind: type[Exception], message: str, front: Front) -> None:
    front.script = [failure]
    with pytest.raises(kind, match=message):
        front.object.read(0, 100)
    assert len(front.requests) == 1


@pytest.mark.parametrize("first", [len(DATA) - 50, len(DATA) + 50])
def test_an_object_that_ends_too_early_is_truncated(first: int, front: Front) -> None:
    with pytest.raises(ShardTruncatedError):
        front.object.read(first, first + 100)


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"])
def test_without_credentials_it_is_denied(missing: str) -> None:
    with pytest.raises(ShardDeniedError, match=f"the environment has no {missing}"):
        S3Object(URL, {name: value for name, value in KEYS.items() if name != missing})


def test_every_request_is_counted_as_each_is_paid_for(front: Front) -> None:
    """Also those that S3 refuses or cuts, and those of several threads."""
    front.script = [(503, "SlowDown"), "cut"]
    front.object.read(0, 100)
    assert front.object.reads == 3 == len(front.requests)
    front.object.fetch([(0, 50), (50, 90), (100, 101)], lambda view, at: None)
    assert front.object.reads == 6 == len(front.requests)
