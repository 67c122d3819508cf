"""Quantised checkpoints: dequantised bit for bit as transformers does it, in parts, and refused by name where they are not served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import Array, Tensors, dequantise
from remoe_cli.function.errors import FunctionMemoryError
from remoe_cli.function.expert_ffn import Expert
from remoe_cli.function.ready import ReadyExperts
from remoe_cli.function.weights import ShardFile
from remoe_cli.model import quantised, stored_experts
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.ffn import to_storage
from remoe_cli.model.loader import load
from remoe_cli.model.shards import write_shards
from remoe_cli.model.spec import read_spec
from remoe_cli.package.partial_checkpoint import write_partial_checkpoint
from tests.support.harness import InProcessExperts, serve
from tests.support.quantised import PAIRS, compressed, dequantised, save_quantised

OTHERS = [("qwen3_moe", form) for form in ("int4", "int8", "fp8-channels", "mxfp8")]


class FromShards(InProcessExperts):
    """Answers as functions would that have these shards, in the form in which they compute."""

    def __init__(self, shards: list[tuple[int, ShardFile]], form: str) -> None:
        self._of = {(layer, expert): ReadyExperts(shard, float("inf"), form) for layer, shard in shards for expert in shard.experts}
        self.rows = 0

    def _expert(self, layer: int, expert: int) -> Expert:
        return self._of[layer, expert].get(expert)


def _perplexity(model: PreTrainedModel, text: Tensor) -> float:
    with torch.inference_mode():
        logits = model(text).logits.float()[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten()).exp())


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "form"), PAIRS + OTHERS)
def test_every_weight_is_transformers_bit_for_bit(family: str, form: str, tmp_path: Path) -> None:
    save_quantised(family, form, tmp_path / "model")
    wanted = dequantised(tmp_path / "model", tmp_path / "scratch").state_dict()
    got = load(find(str(tmp_path / "model"))).state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "form"), PAIRS)
def test_a_shard_has_the_checkpoints_bytes_and_gives_transformers_experts(family: str, form: str, tmp_path: Path) -> None:
    """With half of the experts computed from shards, perplexity is within 0.2% of the model's that transformers dequantises."""
    save_quantised(family, form, tmp_path / "model")
    reference = dequantised(tmp_path / "model", tmp_path / "scratch")
    whole = {x.layer: x.parameters() for x in expert_layers(reference)}
    (tmp_path / "shards").mkdir()
    sources = [
        tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in load_file(tmp_path / "model/model.safetensors").values()
    ]
    written = list(write_shards(find(str(tmp_path / "model")), {x: ((1, 4), (6, 7)) for x in whole}, 1, tmp_path / "shards"))
    assert len(written) == 2 * len(whole)
    for file in written:
        shard = ShardFile(file.path)
        for expert in file.experts:
            held = shard.tensors(expert)
            assert held.keys() == whole[file.layer].keys()
            assert all(np.array_equal(held[name], to_storage(p[expert])) for name, p in whole[file.layer].items())
            assert shard.head.expert_bytes(expert) == sum(p[0].numel() * 2 for p in whole[file.layer].values())
        for tensor in load_file(file.path).values():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert any(data in source for source in sources)
        first, last = shard.head.range(file.experts[0])
        assert last - first < shard.head.expert_bytes(file.experts[0]) * 0.6
    checkpoint = find(str(tmp_path / "model"))
    keep = dict.fromkeys(whole, (0, 2, 3, 5))
    part = load(checkpoint, keep)
    away = FromShards([(file.layer, ShardFile(file.path)) for file in written], "packed" if read_spec(checkpoint).is_packed else "ready")
    serve(part, keep, away.send)
    text = torch.randint(2, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    assert _perplexity(part, text) == pytest.approx(_perplexity(reference, text), rel=0.002) and away.rows > 50


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "form"), PAIRS)
def test_a_partial_checkpoint_keeps_the_stored_form(family: str, form: str, tmp_path: Path) -> None:
    save_quantised(family, form, tmp_path / "model")
    whole = find(str(tmp_path / "model"))
    layers = [x.layer for x in expert_layers(load(whole))]
    keep = dict(zip(layers, [(1, 4, 6), ()], strict=False))
    write_partial_checkpoint(whole, keep, tmp_path / "share")
    share = find(str(tmp_path / "share"))
    mine, theirs = load(share, keep).state_dict(), load(whole, keep).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    copied, tensors = ({n: t for f in x.weight_files for n, t in load_file(f).items()} for x in (share, whole))
    # A fused tensor has some of its rows.
    assert all(t.dtype == tensors[n].dtype and (len(t) == 3 if "experts.gate_up" in n else True) for n, t in copied.items() if t.dim())
    assert sum(t.nbytes for t in copied.values()) < 0.9 * sum(t.nbytes for t in tensors.values())


