"""A checkpoint's revision: every byte that is read of it counts, nothing else does, and whoever loads it looks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from remoe_cli import digests
from remoe_cli.errors import ArtifactError, ModelError
from remoe_cli.model import checkpoint
from remoe_cli.model.checkpoint import Checkpoint, find, find_profiled
from remoe_cli.model.demo import demo_model
from remoe_cli.model.loader import load
from tests.support.families import build


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, with everything that transformers reads."""
    folder = tmp_path_factory.mktemp("original") / "model"
    build("mixtral", torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    texts = {
        "generation_config.json": '{"eos_token_id": 7}',
        "tokenizer.json": '{"version": "1.0", "model": {}}',
        "tokenizer_config.json": '{"model_max_length": 512}',
        "special_tokens_map.json": "{}",
        "vocab.json": '{"a": 1}',
        "merges.txt": "a b",
        "tokenizer.model": "pieces",
        "tiktoken.tiktoken": "ranks",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, in which even new files are remembered: so a change must be noticed by what the kernel says."""
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", -60.0)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def flip_middle(path: Path) -> None:
    """Change one bit in a file, and put its size and its time of last change back."""
    before = path.stat()
    with path.open("r+b") as file:
        at = before.st_size - 12 if path.name.endswith(".index.json") else before.st_size // 2  # inside a name there, so that it stays JSON
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "tiktoken.tiktoken", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("model.safetensors.index.json", "model-00002-of-"),
)


def test_all_that_is_there_is_in_the_table_below(model: Path) -> None:
    files = {path.relative_to(model).as_posix() for path in find(str(model)).files}
    assert {name for name in files if not name.startswith("model-0000")} == set(READ[:-1])
    assert len([name for name in files if name.startswith("model-0000")]) > 2
    assert files == {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", READ)
def test_one_bit_of_any_file_that_is_read_is_another_revision(model: Path, name: str) -> None:
    profiled = find(str(model)).revision
    assert find_profiled(str(model), profiled).path == model
    path = next(model.glob(f"{name}*"))
    flip_middle(path)
    with pytest.raises(
        ArtifactError, match=r"has changed since it was profiled: it is at revision local:\w{16}, the profile is of local:\w{16}\."
    ):
        find_profiled(str(model), profiled)
    flip_middle(path)
    assert find(str(model)).revision == profiled


@pytest.mark.parametrize(
    "change", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.rename(f"{path}.old")]
)
@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "model-00002-of-"])
def test_a_file_that_goes_is_another_revision(model: Path, name: str, change: Callable[[Path], object]) -> None:
    profiled = find(str(model)).revision
    change(next(model.glob(f"{name}*")))
    assert find(str(model)).revision != profiled


def test_a_file_that_comes_is_another_revision(model: Path) -> None:
    profiled = find(str(model)).revision
    (model / "added_tokens.json").write_text('{"<new>": 9}')
    assert find(str(model)).revision != profiled


def test_two_files_with_each_others_content_are_another_revision(model: Path) -> None:
    profiled = find(str(model)).revision
    first, second = sorted(model.glob("model-0000*"))[:2]
    first.rename(model / "aside")
    second.rename(first)
    (model / "aside").rename(second)
    assert find(str(model)).revision != profiled


def test_what_is_not_read_does_not_count(model: Path) -> None:
    """Weights that the index does not name, notes, and what remoe itself may write there."""
    profiled = find(str(model)).revision
    for name in ("README.md", "notes.txt", "consolidated.safetensors", "pytorch_model.bin", "plan.json", "prompts.jsonl", ".gitattributes"):
        (model / name).write_text("mine")
    assert find(str(model)).revision == profiled
    moved = model.rename(model.with_name("elsewhere"))
    assert find(str(moved)).revision == profiled


def test_a_folder_of_a_configuration_alone_has_a_revision(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    assert find(str(model)).revision.startswith("local:")


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo model in the user's cache, not in that of `remembered`."""
    return demo_model()


def test_a_model_is_read_once_and_quickly(demo: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    begun = time.perf_counter()
    first = find(str(demo)).revision
    read_s = time.perf_counter() - begun
    monkeypatch.setattr(digests, "_sha256", lambda path, count: pytest.fail(f"{path} is read again"))
    begun = time.perf_counter()
    assert find(str(demo)).revision == first
    measured(f"revision of the demo model: {read_s:.2f} s at first, {time.perf_counter() - begun:.4f} s again")


def test_a_profile_of_an_earlier_version_is_refused_in_its_own_words(model: Path) -> None:
    with pytest.raises(ArtifactError, match="is of an earlier version of remoe, which did not read all of the model's files") as raised:
        find_profiled(str(model), "local:76802c6554213632")
    assert raised.value.hint == "Profile and plan again."


def test_a_file_that_cannot_be_read_is_a_models_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, count: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(digests, "_sha256", refuse)
    with pytest.raises(ModelError, match=r"cannot be read: PermissionError: .*Permission denied"):
        _ = find(str(model)).revision


# The hub's cache: files are links to blobs that are named by their digests.


@pytest.fixture
def snapshot(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As huggingface_hub leaves a download."""
    repository = tmp_path / "hub" / "models--owner--name"
    folder = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in original.glob("*.*"):
        content = path.read_bytes()
        large = path.suffix == ".safetensors" or path.name == "tokenizer.json"
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        blob = repository / "blobs" / (hashlib.sha256(content).hexdigest() if large else git)
        blob.write_bytes(content)
        (folder / path.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **more: str(folder))
    return folder


def test_a_hub_model_is_named_by_its_commit(snapshot: Path) -> None:
    found = find_profiled("owner/name", "a" * 40)
    assert (found.name, found.path, found.revision) == ("owner/name", snapshot, "a" * 40)


@pytest.mark.parametrize("name", ["model-00002-of-", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_damage_in_the_hubs_cache_is_found(snapshot: Path, name: str) -> None:
    path = next(snapshot.glob(f"{name}*"))
    flip_middle(path.resolve())
    with pytest.raises(ModelError, match=r"is damaged: it is not the file that the hub has\.") as raised:
        find_profiled("owner/name", "a" * 40)
    assert path.resolve().name in raised.value.hint


def test_a_file_in_the_place_of_the_hubs_is_found(snapshot: Path) -> None:
    content = (snapshot / "tokenizer.json").read_bytes()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not the hub's file: it was put in its place"):
        find_profiled("owner/name", "a" * 40)


def test_a_cache_without_links_has_nothing_to_compare_with(snapshot: Path) -> None:
    for path in list(snapshot.iterdir()):
        path.resolve().replace(path)
    assert find_profiled("owner/name", "a" * 40).revision == "a" * 40


def test_blobs_that_several_repositories_share_are_known_by_the_first_link(snapshot: Path, tmp_path: Path) -> None:
    """huggingface_hub can keep a blob in a store of its own, under another name."""
    blob = (snapshot / "tokenizer.json").resolve()
    blob.rename(tmp_path / ("f" * 64))
    blob.symlink_to(tmp_path / ("f" * 64))
    assert find_profiled("owner/name", "a" * 40).revision == "a" * 40


def test_another_commit_is_another_revision(snapshot: Path) -> None:
    with pytest.raises(ArtifactError, match="has changed since it was profiled"):
        find_profiled("owner/name", "b" * 40)


def test_packaged_files_are_checked_by_their_manifest(model: Path) -> None:
    assert Checkpoint("packaged", model, "local:1").revision == "local:1"
    assert checkpoint.SHARE not in READ


def same_tensors(found: Checkpoint, folder: Path) -> bool:
    """Whether the weights that are read are those that plain transformers reads."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in load(found).state_dict().items())


@pytest.mark.parametrize(
    "beside", ["model.safetensors.index.json", "adapter.safetensors", "consolidated.safetensors", "model.b.safetensors"]
)
def test_one_whole_file_is_read_alone_as_transformers_does(beside: str, original: Path, tmp_path: Path) -> None:
    """Other files beside it are no part of the model: an index of other weights, a second copy, an adapter, damaged ones."""
    alone, folder = tmp_path / "alone", tmp_path / "beside"
    build("mixtral", torch.bfloat16, seed=1).save_pretrained(alone)
    revision = find(str(alone)).revision
    shutil.copytree(alone, folder)
    for path in original.glob("model-0000*" if beside.endswith(".json") else "no-such-file"):
        shutil.copy(path, folder / path.name)
    (folder / beside).write_bytes((original / beside).read_bytes() if beside.endswith(".json") else b"not the weights")
    found = find(str(folder))
    assert found.weight_files == (folder / "model.safetensors",)
    assert same_tensors(found, folder)
    assert found.revision == revision
    flip_middle(folder / "model.safetensors")
    assert found.identify() != revision


@pytest.mark.parametrize(
    ("weights", "index", "read"),
    [
        (("model.safetensors", "consolidated.safetensors"), (), ("model.safetensors",)),
        (("model.safetensors", "a-1.safetensors"), ("a-1.safetensors",), ("model.safetensors",)),
        (
            ("a-1.safetensors", "a-2.safetensors", "consolidated.safetensors"),
            ("a-1.safetensors", "a-2.safetensors"),
            ("a-1.safetensors", "a-2.safetensors"),
        ),
        (("b.safetensors", "c.safetensors", "original/b.safetensors"), (), ("b.safetensors", "c.safetensors")),
    ],
)
def test_the_hub_is_asked_for_the_weights_that_are_read(
    weights: tuple[str, ...], index: tuple[str, ...], read: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library's own filter of names; all is of one commit, also where the repository changes meanwhile."""
    names = ["config.json", "README.md", *weights, *(["model.safetensors.index.json"] if index else [])]
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)

    def download(model: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        assert revision in (None, "abc")
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / name).write_text(json.dumps({"weight_map": dict(enumerate(index))}))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = find("owner/name")
    assert tuple(path.name for path in found.weight_files) == read == tuple(sorted(path.name for path in folder.glob("**/*.safetensors")))
    assert found.revision == "abc"
