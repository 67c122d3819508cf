"""Who may ask the twin's servers, who can pose as them, and what its processes import."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import HTTPClientError

from remoe_cli import cages, owned
from remoe_cli.deploy.local import lifecycle, place, processes, target
from remoe_cli.deploy.local.supervisor import Children
from remoe_cli.errors import DeployError
from remoe_cli.runtime import client
from remoe_cli.runtime.invoke import make_client
from remoe_cli.runtime.kept import Book
from tests.deploy.local.test_lifecycle import config, invoke, root, start, until, with_main
from tests.support import other_user
from tests.support.handlers import server

__all__ = ["root"]  # a fixture
JSON = {"Content-Type": "application/json"}
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=local/20260101/us-east-1/lambda/aws4_request, SignedHeaders=host, Signature=0"}


@pytest.fixture
def serve(tmp_path: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    (tmp_path / "twin").mkdir()
    return server(tmp_path / "twin", probed, monkeypatch)


def ask(port: int, method: str, path: str, headers: dict[str, str], body: str | None = None) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null"), response.headers
    finally:
        connection.close()


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


INVOKE = "/2015-03-31/functions/f/invocations"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", INVOKE, JSON, 200),
        ("POST", INVOKE, SIGNED, 200),  # as boto3 asks
        ("POST", INVOKE, {}, 415),
        ("POST", INVOKE, {"Content-Type": "text/plain"}, 415),
        ("POST", INVOKE, SIGNED | {"Content-Type": "text/plain"}, 415),
        ("POST", INVOKE, {"Content-Type": "text/plain", "Origin": "http://evil.example"}, 403),
        ("POST", INVOKE, JSON | {"Origin": "http://evil.example"}, 403),
        ("POST", INVOKE, JSON | {"Origin": "null"}, 403),
        ("POST", INVOKE, JSON | {"Host": "evil.example"}, 403),
        ("GET", "/remoe/status", {"Host": "evil.example"}, 403),
        ("GET", "/remoe/status", {}, 200),
        ("POST", "/remoe/shutdown", JSON, 404),
        ("POST", "/remoe/shutdown", {"Content-Type": "text/plain"}, 415),
        ("OPTIONS", INVOKE, {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, 403),
        ("GET", "/nothing", {}, 404),
    ],
)
def test_the_invoke_api_takes_requests_of_programs_only(serve: Any, method: str, path: str, headers: dict[str, str], status: int) -> None:
    with serve("app.echo") as twin:
        got, document, answered = ask(port_of(twin.endpoint), method, path, headers, "7" if method == "POST" else None)
        assert got == status, document
        assert status == 200 or (isinstance(document["message"], str) and document["message"])
        assert not [name for name in answered if name.lower().startswith("access-control")]


def test_another_user_can_ask_neither_the_invoke_api_nor_a_workers_runtime_api(serve: Any) -> None:
    other_user.needs_root()
    with serve("app.echo") as twin:
        assert twin.call(1) == 1
        (instance,) = twin.status()["functions"][0]["instances"]
        for port, method, path in (
            (port_of(twin.endpoint), "GET", "/remoe/status"),
            (port_of(twin.endpoint), "POST", INVOKE),
            (instance["port"], "GET", "/2018-06-01/runtime/invocation/next"),
            (instance["port"], "POST", "/2018-06-01/runtime/invocation/x/response"),
        ):
            status, text = other_user.ask(port, method, path, "7" if method == "POST" else "")
            assert (status, "only processes of the user who started it" in text) == (403, True)
        assert twin.call(2) == 2
        assert twin.status()["functions"][0]["invocations"] == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/2018-06-01/runtime/invocation/next"),
        ("POST", "/2018-06-01/runtime/invocation/x/response"),
        ("POST", "/2018-06-01/runtime/invocation/x/error"),
        ("POST", "/2018-06-01/runtime/init/error"),
    ],
)
def test_only_the_worker_itself_gets_its_events(serve: Any, method: str, path: str) -> None:
    """Not even a process of the same user, such as a browser, whose page would take the event by GET."""
    with serve("app.echo") as twin:
        assert twin.call(1) == 1
        (instance,) = twin.status()["functions"][0]["instances"]
        status, document, _ = ask(instance["port"], method, path, {}, '"forged"' if method == "POST" else None)
        assert status == 403 and document["errorMessage"]
        assert twin.call(2) == 2 and twin.status()["functions"][0]["cold_starts"] == 1


def test_nobody_gets_the_main_servers_port_between_two_runs(root: Path) -> None:
    started = start(with_main(root))
    port = started["main"]["port"]
    os.kill(started["main"]["pid"], signal.SIGKILL)
    main = started["main"]
    while main["restarts"] == 0 or main["state"] != "running":
        with socket.socket() as taker:
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                taker.bind(("127.0.0.1", port))
        main = lifecycle.status("t")["main"]
    assert main["port"] == port


def test_a_dead_deployments_port_is_not_believed(root: Path) -> None:
    other_user.needs_root()
    endpoint = start(config(root))["endpoint"]
    boto = make_client(endpoint, 1, 10)
    assert json.loads(boto.invoke(FunctionName="f", Payload=b"1")["Payload"].read())
    os.kill(lifecycle.status("t")["pid"], signal.SIGKILL)
    until(lambda: lifecycle.status("t")["state"] == "dead")
    posing = other_user.pose(port_of(endpoint))
    try:
        with pytest.raises(HTTPClientError, match="belongs to a process of another user"):
            boto.invoke(FunctionName="f", Payload=b'"secret prompt"')
        with pytest.raises(DeployError, match="belongs to a process of another user"):
            client.answer(client.Http(endpoint, own_user=True), "secret prompt", 4, print)
        assert lifecycle.status("t")["state"] == "dead"
    finally:
        posing.kill()
        assert posing.communicate()[0] == ""  # it was sent nothing
        boto.close()


def test_a_folder_that_another_user_has_laid_ready_is_not_used(root: Path) -> None:
    other_user.needs_root()
    folder = lifecycle.state_dir("t")
    folder.mkdir(parents=True)
    owned.write_mark(folder, "deployment")
    with subprocess.Popen(["sleep", "60"]) as bystander:
        process = processes.reference(bystander.pid)
        assert process
        Children(folder / "children.json").add(process)  # destroy would end it
        os.chown(folder, other_user.NOBODY, -1)
        for action in (lambda: start(config(root)), lambda: lifecycle.destroy("t"), lambda: lifecycle.status("t")):
            with pytest.raises(DeployError, match="belongs to another user"):
                action()
        assert bystander.poll() is None
        bystander.kill()
    os.chown(folder, 0, -1)
    (folder / "children.json").unlink()


def test_a_folder_that_others_could_enter_is_closed(root: Path) -> None:
    lifecycle.state_dir("t").mkdir(parents=True)
    lifecycle.state_dir("t").chmod(0o777)
    start(config(root))
    assert lifecycle.state_dir("t").stat().st_mode & 0o777 == 0o700


LOOKS = """
import os, sys, tempfile
from pathlib import Path
def f(event, context):
    home = Path(os.environ["HOME"])
    (home / "mine").write_text("x")
    os.symlink("/etc/passwd", home / "link")
    os.mkfifo(home / "pipe")
    return {"home": str(home), "mode": home.stat().st_mode & 0o777, "tmp": tempfile.gettempdir(), "had": len(os.listdir(home)),
            "flags": [sys.flags.no_user_site, getattr(sys.flags, "safe_path", True)], "pid": os.getpid()}
