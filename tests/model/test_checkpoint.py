"""What is no folder of a checkpoint is told from the disk alone; the hub is not asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.checkpoint import find, find_named


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "snapshots" / "abc").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "model-Q4_K_M.gguf"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "loose.safetensors").write_text("")
    (tmp_path / "cache" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "snapshots" / "abc" / "config.json").write_text("{}")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "config.json").write_text("{}")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "broken").symlink_to("gone/model")
    (tmp_path / "linked").symlink_to("model")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


# What find() refuses: by the name given, parts of message and hint.
REFUSED = {
    "model/config.json": ("model/config.json is a file; give its folder.", "Its folder is model."),
    "model/model.safetensors": ("model/model.safetensors is a file; give its folder.", "Its folder is model."),
    "./model/config.json": ("./model/config.json is a file; give its folder.", "Its folder is model."),
    "loose.safetensors": ("loose.safetensors is a file; give its folder.", "the folder that holds config.json and weights"),
    "model/model-Q4_K_M.gguf": ("is a file; give the folder of the model's safetensors checkpoint.", "remoe reads no GGUF."),
    "empty/folder": ("The folder empty/folder has no config.json.", "Give the folder of a transformers checkpoint."),
    "outer": ("The folder outer has no config.json.", "outer/inner."),
    "cache": ("The folder cache has no config.json.", "cache/snapshots/abc."),
    "broken": ("broken is a link to gone/model, which is not there.", "Give the folder"),
    "model/config.json/x": ("There is no folder model/config.json/x", "Check the path, or give a hub id OWNER/NAME."),
    "~no-such-user/model": ("~no-such-user/model cannot be looked up", "Check the path"),
    "~/no-such-model": ("There is no folder ~/no-such-model", "Check the path, or give a hub id OWNER/NAME."),
    "m" * 5000: ("cannot be looked up", "Check the path"),
    "loop": ("loop", ""),
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_is_no_checkpoint(model: str, place: Path) -> None:
    message, hint = REFUSED[model]
    for look, kind in ((find, ModelError), (find_named, UsageError)):
        with pytest.raises(kind) as caught:
            look(model)
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_a_link_to_a_folder_is_the_folder(place: Path) -> None:
    assert find("linked") == find("model") == find(str(place / "model"))
    assert find("linked").path == place / "model"


@pytest.mark.parametrize("name", [b"caf\xe9", "🙂".encode() + b"\xff"])
def test_a_path_that_is_not_utf8_is_refused(name: bytes, place: Path) -> None:
    folder = place / os.fsdecode(name)
    (place / "model").rename(folder)
    with pytest.raises(UsageError, match="is not UTF-8"):
        find_named(str(folder))
