"""What is no folder of a checkpoint is told from the disk alone; the hub is not asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find


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


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("model/config.json", "model/config.json is a file; give its folder.", "Its folder is model."),
        ("model/model.safetensors", "model/model.safetensors is a file; give its folder.", "Its folder is model."),
        ("./model/config.json", "./model/config.json is a file; give its folder.", "Its folder is model."),
        ("loose.safetensors", "loose.safetensors is a file; give its folder.", "the folder that holds config.json and weights"),
        ("model/model-Q4_K_M.gguf", "is a file; give the folder of the model's safetensors checkpoint.", "remoe reads no GGUF."),
        ("empty/folder", "The folder empty/folder has no config.json.", "Give the folder of a transformers checkpoint."),
        ("outer", "The folder outer has no config.json.", "outer/inner."),
        ("cache", "The folder cache has no config.json.", "cache/snapshots/abc."),
        ("broken", "broken is a link to gone/model, which is not there.", "Give the folder"),
        ("model/config.json/x", "There is no folder model/config.json/x", "Check the path."),
        ("~no-such-user/model", "~no-such-user/model cannot be looked up", "Check the path"),
        ("~/no-such-model", "There is no folder ~/no-such-model", "Check the path."),
        ("m" * 5000, "cannot be looked up", "Check the path"),
        ("loop", "loop", ""),
    ],
)
def test_what_is_no_checkpoint(model: str, message: str, hint: str, place: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find(model)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_link_to_a_folder_is_the_folder(place: Path) -> None:
    assert find("linked") == find("model") == find(str(place / "model"))
    assert find("linked").path == place / "model"
