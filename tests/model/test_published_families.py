"""What is special in published checkpoints: pictures beside text, scaled inputs, compressed caches, other names, newer versions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

from remoe_cli.errors import ModelError
from remoe_cli.function.weights import ShardFile
from remoe_cli.model.checkpoint import find, reason
from remoe_cli.model.experts import attach, expert_layers
from remoe_cli.model.ffn import to_storage
from remoe_cli.model.loader import load, load_gpu_experts, skeleton
from remoe_cli.model.shards import write_shards
from remoe_cli.model.spec import read_spec
from remoe_cli.package.partial_checkpoint import write_partial_checkpoint
from remoe_cli.profile.routing import RoutingRecorder
from tests.support.batching import Asked, engine_around, together
from tests.support.families import drawn, save, scale
from tests.support.harness import InProcessExperts, greedy, logits, serve

TEXT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
    **{"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "sliding_window": 8, "max_position_embeddings": 512},
    **{"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
    **{"num_kv_shared_layers": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size_per_layer_input": 128},
}
PICTURES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
V4: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 1, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16},
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hash_layers": 1, "sliding_window": 8, "compress_ratios": [0, 4, 128, 4]},
    **{"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "max_position_embeddings": 1024, "dtype": "bfloat16"},
}


def written(folder: Path, **settings: Any) -> Path:
    """A folder whose config.json has these settings beside those that it has."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    return folder


