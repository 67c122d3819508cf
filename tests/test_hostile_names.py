"""Names that lead elsewhere, in files that remoe reads and on its command line: each is refused before a path is made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from remoe_cli import artifacts
from remoe_cli.artifacts import Document, read_json
from remoe_cli.cli import app
from remoe_cli.deploy.local.config import TwinConfig
from remoe_cli.errors import ArtifactError, RemoeError
from remoe_cli.model.checkpoint import INDEX, Checkpoint
from remoe_cli.model.checkpoint_files import file_names
from remoe_cli.package.bundle import FunctionEntry, Manifest
from remoe_cli.package.partial_checkpoint import MainFile, MainManifest
from remoe_cli.plan.document import Source
from remoe_cli.profile.record import ModelRef
from tests.support.routing_files import SPEC

NAMES = ("../x", "/etc/passwd", "a/../../x", "..", ".", "", ".hidden", "a/b", "a\0b", "a\nb", "\x1b[2J", "-rf", "a b", "x" * 300, "\u202ex")
DIGEST = "0" * 64
SHARD = {"shard": "a", "shard_sha256": "0", "shard_bytes": 1, "head_bytes": 1, "head_sha256": "0"}
ENTRY = FunctionEntry.model_validate(
    {"name": "a", "layer": 0, "experts": (0,), "memory_mb": 1, "replicas": 1, "timeout_s": 1, **SHARD},
)
BUNDLE = Manifest(plan=Source(path="p", sha256="0"), model=ModelRef(path="m", revision="r"), spec=SPEC, code_sha256="0", functions=(ENTRY,))
# A document, and the path to a name in it of which a path is made.
DOCUMENTS: dict[str, tuple[Document, tuple[str | int, ...]]] = {
    "file of a main function": (MainManifest(files=(MainFile(name="a", bytes=1, sha256=DIGEST),)), ("files", 0, "name")),
    "shard of a bundle": (BUNDLE, ("functions", 0, "shard")),
    "function of a bundle": (BUNDLE, ("functions", 0, "name")),
    "deployment": (TwinConfig(name="a", functions=(), python="python"), ("name",)),
}


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_is_refused(what: str, name: str, tmp_path: Path) -> None:
    document, (*path, last) = DOCUMENTS[what]
    content: Any = json.loads(artifacts.json_text(document))
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = name
    (tmp_path / "document.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"is damaged at '{'.'.join(map(str, (*path, last)))}'"):
        read_json(tmp_path / "document.json", type(document))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", ".hidden", "a/b", "a\0b", "a\nb", "\x1b[2J", "x" * 300, 5, None, ["a"]]
)
def test_weights_that_an_index_has_elsewhere_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is no file of the folder"):
        file_names(["model.safetensors", name])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(RemoeError, match=f"{INDEX} cannot be used"):
        _ = Checkpoint("m", tmp_path).weight_files


@pytest.mark.parametrize("command", ["status", "destroy", "logs", "infer --prompt x", "serve"])
@pytest.mark.parametrize("name", [name for name in NAMES if name and "\0" not in name], ids=ascii)
def test_a_deployments_name_is_no_path(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/thesis.tex").write_text("years of work")
    word, *options = command.split()
    monkeypatch.setattr(sys, "argv", ["remoe", word, "--", name] if not options else ["remoe", word, *options, "--", name])
    assert app.run() in (1, 2)
    said = capsys.readouterr().err
    assert "error: " in said and "please report" not in said
    assert (tmp_path / "x/thesis.tex").read_text() == "years of work"
