"""What is copied out of a checkpoint's folder: no file from elsewhere by way of a link, and none that more people can read afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from remoe_cli import owned, recognise
from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.shards import write_shards
from remoe_cli.package.partial_checkpoint import seal, write_partial_checkpoint
from tests.support.families import save

SECRET = b'{"secret": "key"}'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save("mixtral", torch.bfloat16, folder, fused=False)
    (folder / "tokenizer_config.json").write_text("{}")
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "secret").chmod(0o600)
    return folder


def replaced(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)

    return make


def linked_folder(folder: Path) -> None:
    (folder.parent / "templates").mkdir()
    (folder.parent / "templates/a.jinja").write_bytes(SECRET)
    (folder / "additional_chat_templates").symlink_to("../templates")


def in_two_steps(folder: Path) -> None:
    (folder / "step").symlink_to("../secret")
    (folder / "vocab.json").symlink_to("step")


ELSEWHERE = "outside of the model's folder and of the Hugging Face cache"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "settings": (replaced("tokenizer_config.json", "../secret"), ELSEWHERE),
    "an absolute link": (replaced("merges.txt", "/etc/passwd"), ELSEWHERE),
    "config": (replaced("config.json", "../secret"), ELSEWHERE),
    "weights": (replaced("other.safetensors", "../secret"), ELSEWHERE),
    "a template": (replaced("chat_template.jinja", "../secret"), ELSEWHERE),
    "a tokenizer": (replaced("tokenizer.model", "../secret"), ELSEWHERE),
    "experts": (replaced("share.json", "../secret"), ELSEWHERE),
    "an index": (replaced("model.safetensors.index.json", "../secret"), ELSEWHERE),
    "in two steps": (in_two_steps, ELSEWHERE),
    "not there": (replaced("vocab.json", "gone"), "is a link to gone, which is not there"),
    "a circle": (replaced("vocab.json", "vocab.json"), "is a link to vocab.json, which is not there"),
    "a device": (replaced("vocab.json", "/dev/zero"), ELSEWHERE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_link_to_elsewhere_is_refused(name: str, model: Path) -> None:
    make, message = REFUSED[name]
    make(model)
    with pytest.raises(ModelError, match=message) as raised:
        find(str(model))
    assert raised.value.hint


def test_a_folder_that_is_linked_holds_nothing_of_the_model(model: Path) -> None:
    linked_folder(model)
    with pytest.raises(ModelError, match=ELSEWHERE):
        find(str(model))


def written(model: Path) -> Iterator[Path]:
    """Everything that is written of a model."""
    share, shards = model.parent / "share", model.parent / "shards"
    write_partial_checkpoint(find(str(model)), {0: (1, 4), 1: (0,)}, share)
    seal(share)
    shards.mkdir()
    yield from (shard.path for shard in write_shards(find(str(model)), {0: [(2, 3)]}, 1, shards))
    yield from share.iterdir()


def test_links_inside_the_folder_are_followed(model: Path) -> None:
    (model / "kept").mkdir()
    (model / "tokenizer_config.json").rename(model / "kept/settings")
    (model / "tokenizer_config.json").symlink_to("kept/settings")
    copies = [path for path in written(model) if path.name == "tokenizer_config.json"]
    assert [path.read_text() for path in copies] == ["{}"] and not copies[0].is_symlink()


@pytest.mark.parametrize("place", ["hub", "another/cache"])
@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "store"])
def test_the_hubs_cache_is_read_through_its_links(place: str, shared: bool, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub keeps it, wherever that is; links that leave the repository stay in the cache that HF_HUB_CACHE names."""
    repository = model.parent / place / "models--owner--name"
    blobs = model.parent / place / "store" if shared else repository / "blobs"
    snapshot = repository / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    if shared:
        with pytest.raises(ModelError, match=ELSEWHERE):
            find(str(snapshot))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(model.parent / place))
    assert find(str(snapshot)).weight_files


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o002])
def test_what_is_written_has_the_rights_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with owned.writing(tmp_path / "a.json", recognise.NONE) as temporary:
            temporary.write_text("{}")
        with owned.new_folder(tmp_path / "folder", "package") as folder:
            (folder / "b").write_text("")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "folder", "folder/b", "folder/.remoe")}
    assert modes == {"a.json": 0o666 & ~mask, "folder": 0o777 & ~mask, "folder/b": 0o666 & ~mask, "folder/.remoe": 0o666 & ~mask}


def test_a_file_that_is_written_again_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0o600)
    with owned.writing(path, recognise.ANY) as temporary:
        temporary.write_text("{}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o644])
def test_copies_have_no_more_rights_than_the_model(mode: int, model: Path) -> None:
    for path in model.iterdir():
        path.chmod(mode)
    copies = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written(model) if path.name not in ("main.json", "share.json")}
    assert set(copies.values()) == {mode | 0o200} and {"config.json", "weights-0000.safetensors", "layer-000.safetensors"} <= copies.keys()


def test_a_plan_that_is_private_stays_private(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "plan.json").chmod(0o600)
    owned.copy_file(tmp_path / "plan.json", tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == "{}" and stat.S_IMODE((tmp_path / "copy.json").stat().st_mode) == 0o600
