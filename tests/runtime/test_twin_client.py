"""The twin needs no account: whatever is set for AWS, and however broken, its client works."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES

from remoe_cli.function.codec import Batch, pack
from remoe_cli.runtime.invoke import invoke, make_client
from tests.support.endpoint import Endpoint, ok

FRAME = pack(Batch("float32", (1, 4), (1, 2), np.arange(12, dtype=np.float32).reshape(3, 4)))
OTHERS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_LAMBDA",
    "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "AWS_DEFAULT_PROFILE",
)


def variables() -> set[str]:
    """The names of all variables from which botocore takes a setting."""
    named = {(names,) if isinstance(names, str) else tuple(names or ()) for _, names, _, _ in BOTOCORE_DEFAUT_SESSION_VARIABLES.values()}
    return {name for names in named for name in names} | set(OTHERS)


def test_no_setting_of_aws_reaches_the_twins_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    assert {"AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_MAX_ATTEMPTS", "AWS_DEFAULTS_MODE"} <= variables()
    for name in variables():
        monkeypatch.setenv(name, "[nonsense] \x01")
    monkeypatch.setenv("HOME", str(tmp_path))
    models = tmp_path / ".aws" / "models" / "lambda" / "2015-03-31"
    models.mkdir(parents=True)
    for file in (tmp_path / ".aws" / "config", tmp_path / ".aws" / "credentials", models / "service-2.json"):
        file.write_bytes(b"\xff[[[ {")
    with Endpoint() as endpoint:
        endpoint.script = [ok()]
        assert invoke(make_client(endpoint.url, 1, 5.0), "f", FRAME)[0] == FRAME
        assert len(endpoint.requests) == 1
