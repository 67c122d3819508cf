"""An AWS account for tests: moto's server (tests/support/moto_server.py), reached as any AWS client reaches AWS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from remoe_cli.deploy.aws import session
from remoe_cli.deploy.aws.session import Account
from tests.support.paths import ROOT

REGION = "us-east-1"
_SETTINGS = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


@contextmanager
def moto() -> Iterator[str]:
    """The server's address."""
    command = [sys.executable, "-m", "tests.support.moto_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin and process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def use(patch: pytest.MonkeyPatch, url: str) -> None:
    """Point every AWS client of this process and its children there."""
    for name in _SETTINGS:
        patch.delenv(name, raising=False)
    environment = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": REGION}
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def connect(on_call: Callable[[str], None] = lambda name: None, on_answer: Callable[[str], None] = lambda name: None) -> Account:
    """A connection whose calls are told by name, as they are sent and as they are answered."""
    account = session.connect()
    account.session.events.register("before-call", lambda model, **_: on_call(model.name))
    account.session.events.register("after-call", lambda model, **_: on_answer(model.name))
    return account


def changing(calls: list[str]) -> list[str]:
    """Those that may change something."""
    return [name for name in calls if not name.startswith(("Describe", "Get", "List", "Head"))]


def pages(client: Any, operation: str, key: str, **given: Any) -> list[Any]:
    return [item for page in client.get_paginator(operation).paginate(**given) for item in page[key]]
