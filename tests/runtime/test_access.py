"""Who may ask a main server: real requests to a real server that still loads (503 is its answer to a request that it takes)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from remoe_cli.runtime import peers
from remoe_cli.runtime.access import Door
from tests.support import other_user

JSON = {"Content-Type": "application/json"}
SERVER = """
import sys, threading
from remoe_cli.runtime import server
from remoe_cli.runtime.access import door_of
listener = server.listen(sys.argv[1], 0)
print(listener.getsockname()[1], flush=True)
server.run(threading.Event().wait, listener, door_of(listener, sys.argv[1]))
"""


@pytest.fixture(scope="module", params=["127.0.0.1", "::1", "0.0.0.0"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The host that a server was told to listen on, and its port."""
    try:
        socket.create_server((request.param, 0), family=socket.AF_INET6 if ":" in request.param else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {request.param}: {error}")
    with subprocess.Popen([sys.executable, "-c", SERVER, request.param], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield request.param, int(process.stdout.readline())
        process.kill()


def ask(served: tuple[str, int], method: str, path: str, headers: dict[str, str], body: bytes | None = b"{}") -> tuple[int, Any, Any]:
    host, port = served
    connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            for each in value.split("\n"):
                connection.putheader(name, each)
        connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content[:1] == b"{" else content, response.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 503),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 503),
        (JSON | {"X-Forwarded-For": "192.0.2.1"}, 503),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "application/json\ntext/plain"}, 415),
        ({}, 415),
        ({"Authorization": "AWS4-HMAC-SHA256 x"}, 415),
        (JSON | {"Origin": "http://evil.example"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Origin": "http://localhost:3000"}, 403),
        (JSON | {"Origin": "https://127.0.0.1"}, 403),
        (JSON | {"Host": "evil.example"}, 403),
        (JSON | {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        (JSON | {"Host": "127.0.0.1.evil.example:80"}, 403),
        (JSON | {"Host": "localhost.evil.example"}, 403),
        (JSON | {"Host": "[::1].evil.example"}, 403),
        (JSON | {"Host": "user@127.0.0.1"}, 403),
        (JSON | {"Host": ""}, 403),
        (JSON | {"Host": "localhost:8080"}, 503),
        (JSON | {"Host": "LOCALHOST"}, 503),
        (JSON | {"Host": "127.0.0.1"}, 503),
        (JSON | {"Host": "127.0.1.1:9000"}, 503),
        (JSON | {"Host": "[::1]:8080"}, 503),
        (JSON | {"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 503),
    ],
)
def test_a_request_is_taken_from_programs_only(served: tuple[str, int], headers: dict[str, str], status: int) -> None:
    got, document, answered = ask(served, "POST", "/invocations", headers)
    assert got == status, document
    assert set(document) == {"error"} and document["error"]["message"].count(".\n") == 0 and document["error"]["hint"]
    assert not [name for name in answered if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/ping", {}, 503),
        ("GET", "/ping", {"Host": "evil.example"}, 403),
        ("GET", "/main", {"Origin": "http://evil.example"}, 403),
        ("OPTIONS", "/invocations", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, 403),
        ("OPTIONS", "/invocations", JSON, 405),
        ("DELETE", "/invocations", JSON, 405),
        ("GET", "/nothing", {}, 404),
        ("POST", "/shutdown", JSON, 404),
    ],
)
def test_other_requests(served: tuple[str, int], method: str, path: str, headers: dict[str, str], status: int) -> None:
    got, document, answered = ask(served, method, path, headers, None)
    assert got == status
    assert (path == "/ping" and status == 503) or document["error"]["message"]
    assert not [name for name in answered if name.lower().startswith("access-control")]


def test_on_loopback_another_user_is_refused_and_on_a_network_not(served: tuple[str, int]) -> None:
    other_user.needs_root()
    host, port = served
    for method, path in (("POST", "/invocations"), ("GET", "/ping"), ("GET", "/main")):
        status, text = other_user.ask(port, method, path, "{}", "127.0.0.1" if host == "0.0.0.0" else host)
        assert status == (503 if host == "0.0.0.0" else 403)
        assert host == "0.0.0.0" or "only processes of the user who started it" in text


@pytest.mark.parametrize(
    ("bound", "host", "taken"),
    [
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("127.0.0.1", "0.0.0.0:8080", False),
        ("127.0.0.1", "192.168.1.5", False),
        ("127.0.0.1", "[::ffff:127.0.0.1]", True),
        ("127.0.0.1", "[::ffff:192.168.1.5]", False),
        ("192.168.1.5", "192.168.1.5:8080", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("192.168.1.5", "localhost", True),
        ("2001:db8::5", "[2001:DB8::5]:80", True),
        ("2001:db8::5", "[2001:db8::6]", False),
        ("[2001:db8::5]", "[2001:db8::5]", True),
        ("fe80::1%eth0", "[fe80::1%eth0]", True),
        ("::", "[2001:db8::5]", True),
        ("0.0.0.0", "0.0.0.0:8080", True),
        ("0.0.0.0", "192.168.1.5:8080", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("mybox.lan", "mybox.lan:8080", True),
        ("mybox.lan", "mybox.lan.evil.example", False),
        (None, "whatever.sagemaker", True),
    ],
)
def test_names_of_a_server(bound: str | None, host: str, taken: bool) -> None:
    headers = {"host": [host], "content-type": ["application/json"]}
    assert (Door(bound).refusal("POST", lambda name: headers.get(name, [])) is None) == taken


def test_a_server_behind_an_unknown_name_still_refuses_pages() -> None:
    def refused(**headers: str) -> int | None:
        given = {name.replace("_", "-"): [value] for name, value in headers.items()}
        found = Door(None).refusal("POST", lambda name: given.get(name, []))
        return found[0] if found else None

    assert refused(host="a", content_type="application/json") is None
    assert refused(host="a", content_type="application/json", origin="http://evil.example") == 403
    assert refused(host="a", content_type="text/plain") == refused(host="a") == 415


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_owner_of_a_connection_is_known_while_it_is_open(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(str(error))
    with server:
        here = socket.create_connection(server.getsockname()[:2])
        there, peer = server.accept()
        ends = peer[:2], there.getsockname()[:2]
        assert peers.is_own_user(*ends) and peers.is_process(*ends, pid=os.getpid())
        assert not peers.is_process(*ends, pid=1)
        assert not peers.is_own_user((ends[0][0], 1), ends[1])
        peers.require_own_listener(*server.getsockname()[:2])
        here.close()  # the kernel now shows user 0 for its end, which is nobody
        assert not peers.is_own_user(*ends) and not peers.is_process(*ends, pid=1)
        there.close()
