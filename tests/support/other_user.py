"""Run a little program as another user of this machine, where the tests run as root."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

NOBODY = 65534
_PYTHONS = (str(Path(sys.executable).resolve()), "/usr/bin/python3")


@functools.cache
def _python() -> str | None:
    """A Python that the other user may run; one in somebody's home is not for others."""
    for python in _PYTHONS:
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([python, "-S", "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=True)
            return python
    return None


def can_run() -> bool:
    return os.geteuid() == 0 and _python() is not None


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if _python() is None:
        pytest.skip(f"another user can run none of {', '.join(_PYTHONS)}")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program whose standard library is all that it has."""
    pipe = subprocess.PIPE
    argv = [str(_python()), "-S", "-c", code, *map(str, arguments)]
    return subprocess.Popen(argv, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", stdin=pipe, stdout=pipe, text=True)


_ASK = """
import http.client, sys
host, port, method, path, body = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
connection = http.client.HTTPConnection(host, port, timeout=10)
connection.request(method, path, body.encode() or None, {"Content-Type": "application/json"})
response = connection.getresponse()
print(response.status, response.read().decode())
"""


def ask(port: int, method: str, path: str, body: str = "", host: str = "127.0.0.1") -> tuple[int, str]:
    """What a server of this machine answers to the other user."""
    with start(_ASK, host, port, method, path, body) as asking:
        status, _, text = asking.communicate(timeout=30)[0].partition(" ")
    return int(status), text


_POSE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.path, flush=True)
        body = b'{"answer": {"text": "forged", "receipt": {}}}'
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    do_GET = do_POST
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("up", flush=True)
server.serve_forever()
"""


def pose(port: int) -> subprocess.Popen[str]:
    """A server of the other user on a port, which prints the path of each request."""
    posing = start(_POSE, port)
    assert posing.stdout and posing.stdout.readline() == "up\n"
    return posing