def test_a_model_that_also_takes_pictures_is_sized_and_answers_to_text(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma4"](text_config=TEXT, vision_config=PICTURES | {"head_dim": 16, "global_head_dim": 16}, audio_config=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    spec = read_spec(find(str(tmp_path)))
    assert (spec.family, spec.top_k, spec.experts_per_layer, spec.moe_layers) == ("gemma4", 2, 8, (0, 1))
    assert [(layer.bytes_per_token, layer.window) for layer in spec.kv_layers] == [(128, 7), (128, None)]
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    keep = {x.layer: (0, 2, 4) for x in expert_layers(whole)}
    part = load(find(str(tmp_path)), keep)
    serve(part, keep, InProcessExperts(whole).send)
    assert torch.equal(logits(part).argmax(-1), logits(whole).argmax(-1)) and torch.equal(greedy(part), greedy(whole))


_TEXT: dict[str, Any] = {
    **{"vocab_size": 160, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "num_experts_per_tok": 2},
    **{"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_PATCHES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}
_QWEN = _PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_LLAMA: dict[str, Any] = {
    **{"intermediate_size_mlp": 96, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "num_hidden_layers": 4},
    **{"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"] * 2},
}
# Families of pictures and text: the settings of both, and the layers with experts.
ALSO_PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "glm4v_moe": ({"rope_parameters": _ROPE}, _PATCHES | {"image_size": 32}, (1, 2)),
    "kimi_k25": (
        {"model_type": "deepseek_v3", "num_key_value_heads": 4, **_LATENT},
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4},
        (1, 2),
    ),
    "llama4": (
        _LLAMA,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        (1, 3),
    ),
    "qwen3_5_moe": (
        {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "shared_expert_intermediate_size": 32, **_LINEAR}
        | {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
        _QWEN,
        (0, 1),
    ),
    "step3p7": (
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limits": [None, 0.25, None], "share_expert_dim": 32}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16},
        (1, 2),
    ),
    "qwen3_vl_moe": ({"rope_parameters": _ROPE}, _QWEN, (0, 1, 2)),
}


def also_pictures(family: str, folder: Path) -> PreTrainedModel:
    """Save a tiny checkpoint of a family of pictures and text, and return its model, which is transformers' own."""
    text, pictures, _ = ALSO_PICTURES[family]
    config = CONFIG_MAPPING[family](text_config=_TEXT | text, vision_config=pictures)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in drawn(model):
            parameter.copy_(torch.randn(parameter.shape) * scale(name, parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.sweep
@pytest.mark.parametrize("family", ALSO_PICTURES)
def test_the_text_of_a_family_of_pictures_is_served(family: str, tmp_path: Path) -> None:
    """With half of the experts remote, alone and in a batch; Llama 4's chunks of attention are shorter than the prompts."""
    whole, checkpoint, moe_layers = also_pictures(family, tmp_path), find(str(tmp_path)), ALSO_PICTURES[family][2]
    spec = read_spec(checkpoint)
    assert (spec.family, spec.experts_per_layer, spec.moe_layers) == (family, 8, moe_layers)
    assert spec.top_k == (1 if family == "llama4" else 2) and spec.expert_bytes == 3 * 64 * 32 * 2
    wanted, tokens = logits(whole), greedy(whole)
    keep = dict.fromkeys(moe_layers, (0, 2, 4, 7))
    part = load(checkpoint, keep)
    serve(part, keep, (away := InProcessExperts(load(checkpoint))).send)
    assert torch.equal(logits(part), wanted) and torch.equal(greedy(part), tokens) and away.rows
    assert len(set(tokens[:, 20:].flatten().tolist())) > 4
    assert len(list(write_shards(checkpoint, {moe_layers[0]: ((1, 3),)}, 1, tmp_path))) == 1  # which compares the function's numbers
    everything = load(checkpoint)
    attach(everything, recorder := RoutingRecorder())  # profiling
    assert torch.equal(logits(everything), wanted)
    assert {layer: seen[0].shape for layer, seen in recorder.seen.items()} == dict.fromkeys(moe_layers, (40, spec.top_k))
    engine = engine_around(everything)
    prompts = [row[:length].tolist() for row, length in zip(tokens, (20, 13), strict=True)]
    alone = [list(engine.generate(prompt, 6).token_ids) for prompt in prompts]
    assert alone[0] == tokens[0, 20:26].tolist()
    made = together(engine, [Asked(2 * n, prompt, 6) for n, prompt in enumerate(prompts)])
    assert [list(each.stream.ids) for each in made] == alone


LONGCAT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "num_layers": 2, "moe_topk": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "zero_expert_num": 4, "head_dim": 16, **_LATENT},
    **{"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}


@pytest.mark.parametrize("layout", ["own names", "as transformers saves it", "as published"])
def test_experts_without_weights_are_added_by_the_main_function(layout: str, tmp_path: Path) -> None:
    """Of LongCat-Flash; published checkpoints have nothing of them, and those of transformers have gates that nobody uses."""
    torch.manual_seed(0)
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING["longcat_flash"](**LONGCAT), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in drawn(whole):
            parameter.copy_(torch.randn(parameter.shape) * scale(name, parameter))
    whole.eval().save_pretrained(tmp_path, save_original_format=layout != "own names")
    if layout == "as published":
        file = tmp_path / "model.safetensors"
        kept = {k: t for k, t in load_file(file).items() if not re.search(r"experts\.(8|9|1\d)\.", k)}
        save_file(kept, file, {"format": "pt"})
    chosen: list[torch.Tensor] = []
    for module in whole.modules():
        if isinstance(module, LongcatFlashTopkRouter):
            module.register_forward_hook(lambda _m, _a, out: chosen.append(out[2]))
    wanted, tokens = logits(whole), greedy(whole)
    assert any((index >= 8).any() and (index < 8).any() for index in chosen)
    checkpoint = find(str(tmp_path))
    spec = read_spec(checkpoint)
    assert (spec.experts_per_layer, spec.top_k, spec.moe_layers, spec.expert_bytes) == (8, 3, (0, 1), 3 * 64 * 32 * 2)
    keep = dict.fromkeys((0, 1), (0, 2, 4, 7))
    part = load(checkpoint, keep)
    serve(part, keep, (away := InProcessExperts(load(checkpoint))).send)
    assert torch.equal(logits(part), wanted) and torch.equal(greedy(part), tokens) and away.rows
    if layout == "as published":
        assert len(list(write_shards(checkpoint, {0: ((1, 3),)}, 1, tmp_path))) == 1  # which compares the function's numbers
        everything = load(checkpoint)
        attach(everything, recorder := RoutingRecorder())  # profiling
        assert torch.equal(logits(everything), wanted)
        assert {layer: seen[0].shape for layer, seen in recorder.seen.items()} == dict.fromkeys((0, 1), (40, 3))


# Families whose modules have their experts in another layout; each checkpoint has a tensor with all experts of a layer.
OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 512, "eos_token_id": None}
    | {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 3}}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "jetmoe": {"hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 32}
    | {"num_local_experts": 8, "num_experts_per_tok": 3, "vocab_size": 128, "max_position_embeddings": 512, "eos_token_id": None},
}


def other_layout(family: str, folder: Path) -> PreTrainedModel:
    """Save a tiny checkpoint of such a family, and return its model, which is transformers' own."""
    torch.manual_seed(0)
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OTHER_LAYOUTS[family]), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in drawn(whole):
            parameter.copy_(torch.randn(parameter.shape) * scale(name, parameter))
    whole.eval().save_pretrained(folder)
    return whole


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_experts_in_another_layout_are_served(family: str, tmp_path: Path) -> None:
    """With half of them remote, from the whole checkpoint and from a partial one, alone and in a batch."""
    whole, checkpoint = other_layout(family, tmp_path / "model"), find(str(tmp_path / "model"))
    wanted, tokens = logits(whole), greedy(whole)
    assert len(set(tokens[:, 20:].flatten().tolist())) > 4
    spec = read_spec(checkpoint)
    assert (spec.family, spec.experts_per_layer, spec.top_k, spec.moe_layers) == (family, 8, 3, (0, 1))
    assert spec.expert_bytes == 3 * 64 * 32 * 2 and spec.nonexpert_bytes + spec.routed_bytes == 2 * whole.num_parameters()
    keep = dict.fromkeys((0, 1), (0, 2, 4, 7))
    write_partial_checkpoint(checkpoint, keep, tmp_path / "share")
    for held in (checkpoint, find(str(tmp_path / "share"))):
        part = load(held, keep)
        serve(part, keep, (away := InProcessExperts(load(checkpoint))).send)
        assert torch.equal(logits(part), wanted) and torch.equal(greedy(part), tokens) and away.rows
    (written,) = write_shards(checkpoint, {0: ((1, 3),)}, 1, tmp_path)  # which compares the function's numbers
    everything = load(checkpoint)
    assert torch.equal(logits(everything), wanted)  # by the adapter's own loop, without a hook
    weights = {x.layer: x.parameters() for x in expert_layers(everything)}
    held_there = ShardFile(written.path).tensors(3)
    assert held_there.keys() == {"gate_up_proj", "down_proj"}
    assert all(np.array_equal(held_there[name], to_storage(parameter[3])) for name, parameter in weights[0].items())
    on_device = load_gpu_experts(checkpoint, everything, {1: (2, 5)}, "cpu")[1]
    assert on_device.ids == (2, 5)
    assert all(torch.equal(on_device.module._parameters[name], parameter[[2, 5]]) for name, parameter in weights[1].items())
    attach(everything, recorder := RoutingRecorder())  # profiling
    assert torch.equal(logits(everything), wanted)
    assert {layer: seen[0].shape for layer, seen in recorder.seen.items()} == dict.fromkeys((0, 1), (40, 3))
    engine = engine_around(everything)
    prompts = [row[:length].tolist() for row, length in zip(tokens, (20, 13), strict=True)]
    alone = [list(engine.generate(prompt, 6).token_ids) for prompt in prompts]
    assert alone[0] == tokens[0, 20:26].tolist()
    made = together(engine, [Asked(2 * n, prompt, 6) for n, prompt in enumerate(prompts)])
    assert [list(each.stream.ids) for each in made] == alone