def test_plain_numbers_of_another_type_are_the_models_in_a_function(tmp_path: Path) -> None:
    """Biases in float32 beside quantised matrices: a function that took their bytes for bfloat16 would be wrong without a sign of it."""
    save_quantised("gpt_oss", "mxfp4", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: t.float() if name.endswith("_proj_bias") else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    checkpoint = find(str(tmp_path / "model"))
    whole = {x.layer: x.parameters() for x in expert_layers(load(checkpoint))}
    (written,) = write_shards(checkpoint, {0: ((1, 4),)}, 1, tmp_path)
    shard = ShardFile(written.path)
    for expert in (1, 4):
        assert all(np.array_equal(held, to_storage(whole[0][name][expert])) for name, held in shard.tensors(expert).items())


def test_one_matrix_at_a_time_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packaging reads the experts of a shard one by one, and dequantises one of them."""
    save_quantised("gpt_oss", "mxfp4", tmp_path / "model")
    seen: list[int] = []

    def counted(form: str, tensors: Tensors, dtype: str) -> Array:
        seen.append(out.size if (out := dequantise(form, tensors, dtype)).ndim else 0)
        return out

    for module in (quantised, stored_experts):
        monkeypatch.setattr(module, "dequantise", counted)
    list(write_shards(find(str(tmp_path / "model")), {0: (range(8),)}, 1, tmp_path))
    assert len(seen) <= 2 * 4 and max(seen) == 64 * 64  # four parameters of one expert, by transformers and as the function has them
    seen.clear()
    load(find(str(tmp_path / "model")), {0: (3,), 1: ()})
    assert sorted(seen) == [64 * 32, 64 * 64]


REFUSED = [
    ({"quant_method": "awq", "bits": 4}, "quantised by 'awq'"),
    ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by 'bitsandbytes'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "modelopt with quant_algo 'nvfp4_awq'"),
    (compressed("marlin-24", 4, "int", 128), "compressed-tensors with format 'marlin-24'"),
    (compressed("pack-quantized", 3, "int", 32), "compressed-tensors with 3 bits a weight"),
    (compressed("pack-quantized", 4, "int", 32) | {"transform_config": {"config_groups": {}}}, "with transforms of its weights"),
    ({}, "a method that its configuration does not name"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_formats_that_are_not_served_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_quantised("qwen3_moe", "int4", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    checkpoint = find(str(tmp_path))
    for action in (
        lambda: load(checkpoint),
        lambda: list(write_shards(checkpoint, {0: ((1,),)}, 1, tmp_path / "shards")),
        lambda: write_partial_checkpoint(checkpoint, {}, tmp_path / "share"),
    ):
        with pytest.raises(ModelError, match=f"{message}.*which remoe does not serve") as raised:
            action()
        assert "bfloat16 copy" in str(raised.value.hint)


def test_tensors_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    save_quantised("qwen3_moe", "fp8", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("experts.3.up_proj.weight_scale_inv"))
    tensors[name] = torch.ones(3, 5)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be"):
        load(find(str(tmp_path)))
    tensors[name.replace("scale_inv", "g_idx")] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"reordered or scaled inputs \(.*weight_g_idx\)"):
        load(find(str(tmp_path)))


def test_experts_that_share_a_tensor_are_what_single_ones_are(tmp_path: Path) -> None:
    """FP8 experts of a layer in one tensor, with one tensor of scales."""
    save_quantised("qwen3_moe", "fp8", tmp_path / "single")
    shutil.copytree(tmp_path / "single", tmp_path / "fused")
    tensors = load_file(tmp_path / "single" / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = sorted({name.partition(".experts.")[0] for name in tensors.keys() - fused.keys()})
    for layer in layers:
        for ending, own in (("", ""), ("_scale_inv", "_scale_inv")):
            each = [
                {x: tensors[f"{layer}.experts.{e}.{x}_proj.weight{ending}"].view(torch.uint8) for x in ("gate", "up", "down")}
                for e in range(8)
            ]
            kind = tensors[f"{layer}.experts.0.up_proj.weight{ending}"].dtype
            fused[f"{layer}.experts.gate_up_proj{own}"] = torch.stack([torch.cat([x["gate"], x["up"]]) for x in each]).view(kind)
            fused[f"{layer}.experts.down_proj{own}"] = torch.stack([x["down"] for x in each]).view(kind)
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    single, other = find(str(tmp_path / "single")), find(str(tmp_path / "fused"))
    mine, theirs = load(other, {0: (2, 5)}).state_dict(), load(single, {0: (2, 5)}).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for checkpoint in (single, other):
        (tmp_path / checkpoint.path.name / "shards").mkdir()
    (one,), (two,) = (list(write_shards(x, {0: ((2, 5),)}, 1, x.path / "shards")) for x in (single, other))
    held = [ShardFile(x.path).tensors(5) for x in (one, two)]
    assert all(np.array_equal(held[0][name], held[1][name]) for name in held[0])


def test_what_is_dequantised_has_room_beside_the_ready_experts(tmp_path: Path) -> None:
    save_quantised("qwen3_moe", "fp8", tmp_path / "model")
    (tmp_path / "shards").mkdir()
    (written,) = write_shards(find(str(tmp_path / "model")), {0: (range(8),)}, 1, tmp_path / "shards")
    shard = ShardFile(written.path)
    each = 2 * (3 * 256 * 128)
    assert shard.head.expert_bytes(0) == each
    assert shard.head.dequantised_bytes() == 2 * (2 * 256 * 128) * 3 // 2  # gate and up as one matrix, and one of the two
    ready = ReadyExperts(shard, 3.5 * each + shard.head.dequantised_bytes())
    for expert in range(8):
        ready.get(expert)
    assert ready.ids == (5, 6, 7)
    with pytest.raises(FunctionMemoryError):
        ReadyExperts(shard, each + shard.head.dequantised_bytes() - 1)
