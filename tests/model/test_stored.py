"""Quantised checkpoints: the form in which weights are stored, by the names of each tool, and what the whole model then takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.spec import read_spec
from remoe_cli.model.stored import StoredWeights, bits_per_weight, quantisation, refuse_format
from remoe_cli.plan.cost import expert_functions
from remoe_cli.plan.document import BaselineName
from remoe_cli.plan.verify.check import verify
from remoe_cli.profile.record import Profile
from tests.support.synthetic import plan_of, problem_of, synthetic_profile, tiny_catalog

MB = 2**20
GROUP = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}
NV = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}, "format": "nvfp4-pack-quantized"}
FP8 = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}, "format": "float-quantized"}


@pytest.mark.parametrize(
    ("settings", "name", "bits"),
    [
        ({"quant_method": "mxfp4"}, "MXFP4", 4.25),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "FP8", 8 + 32 / 128**2),
        ({"quant_method": "fp8"}, "FP8", 8 + 32 / 128**2),
        ({"quant_method": "fbgemm_fp8"}, "FP8", 8 + 32 / 128**2),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "NVFP4", 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8", 8 + 32 / 128**2),
        ({"quant_method": "compressed-tensors"} | NV, "NVFP4", 4.5),
        ({"quant_method": "compressed-tensors"} | FP8, "FP8", 8 + 32 / 128**2),
        ({"quant_method": "compressed-tensors"} | GROUP, "INT4", 4 + 20 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "INT4", 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "INT8", 8 + 32 / 128**2),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "INT4", 4 + 20 / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "INT4", 4 + 32 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "INT8", 8 + 32 / 128**2),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "INT4", 4 + 20 / 128),
    ],
)
def test_formats_by_the_names_of_each_tool(settings: dict[str, Any], name: str, bits: float) -> None:
    assert bits_per_weight(settings) == (name, pytest.approx(bits))


def checkpoint(folder: Path, quantization: dict[str, Any] | None, beside: dict[str, Any] | None = None) -> Checkpoint:
    """Two layers of four experts of 3 x 64 x 96 weights, and linear layers of 4 x 64 x 64; 512 tokens in the vocabulary."""
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 777},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "bfloat16"},
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return Checkpoint("tiny", folder, "local:0")


EXPERT, LINEAR, REST = 3 * 64 * 96, 2 * 4 * 64 * 64, 2 * 512 * 64 + 2 * 4 * 64 + 5 * 64  # weights


@pytest.mark.parametrize(
    ("quantization", "beside", "format", "expert_bits", "linear_bits"),
    [
        ({"quant_method": "mxfp4"}, None, "MXFP4", 4.25, 4.25),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, None, "MXFP4", 4.25, 16),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]}, None, "MXFP4", 4.25, 16),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*"]} | GROUP, None, "INT4", 4.625, 16),
        (None, {"producer": {}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*self_attn*"]}}, "NVFP4", 4.5, 16),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, None, "FP8", 8 + 32 / 2048, 8 + 32 / 2048),
    ],
)
def test_what_is_left_out_keeps_its_dtype(
    quantization: Any, beside: Any, format: str, expert_bits: float, linear_bits: float, tmp_path: Path
) -> None:
    spec = read_spec(checkpoint(tmp_path / "tiny", quantization, beside))
    assert spec.stored == StoredWeights(
        format=format,
        expert_bytes=round(EXPERT * expert_bits / 8),
        nonexpert_bytes=round(LINEAR * linear_bits / 8 + REST * 2),
        served=True,
        packed=format != "FP8",
    )
    assert spec.is_packed == (format != "FP8")
    assert spec.expert_bytes == EXPERT * 2 and spec.nonexpert_bytes == (LINEAR + REST) * 2  # what remoe computes with
    assert spec.stored_as is not None and format in spec.stored_as and "dequantised to bfloat16 in memory" in spec.stored_as
    assert ("Expert functions compute from it" if spec.is_packed else f"do not compute from {format}") in spec.stored_as


def of_groups(*groups: dict[str, Any], ignore: Any = ("lm_head",), **more: Any) -> dict[str, Any]:
    """The configuration of compressed-tensors with these groups; what they leave out are the weights of whole numbers of 4 bits."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    whole = {str(number): group | {"weights": weights | group.get("weights", {})} for number, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": whole, "ignore": list(ignore)} | more


