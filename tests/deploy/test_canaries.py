"""A whole life on the twin with a canary in every secret and nonsense in every setting of AWS: it works, and no canary leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.cli import app
from remoe_cli.deploy.local import target as local_target
from remoe_cli.plan.document import LayerPlan
from tests.support import by_hand

CANARY = "CANARYwJalrXUtnFEMIK7"
LAYERS = (LayerPlan(layer=0, remote=(1, 2, 3), memory_mb=1769, replicas=1), LayerPlan(layer=1, remote=(), memory_mb=0, replicas=0))
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/secret",
    "AWS_SESSION_TOKEN": f"{CANARY}\ntoken",
    "HF_TOKEN": f"hf_{CANARY}",
    "HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:1",
    "HTTP_PROXY": f"http://me:{CANARY}@127.0.0.1:1",
}
NONSENSE = {
    "AWS_PROFILE": "absent",
    "AWS_REGION": "mars",
    "AWS_ENDPOINT_URL": "nowhere",
    "AWS_CA_BUNDLE": "/nowhere/ca.pem",
    "AWS_MAX_ATTEMPTS": "many",
    "AWS_DEFAULTS_MODE": "odd",
}


@pytest.fixture
def remoe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command in this process; it fails if it prints a canary."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
        ended = app.run()
        out, err = capfd.readouterr()
        assert ended == code, out + err
        assert "CANARY" not in out + err
        return out

    return run


def test_no_canary_leaves_and_nothing_of_aws_matters(remoe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand.by_hand(tmp_path, LAYERS)
    monkeypatch.setattr(local_target, "read_inputs", lambda path: (made.plan, made.profile, made.catalog))
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".aws" / "config").write_bytes(b"[[[\xff aws_secret_access_key = " + CANARY.encode())
    (home / ".aws" / "credentials").write_bytes(f"[default]\naws_secret_access_key = {CANARY}\n[[".encode())
    folders = {"HOME": home, "REMOE_STATE_DIR": tmp_path / "state", "REMOE_CACHE_DIR": tmp_path / "cache"}
    for name, value in {**SECRETS, **NONSENSE, **folders, "REMOE_DEBUG": "1"}.items():
        monkeypatch.setenv(name, str(value))
    plan = str(made.plan_path)
    try:
        remoe("deploy", plan, "--name", "canary", "--quiet")
        document = json.loads(remoe("infer", "canary", "--prompt", by_hand.PROMPT, "--max-new-tokens", "4", "--json"))
        assert document["token_ids"] == made.tokens(4) and document["receipt"]["invocations"] > 0
        remoe("status", "canary", "--json")
        remoe("logs", "canary")
        assert [arguments for arguments in all_arguments() if "CANARY" in arguments] == []
        for file in (path for folder in ("state", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()):
            assert b"CANARY" not in file.read_bytes(), file
        remoe("infer", "nobody", "--prompt", CANARY, code=1)
        remoe("deploy", plan, "--target", "aws", "--yes", code=1)
        remoe("package", str(tmp_path / f"hf_{CANARY}.json"), code=2)
    finally:
        remoe("destroy", "canary", "--json")


def all_arguments() -> list[str]:
    """The arguments of every process of this machine."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found
