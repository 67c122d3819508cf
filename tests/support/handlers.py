"""A twin of one small function: what its handlers do, how it is served, and its REPORT line."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import cages
from remoe_cli.deploy.local.config import FunctionConfig
from tests.support.twin import Running, run_twin

HANDLERS = """
import json, os, sys, time

def echo(event, context):
    return event

def who(event, context):
    print("hello from", context.aws_request_id)
    return {"pid": os.getpid(), "environment": dict(os.environ), "cwd": os.getcwd(), "left_ms": context.get_remaining_time_in_millis()}

def sleep(event, context):
    time.sleep(event)
    return os.getpid()

def fail(event, context):
    raise KeyError("no such expert")

def leave(event, context):
    sys.exit(3)

def hog(event, context):
    blocks = []
    for _ in range(event):
        blocks.append(b"x" * (1 << 20))
    return len(blocks)

def map_file(event, context):
    import mmap
    with open(event, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return sum(view[offset] for offset in range(0, len(view), 4096))

def grow(event, context):
    return "x" * event

def chatter(event, context):
    print("y" * event)

def spin(event, context):
    begun, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < event:
        pass
    return (time.process_time() - used) / (time.perf_counter() - begun)
"""


def server(folder: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Serves a handler of HANDLERS, or of any module in `folder`/code, from a process whose own secrets it must not see."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "parents-secret")
    monkeypatch.setenv("HF_TOKEN", "parents-token")
    (folder / "code").mkdir()
    (folder / "code" / "app.py").write_text(HANDLERS)
    return functools.partial(_serve, folder, probed)


@contextmanager
def _serve(
    folder: Path,
    probed: cages.Mechanism,
    handler: str,
    *,
    mechanism: cages.Mechanism | None = None,
    init_limit_s: float = 10.0,
    rtt_ms: float = 0.0,
    idle_ttl_s: float = 300.0,
    memory_mb: int = 1769,
    timeout_s: float = 20.0,
    concurrency: int = 1,
    environment: dict[str, str] | None = None,
) -> Iterator[Running]:
    function = FunctionConfig(
        name="f",
        handler=handler,
        code_dir=str(folder / "code"),
        environment=environment or {},
        memory_mb=memory_mb,
        timeout_s=timeout_s,
        reserved_concurrency=concurrency,
    )
    with run_twin(
        [function], folder / "logs", mechanism or probed, init_limit_s=init_limit_s, rtt_ms=rtt_ms, idle_ttl_s=idle_ttl_s
    ) as running:
        yield running


def report(answer: dict[str, Any]) -> dict[str, float]:
    """The numbers of the REPORT line, which must be the last line of the log tail, in AWS's own form."""
    line = base64.b64decode(answer["LogResult"]).decode().splitlines(keepends=True)[-1]
    form = (
        r"REPORT RequestId: (?P<id>[0-9a-f-]{36})\tDuration: (?P<duration>\d+\.\d\d) ms\tBilled Duration: (?P<billed>\d+) ms\t"
        r"Memory Size: (?P<size>\d+) MB\tMax Memory Used: (?P<used>\d+) MB\t(Init Duration: (?P<init>\d+\.\d\d) ms\t)?\n"
    )
    match = re.fullmatch(form, line)
    assert match, line
    assert match["id"] == answer["ResponseMetadata"]["RequestId"]
    return {key: float(value) for key, value in match.groupdict().items() if value and key != "id"}
