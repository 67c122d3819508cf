"""What goes on while a main function's files come: its functions start, and torch is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from remoe_cli.artifacts import read_json, write_json
from remoe_cli.errors import ArtifactError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.package.partial_checkpoint import MANIFEST, MainManifest, seal, write_partial_checkpoint
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import load_main
from remoe_cli.runtime.receipt import receipt_of
from remoe_cli.runtime.server_config import ServedFunction, ServerConfig
from tests.support.api_server import PRICES
from tests.support.endpoint import Endpoint, failed, ok
from tests.support.families import EXPERTS, save


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as made:
        yield made


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a main function that has an expert function for its first layer."""
    folder = tmp_path_factory.mktemp("packaged")
    save("mixtral", torch.float32, folder / "model", fused=False)
    found = find(str(folder / "model"))
    write_partial_checkpoint(found, {1: tuple(range(EXPERTS))}, folder / "share")
    model, every = ModelRef(path=found.name, revision=found.revision), tuple(range(EXPERTS))
    called = ServedFunction(
        layer=0, function="f", experts=every, replicas=1, expert_rows=1.0, timeout_s=5, shard="f", head_bytes=1, head_sha256="0"
    )  # fmt: skip
    config = ServerConfig(model=model, spec=read_spec(found), functions=(called,), prices=PRICES)
    write_json(folder / "share" / "server.json", config)
    seal(folder / "share")
    return folder / "share"


def test_functions_start_before_the_weights_are_there(share: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of weights that is damaged is told after that, with what the start was billed."""
    monkeypatch.setattr(load_main, "make_caller", lambda address, connections, timeout_s: endpoint.client)
    endpoint.script = [ok(init=50.0, body=b"{}")]
    weights = share / next(file.name for file in read_json(share / MANIFEST, MainManifest).files if "weights" in file.name)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"!")
    try:
        with pytest.raises(ArtifactError, match="is not the file that the manifest names") as refused:
            load_main.load_packaged(str(share / MANIFEST))
    finally:
        weights.write_bytes(content)
    receipt = receipt_of(refused.value)
    assert receipt is not None and receipt.invocations == 1 and receipt.functions[0].name == "f"
    assert [body for _, _, body in endpoint.requests] == [b'{"health": true}']


def test_a_start_is_made_once(share: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files have started, loading waits for; it does not start it again. Its failure is that of loading."""
    monkeypatch.setattr(load_main, "make_caller", lambda address, connections, timeout_s: endpoint.client)
    endpoint.script = [failed("Runtime.InitError")]
    with pytest.raises(Exception, match=r"it was Runtime\.InitError") as refused:
        load_main.load_packaged(str(share / MANIFEST))
    receipt = receipt_of(refused.value)
    assert receipt is not None and [line.name for line in receipt.functions] == ["f"]
    assert len(endpoint.requests) == 1


def test_torch_is_imported_while_files_come() -> None:
    """In a process that has not imported it: files that come only when it is imported do come."""
    program = """
import sys, time
from remoe_cli.errors import ArtifactError
from remoe_cli.runtime import fetch, load_main

def fetched(*given):
    end = time.monotonic() + 200
    while not (there := hasattr(sys.modules.get("remoe_cli.runtime.engine"), "start_engine")) and time.monotonic() < end:
        time.sleep(0.01)
    raise ArtifactError("imported" if there else "not imported")

assert "torch" not in sys.modules
fetch.fetch = fetched
try:
    load_main.load_packaged("main.json")
except ArtifactError as error:
    print(error.message)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=400)
    assert run.stdout == "imported\n", run.stderr
