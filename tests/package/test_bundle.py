"""The bundle: the same plan gives the same bytes, every byte is checked, and the code in it stands alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel

from remoe_cli import artifacts
from remoe_cli.errors import ArtifactError, ModelError
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.function.weights import ShardFile
from remoe_cli.model import loader, shards
from remoe_cli.model.checkpoint import Checkpoint, find
from remoe_cli.model.experts import expert_layers, run_expert
from remoe_cli.model.spec import read_spec
from remoe_cli.package.bundle import HANDLER, Manifest, build, function_zip, read, unpack_code
from remoe_cli.plan.document import LayerPlan, Source
from remoe_cli.profile.record import ModelRef, Profile
from tests.support.families import save
from tests.support.shards import shard_environment
from tests.support.synthetic import plan_by_hand, synthetic_profile

WHOLE = (LayerPlan(layer=1, remote=(1, 4, 6), memory_mb=256, replicas=2), LayerPlan(layer=2, remote=(), memory_mb=0, replicas=0))
DIVIDED = (
    LayerPlan(layer=1, remote=(0, 1, 4, 6, 7), memory_mb=256, replicas=1, functions=((1, 7), (0, 6), (4,))),
    LayerPlan(layer=2, remote=(2, 5), memory_mb=512, replicas=2),
)


class Inputs:
    """A deepseek_v3 checkpoint, a profile that names it, and a plan of each kind."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "model"
        self.model: PreTrainedModel = save("deepseek_v3", torch.float32, self.checkpoint, fused=False)
        found = find(str(self.checkpoint))
        synthetic = synthetic_profile(folder / "profile")
        record = synthetic.record.model_copy(update={"model": ModelRef(path=found.name, revision=found.revision), "spec": read_spec(found)})
        self.profile = Profile(synthetic.path, record, synthetic.arrays)
        self.plan, self.plan_path = plan_by_hand(WHOLE), folder / "plan.json"
        self.divided, self.divided_path = plan_by_hand(DIVIDED), folder / "divided.json"
        artifacts.write_json(self.plan_path, self.plan)
        artifacts.write_json(self.divided_path, self.divided)

    def build(self, folder: Path) -> Manifest:
        return build(self.plan, self.plan_path, self.profile, folder)

    def profiled_now(self) -> Profile:
        """The profile as of the model's files as they are."""
        model = ModelRef(path=str(self.checkpoint), revision=find(str(self.checkpoint)).revision)
        return Profile(self.profile.path, self.profile.record.model_copy(update={"model": model}), self.profile.arrays)

    def build_divided(self, folder: Path) -> Manifest:
        return build(self.divided, self.divided_path, self.profile, folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def bundle(inputs: Inputs, tmp_path: Path) -> Path:
    inputs.build(tmp_path / "bundle")
    return tmp_path / "bundle"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_two_builds_are_the_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    inputs.build(tmp_path / "one")
    inputs.build(tmp_path / "two")
    one = files(tmp_path / "one")
    assert sorted(one) == ["function.zip", "layer-001.safetensors", "manifest.json"]
    assert one == files(tmp_path / "two")


def test_a_divided_layer_is_one_function_a_part_in_the_same_bytes_each_time(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs.build_divided(tmp_path / "one")
    loaded: list[dict[int, list[int]]] = []

    def load(checkpoint: Checkpoint, keep: dict[int, list[int]]) -> PreTrainedModel:
        loaded.append(keep)
        return loader.load(checkpoint, keep)

    monkeypatch.setattr(shards, "load", load)
    monkeypatch.setattr(shards, "_BATCH_BYTES", 1)
    inputs.build_divided(tmp_path / "two")
    assert loaded == [{1: [1, 7]}, {1: [0, 6]}, {1: [4]}, {2: [2, 5]}]  # a layer that is divided need not fit memory whole
    one = files(tmp_path / "one")
    assert sorted(one) == [
        "function.zip",
        "layer-001-0.safetensors",
        "layer-001-1.safetensors",
        "layer-001-2.safetensors",
        "layer-002.safetensors",
        "manifest.json",
    ]
    assert one == files(tmp_path / "two")


def test_a_bundle_with_divided_layers_is_read_back(inputs: Inputs, tmp_path: Path) -> None:
    inputs.build_divided(tmp_path)
    manifest = read(tmp_path)
    assert [(f.name, f.layer, f.experts, f.memory_mb, f.replicas) for f in manifest.functions] == [
        ("layer-001-0", 1, (1, 7), 256, 1),
        ("layer-001-1", 1, (0, 6), 256, 1),
        ("layer-001-2", 1, (4,), 256, 1),
        ("layer-002", 2, (2, 5), 512, 2),
    ]
    assert manifest.remote == {1: (0, 1, 4, 6, 7), 2: (2, 5)}
    layers = {x.layer: x.parameters() for x in expert_layers(inputs.model)}
    for function in manifest.functions:
        shard = ShardFile(tmp_path / function.shard)
        assert shard.experts == tuple(sorted(function.experts))
        for expert in function.experts:
            held = shard.tensors(expert)
            assert held.keys() == layers[function.layer].keys()
            assert all(np.array_equal(held[name], p[expert].detach().numpy()) for name, p in layers[function.layer].items())


def test_the_manifest_says_what_is_deployed(inputs: Inputs, bundle: Path) -> None:
    manifest = read(bundle)
    assert manifest.plan == Source(path=str(inputs.plan_path), sha256=artifacts.sha256_file(inputs.plan_path))
    assert (manifest.model, manifest.spec) == (inputs.profile.record.model, inputs.profile.record.spec)
    assert manifest.remote == {1: (1, 4, 6)}
    (entry,) = manifest.functions
    assert (entry.name, entry.layer, entry.memory_mb, entry.replicas) == ("layer-001", 1, 256, 2)
    data = (bundle / entry.shard).read_bytes()
    assert (entry.shard_bytes, entry.head_bytes) == (len(data), 8 + int.from_bytes(data[:8], "little"))
    assert (entry.shard_sha256, entry.head_sha256) == (artifacts.sha256_bytes(data), artifacts.sha256_bytes(data[: entry.head_bytes]))


def test_progress_counts_functions(inputs: Inputs, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(inputs.divided, inputs.divided_path, inputs.profile, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("name", ["function.zip", "layer-001.safetensors"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_file_that_is_not_the_one_that_was_built_is_refused(name: str, how: str, bundle: Path) -> None:
    file = bundle / name
    data = file.read_bytes()
    read(bundle)
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name} is missing or is not the file that the manifest names"):
        read(bundle)


def test_a_broken_manifest_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has the schema None"):
        read(bundle)


def test_a_model_that_changed_since_it_was_profiled_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    shutil.copytree(inputs.checkpoint, moved)
    record = inputs.profile.record
    profile = Profile(
        inputs.profile.path,
        record.model_copy(update={"model": record.model.model_copy(update={"path": str(moved)})}),
        inputs.profile.arrays,
    )
    build(inputs.plan, inputs.plan_path, profile, tmp_path / "before")
    config = json.loads((moved / "config.json").read_text()) | {"routed_scaling_factor": 9.0}
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"is at revision local:\w+, the profile is of local:"):
        build(inputs.plan, inputs.plan_path, profile, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    shutil.rmtree(moved)
    with pytest.raises(ModelError, match="There is no folder"):
        build(inputs.plan, inputs.plan_path, profile, tmp_path / "after")


def test_a_broken_chat_template_is_found_before_anything_is_written(inputs: Inputs, tmp_path: Path) -> None:
    template, config = inputs.checkpoint / "chat_template.jinja", inputs.checkpoint / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(config))
    template.write_text("{% for m in messages %}")
    try:
        with pytest.raises(ModelError, match=r"chat template of .* cannot be used"):
            build(inputs.plan, inputs.plan_path, inputs.profiled_now(), tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
        template.write_text("{{ raise_exception('No.') }}")
        build(inputs.plan, inputs.plan_path, inputs.profiled_now(), tmp_path / "bundle")
    finally:
        template.unlink()
        config.unlink()


def test_the_zip_holds_the_functions_sources_and_nothing_else() -> None:
    import remoe_cli.function

    source = Path(remoe_cli.function.__file__).parent
    with zipfile.ZipFile(io.BytesIO(function_zip())) as archive:
        assert archive.namelist() == sorted(f"function/{p.name}" for p in source.iterdir() if p.suffix in (".py", ".so"))
        for info in archive.infolist():
            assert archive.read(info) == (source / info.filename.removeprefix("function/")).read_bytes()
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.external_attr >> 16) & 0o777 == 0o644
    assert function_zip() == function_zip()


_ISOLATED = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
module, _, name = sys.argv[2].rpartition(".")
handle = getattr(importlib.import_module(module), name)
context = type("Context", (), {"get_remaining_time_in_millis": lambda self: 300_000})()
health = handle({"health": True}, context)
answer = handle(bytes.fromhex(sys.stdin.read()), context)
print(json.dumps({"health": health, "answer": answer.hex(), "remoe": [m for m in sys.modules if m.startswith("remoe_cli")]}))
"""


def test_the_code_runs_where_there_is_no_remoe(inputs: Inputs, bundle: Path, tmp_path: Path) -> None:
    """From the unpacked zip and the shard alone, in an isolated interpreter, the handler answers what torch would."""
    code = unpack_code(bundle)
    layer = expert_layers(inputs.model)[0]
    x = torch.randn((5, layer.width), generator=torch.Generator().manual_seed(0))
    frame = pack(Batch("float32", (1, 6), (2, 3), x.numpy()))
    # -I: neither this checkout nor PYTHONPATH; a finder refuses what a function does not have.
    guard = "import sys\nfor name in ('remoe_cli', 'torch', 'transformers', 'boto3', 'pydantic'): sys.modules[name] = None\n"
    run = subprocess.run(
        [sys.executable, "-I", "-c", guard + _ISOLATED, str(code), HANDLER],
        input=frame.hex(),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | shard_environment(bundle / "layer-001.safetensors"),
    )
    result = json.loads(run.stdout)
    assert result["health"]["experts"] == [1, 4, 6]
    assert result["health"]["experts_ready"] == []
    assert result["remoe"] == ["remoe_cli"]  # the guard's own entry
    answer = unpack(from_wire(to_wire(bytes.fromhex(result["answer"]))))
    with torch.no_grad():
        expected = torch.cat([run_expert(layer, 1, x[:2]), run_expert(layer, 6, x[2:])]).numpy()
    assert np.abs(answer.data - expected).max() < 1e-5