ALL, EIGHT, FLOATS = {"targets": ["Linear"]}, {"num_bits": 8, "group_size": 32}, {"num_bits": 8, "type": "float", "group_size": None}
INT4, INT8, ROWS = 4 + 20 / 32, 8 + 24 / 32, 8 + 32 / 128**2
BLOCKS = {"num_bits": 8, "type": "float", "group_size": None, "strategy": "block", "block_structure": [32, 32]}
THIRD = 1 / 3  # of an expert's weights are in down


@pytest.mark.parametrize(
    ("quantization", "format", "expert_bits", "linear_bits", "form"),
    [
        (  # FP8 for attention, integers for experts
            of_groups({"targets": ["re:.*self_attn.*"], "weights": FLOATS}, {"targets": ["re:.*experts.*"]}),
            *("FP8 with experts in INT4", INT4, ROWS, "packed"),
        ),
        (  # a scheme for each layer, by name before class
            of_groups(ALL, {"targets": ["re:model\\.layers\\.0\\..*"], "weights": EIGHT}),
            *("INT8 and INT4", (INT4 + INT8) / 2, (INT4 + INT8) / 2, "packed"),
        ),
        (of_groups({"targets": ["re:.*experts.*"]}), "INT4", INT4, 16, "packed"),
        (of_groups({"targets": ["re:.*self_attn.*"]}, ignore=["re:.*experts.*"]), "INT4 with experts in bfloat16", 16, INT4, "ready"),
        (of_groups(ALL, ignore=["model.layers.0"]), "INT4", (INT4 + 16) / 2, (INT4 + 16) / 2, "ready"),
        (of_groups(ALL, ignore=["re:.*experts.*w2"]), "INT4", INT4 * (1 - THIRD) + 16 * THIRD, INT4, "ready"),
        (of_groups(ALL, ignore=[f"model.layers.{x}.block_sparse_moe.experts.{e}.w1" for x in (0, 1) for e in range(4)]), "INT4",
         INT4 * THIRD + 16 * (1 - THIRD), INT4, "ready"),
        (of_groups({"targets": ["Linear"], "weights": BLOCKS}, format="float-quantized"), "FP8", 8 + 32 / 1024, 8 + 32 / 1024, "either"),
        (of_groups({"targets": ["Linear"], "weights": BLOCKS | {"block_structure": [128, 128]}}, format="float-quantized"),
         "FP8", 8 + 32 / 128**2, 8 + 32 / 128**2, "ready"),  # blocks that an expert of 64 x 96 does not fill
        ({"quant_method": "fp8", "ignored_layers": "self_attn"}, "FP8", ROWS, 16, "either"),
        ({"quant_method": "mxfp8"}, "MXFP8", 8.25, 8.25, "ready"),
    ],
)  # fmt: skip
def test_each_module_has_the_scheme_that_names_it(
    quantization: dict[str, Any], format: str, expert_bits: float, linear_bits: float, form: str, tmp_path: Path
) -> None:
    spec = read_spec(checkpoint(tmp_path / "tiny", quantization))
    assert spec.stored == StoredWeights(
        format=format,
        expert_bytes=round(EXPERT * expert_bits / 8),
        nonexpert_bytes=round(LINEAR * linear_bits / 8 + REST * 2),
        served=True,
        packed=form == "packed",
        either=form == "either",
    )
    assert (spec.stored_as or "").count(".") >= 2 and ("not quantised" in str(spec.stored_as)) == (expert_bits == 16)