"""


def test_a_worker_has_a_private_home_that_goes_with_it(root: Path) -> None:
    (root / "code" / "app.py").write_text(LOOKS)
    endpoint = start(config(root))["endpoint"]
    first = invoke(endpoint, 1)
    home = Path(first["home"])
    assert first["tmp"] == str(home) and (first["mode"], first["had"], first["flags"]) == (0o700, 3, [1, True])
    assert home.is_relative_to(lifecycle.state_dir("t"))
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: not home.exists())
    second = invoke(endpoint, 1)
    assert second["home"] != first["home"]
    os.kill(lifecycle.status("t")["pid"], signal.SIGKILL)  # nobody removes it but destroy
    assert lifecycle.destroy("t") == [] and not lifecycle.state_dir("t").exists()
    assert Path("/etc/passwd").exists()


def test_what_lies_in_the_current_folder_is_not_imported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bait = root / "bait"
    bait.mkdir()
    for name in ("remoe_cli", "asyncio", "aiohttp", "json", "torch"):
        (bait / f"{name}.py").write_text(f"open({str(root / 'bitten')!r}, 'w').write({name!r})\nraise SystemExit('bitten')")
    monkeypatch.chdir(bait)
    assert invoke(start(config(root))["endpoint"], 1)
    argv = target._main_server(root, Book(root / "receipts")).argv  # of a real deployment
    assert argv[1:4] == ["-P", "-m", "remoe_cli.runtime.server"]
    assert not (root / "bitten").exists()


def test_another_users_packages_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setattr("site.ENABLE_USER_SITE", True)
    monkeypatch.setattr("site.USER_SITE", str(packages))
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    assert "PYTHONNOUSERSITE" not in place.environment(tmp_path)
    monkeypatch.setattr("site.USER_SITE", str(tmp_path / "not there"))
    assert place.environment(tmp_path)["PYTHONNOUSERSITE"] == "1"
    monkeypatch.setattr("site.USER_SITE", "/proc/1" if os.geteuid() else str(packages))
    with suppress(PermissionError):
        os.chown(packages, other_user.NOBODY, -1)
    assert place.environment(tmp_path)["PYTHONNOUSERSITE"] == "1"


def test_every_python_that_remoe_starts_ignores_the_current_folder() -> None:
    import ast

    from tests.support.paths import ROOT

    found = []
    for file in (ROOT / "remoe_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.List) and any(isinstance(each, ast.Constant) and each.value == "-m" for each in node.elts):
                words = [ast.unparse(each).strip("'\"") for each in node.elts]
                if words[0] == "sys.executable":
                    found.append(f"{file.name}: {words[1]}")
    assert len(found) >= 4 and {each.partition(": ")[2] for each in found} == {"-P"}, found
    assert sys.version_info >= (3, 11)  # which knows -P