def test_a_matrix_of_all_experts_has_a_whole_number_of_them(tmp_path: Path) -> None:
    other_layout("dbrx", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.blocks.0.ffn.experts.mlp.v1"
    for change in (tensors[name][:-1].contiguous(), tensors[name].to(torch.float8_e4m3fn)):
        save_file(tensors | {name: change}, file, {"format": "pt"})
        with pytest.raises(ModelError, match=f"{name} of the checkpoint is .*32 rows for each expert"):
            load(find(str(tmp_path)))


def test_a_layer_with_two_sets_of_experts_is_refused(tmp_path: Path) -> None:
    text = {key: value for key, value in _TEXT.items() if "expert" not in key} | {"moe_intermediate_size": [32, 32], "moe_k": 2}
    text |= {"moe_num_experts": 8, "mlp_layer_types": ["dense", "sparse", "sparse"], "head_dim": 128}
    written(tmp_path, model_type="ernie4_5_vl_moe", text_config=text, vision_config=_PATCHES)
    with pytest.raises(ModelError, match="family 'ernie4_5_vl_moe': a layer of it has several sets of experts"):
        read_spec(find(str(tmp_path)))


def test_llama_4_with_several_experts_a_token_is_refused(tmp_path: Path) -> None:
    """Its adapter sends the row of a token to one expert."""
    settings = _TEXT | _LLAMA | {"num_experts_per_tok": 2}
    with pytest.raises(ModelError, match="cannot serve the family 'llama4_text'"):
        read_spec(find(str(written(tmp_path, model_type="llama4_text", **settings))))


def test_a_compressed_cache_grows_beside_its_window(tmp_path: Path) -> None:
    spec = read_spec(find(str(written(tmp_path, model_type="deepseek_v4", **V4))))
    # Layers that compress have one tensor for keys and values: 64 bytes, and entries of 32 (and 16 of the indexer) for 4 or 128 tokens.
    assert [(x.bytes_per_token, x.window, x.compressed_bytes_per_token) for x in spec.kv_layers] == [
        (128, 7, 0),
        (64, 7, (32 + 16) * 2 / 4),
        (64, 7, 32 * 2 / 128),
        (64, 7, (32 + 16) * 2 / 4),
    ]
    model = skeleton(CONFIG_MAPPING["deepseek_v4"](**V4))
    with torch.no_grad():
        cache = model(input_ids=torch.zeros((1, 256), dtype=torch.long, device="meta"), use_cache=True).past_key_values
    kept = {id(t): t for x in cache.layers for t in (x.keys, x.values, *getattr(x, "compressed_kv", {}).values())}
    assert spec.kv_cache_bytes(256) == sum(t.numel() * t.element_size() for t in kept.values())
    plain = spec.kv_layers[0].model_dump()
    assert "compressed_bytes_per_token" not in plain


def test_a_family_under_another_name_is_the_one_that_it_is(tmp_path: Path) -> None:
    save("deepseek_v3", torch.bfloat16, tmp_path / "model", fused=False)
    plain, theirs = read_spec(find(str(tmp_path / "model"))), load(find(str(tmp_path / "model"))).state_dict()
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (tmp_path / "model" / "configuration_deepseek.py").write_text("raise SystemExit('the code of the model ran')")
    named = find(str(written(tmp_path / "model", model_type="kimi_k2", auto_map=code)))
    assert read_spec(named) == plain
    mine = load(named).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_family_of_a_newer_version_is_refused_with_that_version(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"of the family 'next_moe', which transformers 5\.\d+\.\d+ does not have\.$") as refused:
        read_spec(find(str(written(tmp_path, model_type="next_moe", transformers_version="99.1.0"))))
    assert "written by transformers 99.1.0, which knows it" in str(refused.value.hint)
    with pytest.raises(ModelError, match="does not have") as refused:
        read_spec(find(str(written(tmp_path, transformers_version="4.0.0"))))
    with pytest.raises(ModelError, match="does not have") as refused:
        read_spec(find(str(written(tmp_path, transformers_version="9" * 8000))))
    assert refused.value.hint == "Use a model whose family transformers has."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Short.", "ValueError: Short."),
        ("The first sentence. " + "word " * 60, "ValueError: The first sentence"),
        ("word " * 60, "ValueError: " + "word " * 45 + "..."),
    ],
)
def test_a_reason_ends_with_a_sentence_or_a_word(text: str, shown: str) -> None:
    assert reason(ValueError(text)) == shown and len(shown) <= 244
