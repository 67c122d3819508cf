"""The functions of moto's Lambda, run by the local twin.

moto itself runs a function in Docker. Here an invocation runs what moto stores under the name and alias that it gives: its code, handler,
memory, timeout, reserved concurrency and environment. awslambdaric runs it in a process for each execution environment; it reads S3 at
moto's server, and what it logs goes to moto's CloudWatch Logs. IAM policies are not applied.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import sys
import tempfile
import threading
import uuid
import zipfile
from pathlib import Path
from typing import Any

from moto.awslambda.exceptions import LambdaClientError
from moto.awslambda.models import LambdaFunction

from remoe_cli import cages
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.deploy.local.instance import CallResult, Host
from remoe_cli.deploy.local.pool import Pool, Throttled

IDLE_TTL_S = 20.0


class RateExceeded(LambdaClientError):
    code = 429

    def __init__(self) -> None:
        super().__init__("TooManyRequestsException", "Rate Exceeded.")


class Functions:
    """Execution environments of all functions of a moto server at `url`, in an event loop of their own."""

    def __init__(self, url: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="remoe-moto-"))
        self._environment = {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "role", "AWS_SECRET_ACCESS_KEY": "secret"}
        logs, scratch = self._folder / "logs", self._folder / "scratch"
        logs.mkdir()
        scratch.mkdir()
        self._host = Host(sys.executable, cages.rlimit_only(), logs, scratch, lambda process: None)
        self._pools: dict[str, Pool] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def invoke(self, function: LambdaFunction, event: bytes) -> CallResult:
        return asyncio.run_coroutine_threadsafe(self._invoke(function, event), self._loop).result()

    def close(self) -> None:
        """End every execution environment."""
        for pool in self._pools.values():
            asyncio.run_coroutine_threadsafe(pool.close(), self._loop).result()
        shutil.rmtree(self._folder)

    async def _invoke(self, function: LambdaFunction, event: bytes) -> CallResult:
        key = f"{function.function_arn} {function.version} {function.last_modified}"
        if key not in self._pools:
            self._pools[key] = Pool(self._config(function), self._host, IDLE_TTL_S)
        return await self._pools[key].invoke(str(uuid.uuid4()), event)

    def _config(self, function: LambdaFunction) -> FunctionConfig:
        code = self._folder / function.code_sha_256.replace("/", "_")
        if not code.exists():
            with zipfile.ZipFile(io.BytesIO(function.code_bytes)) as archive:
                archive.extractall(code)
        return FunctionConfig(
            name=function.function_name,
            handler=str(function.handler),
            code_dir=str(code),
            environment=self._environment | function.environment_vars,
            memory_mb=int(function.memory_size),
            timeout_s=float(function.timeout),
            reserved_concurrency=int(function.reserved_concurrency or 1),
        )


_functions: list[Functions] = []


def serve(url: str) -> None:
    """Run functions that are invoked at the moto server of this process, whose address is `url`."""
    _functions.append(Functions(url))


def close() -> None:
    for functions in _functions:
        functions.close()


def invoke(self: LambdaFunction, body: bytes | str, request_headers: Any, response_headers: dict[str, str]) -> bytes:
    """What moto calls for an invocation, in place of its own method."""
    try:
        done = _functions[0].invoke(self, body.encode() if isinstance(body, str) else body or b"{}")
    except Throttled:
        raise RateExceeded from None
    self.logs_backend.ensure_log_group(self.logs_group_name)
    self.save_logs(done.log_tail.decode("utf-8", "replace"))
    response_headers["x-amz-log-result"] = base64.b64encode(done.log_tail).decode()
    if done.failed:
        response_headers["x-amz-function-error"] = "Unhandled"
    return done.payload