@pytest.mark.parametrize(
    ("settings", "format", "method"),
    [
        (
            {"quantization_config": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}},
            "INT4",
            "hqq",
        ),
        (
            {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}},
            "INT4",
            "torchao",
        ),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}, "INT8", "torchao"),
        ({"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}}, "FP8", "quark"),
        ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, "INT8", "quanto"),
        ({"compression_config": {"quant_method": "gptq", "bits": 4}}, "INT4", "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "INT4", "mlx"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "INT4", "mlx"),
        ({"quantization_config": {"quant_method": "exl3", "bits": 3.5}}, "INT3.5", "exl3"),
    ],
)
def test_what_is_not_served_is_known_by_its_tool(settings: dict[str, Any], format: str, method: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "tiny", None)
    (made.path / "config.json").write_text(json.dumps(json.loads((made.path / "config.json").read_text()) | settings))
    spec = read_spec(made)
    assert spec.stored is not None and (spec.stored.format, spec.stored.served) == (format, False)
    found = quantisation(made.path)
    assert found is not None
    with pytest.raises(ModelError, match=f"quantised by '{method}', which remoe does not serve"):
        refuse_format(found)


@pytest.mark.parametrize("value", ["fp8", [1], False, 7])
def test_a_quantisation_without_settings_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sets 'quantization_config' to .*, which says nothing of how its weights are quantised"):
        read_spec(checkpoint(tmp_path / "tiny", value))


def test_each_group_is_of_bits_that_are_served() -> None:
    for bits in (4, "8"):
        refuse_format(of_groups({"targets": ["Linear"], "weights": {"num_bits": bits}}))
    with pytest.raises(ModelError, match="compressed-tensors with no number of bits a weight, which"):
        refuse_format(of_groups({"targets": ["Linear"], "weights": {"num_bits": None}}))
    with pytest.raises(ModelError, match="compressed-tensors with 3 bits a weight"):
        refuse_format(of_groups({"targets": ["re:.*self_attn.*"]}, {"targets": ["Linear"], "weights": {"num_bits": 3}}))


def test_only_matrices_that_can_be_multiplied_as_they_are_stored_are_packed(tmp_path: Path) -> None:
    """In bfloat16, with whole groups of 32 weights, and with no expert that the format leaves out."""
    made = checkpoint(tmp_path / "tiny", {"quant_method": "mxfp4"})
    config = json.loads((made.path / "config.json").read_text())
    for change in (
        {},
        {"dtype": "float16"},
        {"intermediate_size": 80},
        {"quantization_config": {"quant_method": "mxfp4", "ignore": ["*"]}},
    ):
        (made.path / "config.json").write_text(json.dumps(config | change))
        spec = read_spec(made)
        assert spec.is_packed == (not change) and (spec.stored is None or spec.stored.packed == (not change))
        assert ("packed" in spec.model_dump()["stored"]) == (not change)


