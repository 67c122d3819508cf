"""A twin served from a thread of the test's process, and a real boto3 client of it."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from remoe_cli import cages
from remoe_cli.deploy.local import front, processes
from remoe_cli.deploy.local.config import FunctionConfig, ProcessRef, TwinConfig
from remoe_cli.deploy.local.instance import Host


class Running:
    """A twin served from a thread of this process, and a boto3 client of it."""

    def __init__(self, twin: front.Twin, endpoint: str, started: list[ProcessRef]) -> None:
        self.twin, self.endpoint, self.started = twin, endpoint, started
        self.client = boto3.client(
            "lambda",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
            config=Config(retries={"total_max_attempts": 1}, proxies={}, read_timeout=30, max_pool_connections=4),
        )

    def raw(self, body: bytes, name: str = "f", **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.invoke(FunctionName=name, Payload=body, **more)
        answer["body"] = answer["Payload"].read()
        return answer

    def call(self, event: Any = None, **more: Any) -> Any:
        answer = self.raw(json.dumps(event).encode(), **more)
        assert "FunctionError" not in answer, answer["body"]
        return json.loads(answer["body"])

    def fault(self, event: Any = None, **more: Any) -> dict[str, Any]:
        answer = self.raw(json.dumps(event).encode(), **more)
        assert answer["StatusCode"] == 200 and answer["FunctionError"] == "Unhandled"
        return json.loads(answer["body"])  # type: ignore[no-any-return]

    def status(self) -> dict[str, Any]:
        return front.status(self.twin)


@contextmanager
def run_twin(
    functions: Sequence[FunctionConfig],
    logs: Path,
    mechanism: cages.Mechanism,
    *,
    init_limit_s: float = 10.0,
    rtt_ms: float = 0.0,
    idle_ttl_s: float = 300.0,
) -> Iterator[Running]:
    """Serve `functions`; at the end nothing of it may be left running."""
    config = TwinConfig(name="t", functions=tuple(functions), rtt_ms=rtt_ms, idle_ttl_s=idle_ttl_s, python=sys.executable)
    started: list[ProcessRef] = []
    scratch = logs.with_name(f"{logs.name}-scratch")
    for folder in (logs, scratch):
        folder.mkdir(exist_ok=True)
    host = Host(sys.executable, mechanism, logs, scratch, started.append, init_limit_s)
    ready, ended = threading.Event(), threading.Event()
    running: list[Running] = []

    async def run() -> None:
        twin = front.twin(config, host)
        runner = await front.serve(twin)
        running.append(Running(twin, front.endpoint(runner), started))
        ready.set()
        await asyncio.to_thread(ended.wait)
        await front.close(twin, runner)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield running[0]
    finally:
        running[0].client.close()
        ended.set()
        thread.join(15)
        assert not thread.is_alive()
        assert not [process for process in started if processes.is_alive(process)], "a worker outlived its twin"
        assert list(scratch.iterdir()) == [], "what a worker wrote outlived it"
