"""`remoe package` into a folder that holds an earlier package, of this version or of one without marks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from remoe_cli import owned
from remoe_cli.artifacts import read_json, write_json
from remoe_cli.cli import package
from remoe_cli.deploy import inputs
from remoe_cli.errors import UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.package import bundle, partial_checkpoint
from remoe_cli.package.partial_checkpoint import MANIFEST, MainManifest
from remoe_cli.plan.document import LayerPlan
from tests.support.by_hand import ByHand, by_hand
from tests.support.trees import tree

# Fewer experts are remote in the second plan, and in the first the main function needs more files.
FIRST = (LayerPlan(layer=0, remote=(0,), memory_mb=1769, replicas=1), LayerPlan(layer=1, remote=(1,), memory_mb=1769, replicas=1))
SECOND = (LayerPlan(layer=0, remote=(0, 1, 2, 3, 4, 5, 6), memory_mb=1769, replicas=1),)

Package = Callable[[tuple[LayerPlan, ...]], None]


@pytest.fixture
def made(tmp_path: Path) -> ByHand:
    return by_hand(tmp_path, FIRST, {"generation_config.json": "{}"})


@pytest.fixture
def packaged(made: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Package a plan of these layers, and local ones, into the folder `out`."""
    monkeypatch.setattr(partial_checkpoint, "_FILE_BYTES", 50_000)

    def command(layers: tuple[LayerPlan, ...]) -> None:
        given = {layer.layer: layer for layer in layers}
        local = [LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in made.profile.record.spec.moe_layers]
        plan = made.plan.model_copy(update={"layers": tuple(given.get(each.layer, each) for each in local)})
        write_json(tmp_path / "plan.json", plan)
        monkeypatch.setattr(inputs, "read_inputs", lambda path: (plan, made.profile, made.catalog))
        package.command(tmp_path / "plan.json", tmp_path / "out", yes=True)

    return command


def check(out: Path, layers: tuple[LayerPlan, ...]) -> None:
    """Everything in the folder is of this plan, and named by one of the manifests."""
    manifest = bundle.read(out / "functions")
    assert {f.layer: f.experts for f in manifest.functions} == {layer.layer: layer.remote for layer in layers}
    assert {path.name for path in (out / "functions").iterdir()} == set(bundle.files(out / "functions"))
    main = read_json(out / "main" / MANIFEST, MainManifest)
    assert {path.name for path in (out / "main").iterdir()} == {MANIFEST, *(file.name for file in main.files)}
    weights = sum(path.stat().st_size for path in (out / "main").glob("*.safetensors"))
    assert weights < 1.01 * sum(file.bytes for file in main.files if file.name.endswith(".safetensors"))
    assert sorted(path.name for path in out.iterdir()) == [owned.MARK, "functions", "main"]


def test_what_the_first_package_had_is_not_in_the_second(packaged: Package, tmp_path: Path) -> None:
    packaged(FIRST)
    check(tmp_path / "out", FIRST)
    before = {path.name for path in (tmp_path / "out" / "main").iterdir()}
    packaged(SECOND)
    check(tmp_path / "out", SECOND)
    assert len({path.name for path in (tmp_path / "out" / "main").iterdir()}) < len(before)
    packaged(SECOND)
    check(tmp_path / "out", SECOND)


def test_a_package_of_a_version_without_marks_is_replaced(packaged: Package, tmp_path: Path) -> None:
    packaged(FIRST)
    (tmp_path / "out" / owned.MARK).unlink()
    packaged(SECOND)
    check(tmp_path / "out", SECOND)
    (tmp_path / "out" / owned.MARK).unlink()
    (tmp_path / "out" / "main" / "notes.txt").write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds files that remoe did not make, such as main/notes\.txt\."):
        packaged(FIRST)
    assert tree(tmp_path / "out") == before


def test_what_fails_leaves_the_first_package(packaged: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged(FIRST)
    before = tree(tmp_path / "out")
    monkeypatch.setattr(partial_checkpoint, "seal", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        packaged(SECOND)
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_files_are_packaged_into_an_empty_folder_only(made: ByHand, tmp_path: Path) -> None:
    """Whoever calls the parts: a left-over file would be sealed into the manifest."""
    for name in ("bundle", "main"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights-0009.safetensors").write_text("left over")
    with pytest.raises(UsageError, match=r"such as weights-0009\.safetensors"):
        bundle.build(made.plan, made.plan_path, made.profile, tmp_path / "bundle")
    found = find(str(tmp_path / "model"))
    with pytest.raises(UsageError, match=r"such as weights-0009\.safetensors"):
        partial_checkpoint.write_partial_checkpoint(found, {}, tmp_path / "main")