@pytest.mark.parametrize(
    ("weights", "packed"),
    [
        ({"num_bits": 4, "symmetric": True, "group_size": 128}, True),
        ({"num_bits": 8, "symmetric": True, "strategy": "channel", "group_size": None}, True),
        ({"num_bits": 4, "symmetric": False, "group_size": 32}, False),
        ({"num_bits": 4, "symmetric": True, "group_size": 48}, False),
    ],
)
def test_integers_are_packed_without_zero_points_in_whole_groups(weights: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int"} | weights}}}
    spec = read_spec(checkpoint(tmp_path / "tiny", {"quant_method": "compressed-tensors", "format": "pack-quantized"} | groups))
    assert spec.is_served_quantised and spec.is_packed == packed
    assert spec.dequantised_beside_bytes == (0 if packed else spec.expert_bytes)


def test_a_format_that_is_not_served_is_planned_as_its_copy(tmp_path: Path) -> None:
    spec = read_spec(checkpoint(tmp_path / "tiny", {"quant_method": "awq", "bits": 4, "group_size": 64}))
    assert spec.stored is not None and not spec.stored.served and "served" not in spec.stored.model_dump()
    assert spec.read_bytes == spec.nonexpert_bytes + spec.routed_bytes and "bfloat16 copy" in str(spec.stored_as)


def test_a_checkpoint_that_is_not_quantised(tmp_path: Path) -> None:
    spec = read_spec(checkpoint(tmp_path / "tiny", None))
    assert spec.stored is None and spec.stored_as is None and spec.context_tokens == 777


def quantised(profile: Profile, stored: StoredWeights | None) -> Profile:
    spec = profile.record.spec.model_copy(update={"stored": stored})
    return replace(profile, record=profile.record.model_copy(update={"spec": spec}))


def test_the_whole_model_is_priced_as_it_is_stored(tmp_path: Path) -> None:
    """40 GB in bfloat16 fit one GPU of the catalog, a quarter of it fits the cheapest; that decides the verdict."""
    made = synthetic_profile(tmp_path, layers=10, experts=8, skew=1.0, expert_mb=500, nonexpert_mb=500, decode_tokens=15)
    stored = StoredWeights(format="MXFP4", expert_bytes=125 * MB, nonexpert_bytes=500 * MB)
    catalog = tiny_catalog({"menu": [{"name": "big", "memory_mb": 60_000, "vcpus": 4.0}]})
    plain, packed = (plan_of(quantised(made, form), catalog, requests_per_hour=20.0) for form in (None, stored))
    assert BaselineName.STORED_GPU not in plain.baselines | plain.missing and plain.baselines[BaselineName.GPU].spec == "g6e.xlarge"
    assert packed.baselines[BaselineName.STORED_GPU].spec == "g4dn.xlarge"
    assert BaselineName.STORED_CPU in packed.baselines and BaselineName.STORED_CPU not in plain.baselines
    slower = synthetic_profile(tmp_path / "s", layers=10, experts=8, skew=1.0, expert_mb=250, nonexpert_mb=500, decode_tokens=15)
    whole = plan_of(slower, catalog, requests_per_hour=20.0).baselines[
        BaselineName.GPU
    ]  # twice as large experts as the packed ones, on the same GPU
    assert whole.spec == "g5.xlarge" and packed.baselines[BaselineName.STORED_GPU].cost_usd_per_request < whole.cost_usd_per_request
    assert packed.baselines[BaselineName.GPU] == plain.baselines[BaselineName.GPU]
    assert verify(packed, quantised(made, stored), catalog) == ()
    assert any("stored in MXFP4, 11 GB" in note and "bfloat16 copy of 42.5 GB" in note for note in packed.notes)
    for name in (BaselineName.STORED_GPU, BaselineName.STORED_CPU):
        off = packed.baselines[name].model_copy(update={"tpot_s": packed.baselines[name].tpot_s * 1.001})
        altered = packed.model_copy(update={"baselines": packed.baselines | {name: off}})
        assert f"baselines.{name}.tpot_s" in {f.field for f in verify(altered, quantised(made, stored), catalog)}
    assert verify(packed.model_copy(update={"baselines": plain.baselines}), quantised(made, stored), catalog) != ()


def test_what_is_served_quantised_is_read_quantised_and_held_dequantised(tmp_path: Path) -> None:
    """Cold starts, /tmp and storage are of the stored bytes, memory is of the others and of one more expert; the verifier knows both."""
    made = synthetic_profile(tmp_path, layers=10, experts=8, skew=1.0, expert_mb=500, nonexpert_mb=500, decode_tokens=15)
    copied = StoredWeights(format="MXFP4", expert_bytes=125 * MB, nonexpert_bytes=500 * MB)
    served = copied.model_copy(update={"served": True})
    catalog = tiny_catalog({"menu": [{"name": "big", "memory_mb": 60_000, "vcpus": 4.0}]})
    profiles = {form: quantised(made, form) for form in (copied, served)}
    problems = {form: problem_of(profile, catalog) for form, profile in profiles.items()}
    read = {form: expert_functions.cold_s(problem, [4]) - expert_functions.cold_s(problem, [0]) for form, problem in problems.items()}
    assert read[served] == pytest.approx(read[copied] / 4)
    memory = {form: expert_functions.function_memory_bytes(problem, [4], [0]) for form, problem in problems.items()}
    assert memory[served] == memory[copied] + 500 * MB
    plans = {form: plan_of(profile, catalog, requests_per_hour=20.0) for form, profile in profiles.items()}
    for form, plan in plans.items():
        assert verify(plan, profiles[form], catalog) == ()
        assert verify(plan, profiles[served if form is copied else copied], catalog) != ()
    assert plans[served].model.expert_form == "ready" and "packed" not in plans[served].model.model_dump()
    assert plans[served].model.read_expert_bytes == 125 * MB and "read_expert_bytes" not in plans[copied].model.model_dump()


def test_the_verifier_wants_room_for_the_expert_that_is_being_dequantised(tmp_path: Path) -> None:
    """Four experts of 80 MB fit 512 MB, and five do not."""
    made = synthetic_profile(tmp_path, layers=2, experts=8, expert_mb=80, nonexpert_mb=50)
    copied = StoredWeights(format="MXFP4", expert_bytes=20 * MB, nonexpert_bytes=50 * MB)
    catalog = tiny_catalog()
    plain = plan_of(quantised(made, copied), catalog, remote_share=0.5)
    assert max(len(part) for layer in plain.layers for part in layer.parts) == 4
    assert verify(plain, quantised(made, copied), catalog) == ()
    read = plain.model.model_copy(update={"read_expert_bytes": 20 * MB, "read_nonexpert_bytes": 50 * MB})
    profile = quantised(made, copied.model_copy(update={"served": True}))
    found = {finding.field for finding in verify(plain.model_copy(update={"model": read}), profile, catalog)}
    assert {"layers[0].memory_mb", "layers[1].memory_mb"} <= found


def test_a_packed_function_is_planned_with_its_stored_bytes(tmp_path: Path) -> None:
    """A quarter of the memory, and no room for an expert that is being dequantised; the verifier knows both."""
    made = synthetic_profile(tmp_path, layers=2, experts=8, expert_mb=80, nonexpert_mb=50)
    ready = StoredWeights(format="MXFP4", expert_bytes=20 * MB, nonexpert_bytes=50 * MB, served=True)
    catalog = tiny_catalog()
    profiles = {"ready": quantised(made, ready), "packed": quantised(made, ready.model_copy(update={"packed": True}))}
    memory = {form: expert_functions.function_memory_bytes(problem_of(x, catalog), [0, 4], [0, 0]) for form, x in profiles.items()}
    side = catalog.function
    held = {form: (bytes - side.runtime_memory_mb * MB).tolist() for form, bytes in memory.items()}
    assert held == {"packed": [0, 80 * MB * side.expert_memory_factor], "ready": [80 * MB, 80 * MB + 320 * MB * side.expert_memory_factor]}
    plans = {form: plan_of(profile, catalog, remote_share=0.5) for form, profile in profiles.items()}
    for form, plan in plans.items():
        assert plan.model.expert_form == form and verify(plan, profiles[form], catalog) == ()
        other = profiles["ready" if form == "packed" else "packed"]
        assert "model.packed" in {finding.field for finding in verify(plan, other, catalog)}
    assert max(len(part) for layer in plans["packed"].layers for part in layer.parts) == 4  # one function, where ready experts need more
    assert max(len(part) for layer in plans["ready"].layers for part in layer.parts) < 4
    small = [layer.model_copy(update={"memory_mb": min(layer.memory_mb, 128)}) for layer in plans["packed"].layers]
    found = verify(plans["packed"].model_copy(update={"layers": tuple(small)}), profiles["packed"], catalog)
    assert "layers[0].memory_mb" in {finding.field for finding in found}
