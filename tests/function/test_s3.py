"""The function's own S3 client: signatures, ranges, connections that are kept, and what it makes of what can go wrong."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

from remoe_cli.function import s3, signing
from remoe_cli.function.errors import ShardDeniedError, ShardMissingError, ShardTruncatedError, ShardUnreachableError
from remoe_cli.function.s3 import S3Object
from remoe_cli.function.signing import Credentials, signed
from tests.support.s3_front import KEYS, Front

DATA = bytes(range(256)) * 100
URL = "s3://bucket/functions/layer-001/x.safetensors"


class OneObject(Front):
    def __init__(self) -> None:
        super().__init__(DATA)
        self.object = S3Object(URL, self.environment)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneObject]:
    monkeypatch.setattr(s3, "_FIRST_PAUSE_S", 0.001)
    with (made := OneObject()).running():
        yield made
    made.object.close()


@pytest.mark.parametrize("token", ["", "a/token+of=="])
@pytest.mark.parametrize("path", ["/functions/layer-003/0a1b.safetensors", "/bucket/a%20b/c%2Bd.zip"])
def test_a_request_is_signed_as_botocore_signs_it(token: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same time, for the same headers."""
    host, wanted = "bucket.s3.eu-west-1.amazonaws.com", {"range": "bytes=5-99"}
    theirs = AWSRequest("GET", f"https://{host}{path}", headers=wanted)
    S3SigV4Auth(BotoCredentials("AKID", "secret/key", token or None), "s3", "eu-west-1").add_auth(theirs)
    now = theirs.context["timestamp"]
    monkeypatch.setattr(signing.time, "gmtime", lambda _: time.strptime(now, "%Y%m%dT%H%M%SZ"))
    ours = signed("GET", host, path, wanted, Credentials("AKID", "secret/key", token, "eu-west-1"), 0.0)
    assert ours.pop("host") == host
    assert ours == {name.lower(): value for name, value in theirs.headers.items()}


def test_secrets_are_not_shown(front: OneObject) -> None:
    shown = repr(Credentials(KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], KEYS.get("AWS_SESSION_TOKEN", "")))
    assert "AKID" in shown and "secret" not in shown and "token" not in shown.replace("token=", "")
    front.script = [(403, "SignatureDoesNotMatch")]
    with pytest.raises(ShardDeniedError) as raised:
        front.object.read(0, 10)
    assert not re.search("AKID|secret|token", str(raised.value))


def test_a_range_and_the_size_of_the_whole_are_read_from_the_bucket_in_the_path(front: OneObject) -> None:
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


def test_ranges_come_in_chunks_side_by_side_on_connections_that_are_kept(front: OneObject, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_nothing_is_written_any_more_once_it_has_failed(front: OneObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "CHUNK_BYTES", 1000)
    front.script = [(404, "NoSuchKey"), *["slow"] * 7]
    written: list[int] = []
    with pytest.raises(ShardMissingError):
        front.object.fetch([(0, 8000)], lambda data, at: written.append(len(data)))
    assert sum(written) == 7000


@pytest.mark.parametrize("failure", [(500, "InternalError"), (503, "SlowDown"), "reset", "cut"])
def test_what_may_pass_is_tried_again(failure: Any, front: OneObject) -> None:
    front.script = [failure, failure]
    assert front.object.read(0, 100)[0] == DATA[:100]
    assert len(front.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message"), [((503, "SlowDown"), "S3 answers 503 SlowDown"), ("reset", "Remote end closed"), ("cut", "ended early")]
)
def test_what_does_not_pass_is_unreachable(failure: Any, message: str, front: OneObject) -> None:
    front.script = [failure] * 9
    with pytest.raises(ShardUnreachableError, match=f"could not be read in 3 tries: .*{message}"):
        front.object.read(0, 100)
    assert len(front.requests) == 3


def test_a_connection_that_went_stale_while_the_function_slept_is_made_anew(front: OneObject) -> None:
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
def test_what_would_be_so_again_is_named_at_once(failure: Any, kind: type[Exception], message: str, front: OneObject) -> None:
    front.script = [failure]
    with pytest.raises(kind, match=message):
        front.object.read(0, 100)
    assert len(front.requests) == 1


@pytest.mark.parametrize("first", [len(DATA) - 50, len(DATA) + 50])
def test_an_object_that_ends_too_early_is_truncated(first: int, front: OneObject) -> None:
    with pytest.raises(ShardTruncatedError):
        front.object.read(first, first + 100)


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"])
def test_without_credentials_it_is_denied(missing: str) -> None:
    with pytest.raises(ShardDeniedError, match=f"the environment has no {missing}"):
        S3Object(URL, {name: value for name, value in KEYS.items() if name != missing})


def test_every_request_is_counted_as_each_is_paid_for(front: OneObject) -> None:
    """Also those that S3 refuses or cuts, and those of several threads."""
    front.script = [(503, "SlowDown"), "cut"]
    front.object.read(0, 100)
    assert front.object.reads == 3 == len(front.requests)
    front.object.fetch([(0, 50), (50, 90), (100, 101)], lambda view, at: None)
    assert front.object.reads == 6 == len(front.requests)
