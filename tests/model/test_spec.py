"""read_spec sees only config.json; here it is held against models that really exist and really run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import attach, expert_layers, run_experts
from remoe_cli.model.loader import expert_bytes_held, load
from remoe_cli.model.spec import MoeSpec, read_spec
from tests.support.families import FAMILIES, build, save

_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}


def spec_of(folder: Path, config: dict[str, Any]) -> MoeSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(find(str(folder)))


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads(FAMILIES[name]().to_json_string(use_diff=False)) | changes  # type: ignore[no-any-return]


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of keys and values that are really cached after a prompt and one decoded token, `tokens` together."""
    ids = torch.arange(tokens)[None] % 100 + 1
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    kept = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    return sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_alone_tells_what_the_loaded_model_holds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(family, dtype, tmp_path / "whole", fused=False)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    spec = read_spec(find(str(tmp_path / "bare")))
    model = load(find(str(tmp_path / "whole")))

    seen: dict[int, tuple[int, int]] = {}
    rows = {e: e for e in range(8)}

    def see(layer: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen[layer.layer] = index.shape[1], hidden.shape[1] * hidden.element_size()
        return run_experts(layer, hidden, index, weights, rows, lambda *_: dict)

    attach(model, see)
    measured = {tokens: cache_bytes(model, tokens) for tokens in (2, 7, 8, 9, 20)}

    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    assert spec.family == family
    assert spec.dtype == str(dtype).removeprefix("torch.")
    assert spec.hidden_layers == model.config.num_hidden_layers
    assert spec.moe_layers == tuple(x.layer for x in expert_layers(model)) == tuple(seen)
    assert spec.routed_bytes == expert_bytes_held(model)
    assert spec.expert_bytes == sum(p[0].numel() * p.element_size() for p in expert_layers(model)[0].parameters().values())
    assert spec.nonexpert_bytes == everything - expert_bytes_held(model)
    assert spec.experts_per_layer == 8
    assert set(seen.values()) == {(spec.top_k, spec.hidden_state_bytes)}
    assert {tokens: spec.kv_cache_bytes(tokens) for tokens in measured} == measured


def test_a_sliding_layer_keeps_one_token_less_than_its_window(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, config_of("gpt_oss", dtype="float32"))
    assert [layer.window for layer in spec.kv_layers] == [7, None]
    one = spec.kv_layers[0].bytes_per_token
    assert spec.kv_cache_bytes(100) == 107 * one


def test_a_window_without_layer_types_slides_in_every_layer(tmp_path: Path) -> None:
    config = config_of("mixtral", sliding_window=8, dtype="float32")
    spec = spec_of(tmp_path, config)
    model = build("mixtral")
    model.config.sliding_window = 8
    assert [layer.window for layer in spec.kv_layers] == [7, 7]
    assert spec.kv_cache_bytes(20) == cache_bytes(model, 20)


def test_layers_with_a_state_keep_no_kv_cache(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, config_of("jamba", dtype="float32"))
    assert (spec.hidden_layers, len(spec.kv_layers)) == (4, 2)


def test_latent_attention_caches_the_latent(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, config_of("deepseek_v3", dtype="bfloat16"))
    assert {layer.bytes_per_token for layer in spec.kv_layers} == {2 * (32 + 16)}


def test_a_latent_expert_width_is_what_travels(tmp_path: Path) -> None:
    """nemotron_h may project hidden states into a smaller space before its experts."""
    spec = spec_of(tmp_path, config_of("nemotron_h", moe_latent_size=24, dtype="bfloat16"))
    assert (spec.hidden_size, spec.hidden_state_bytes) == (64, 48)


def test_local_experts_are_the_complement() -> None:
    spec = MoeSpec(
        family="x",
        dtype="float32",
        hidden_size=4,
        hidden_layers=3,
        moe_layers=(1, 2),
        experts_per_layer=4,
        top_k=1,
        expert_bytes=1,
        nonexpert_bytes=1,
        hidden_state_bytes=16,
        kv_layers=(),
    )
    assert spec.local_experts({1: (0, 2)}) == {1: (1, 3), 2: (0, 1, 2, 3)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_config_without_dtype_takes_that_of_its_weights(dtype: str, tmp_path: Path) -> None:
    save("mixtral", getattr(torch, dtype), tmp_path, fused=False)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    assert spec_of(tmp_path, config).dtype == dtype
    assert load(find(str(tmp_path))).dtype == getattr(torch, dtype)


def test_a_config_without_dtype_or_weights_is_bfloat16(tmp_path: Path) -> None:
    config = config_of("mixtral")
    config.pop("dtype", None)
    assert spec_of(tmp_path, config).dtype == "bfloat16"


def test_the_configs_dtype_wins_over_the_stored_one(tmp_path: Path) -> None:
    """A checkpoint in float32 whose config says bfloat16 is served, and sized, in bfloat16."""
    save("olmoe", torch.float32, tmp_path, fused=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    spec = spec_of(tmp_path, config)
    model = load(find(str(tmp_path)))
    assert spec.dtype == "bfloat16"
    assert expert_bytes_held(model) == spec.routed_bytes
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


UNSERVABLE: dict[str, dict[str, Any]] = {
    "doge": _SMALL | {"intermediate_size": 64, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", UNSERVABLE)
def test_a_family_outside_the_experts_interface_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot serve the family '{family}'.*do not go through.*interface, and ") as refused:
        spec_of(tmp_path, UNSERVABLE[family] | {"model_type": family})
    assert family in refused.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_SMALL | {"model_type": "llama", "intermediate_size": 64}, r"\('llama'\) has no routed experts"),
        (config_of("deepseek_v3", first_k_dense_replace=9), r"\('deepseek_v3'\) has no routed experts"),
        ({"model_type": "nosuch"}, r"of the family 'nosuch', which transformers [0-9.]+ does not have"),
        ({}, "`model_type` key"),
        ({"model_type": "t5"}, "cannot make a causal language model of family 't5'"),
        (config_of("mixtral", hidden_size="wide"), "expected int, got str"),
        (config_of("mixtral", hidden_size=-4), "negative dimension"),
        (config_of("mixtral", hidden_act="nope"), "nope"),
        (config_of("mixtral", num_attention_heads=7, head_dim=None), "cannot be sized by this config.json"),
        (config_of("mixtral", dtype="int8"), "int8"),
        (config_of("mixtral", dtype="auto"), "auto"),
    ],
)
def test_a_config_that_no_servable_model_fits_is_a_model_error(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        spec_of(tmp_path, config)
    assert refused.value.hint
    assert "\n" not in refused.value.message


def test_layers_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remoe_cli.model import loader

    real = loader.skeleton

    def uneven(config: Any) -> PreTrainedModel:
        model = real(config)
        wider = torch.nn.Parameter(torch.empty(8, 64, 48, device="meta"), requires_grad=False)
        expert_layers(model)[1].module.down_proj = wider
        return model

    monkeypatch.setattr(loader, "skeleton", uneven)
    with pytest.raises(ModelError, match="differ in the number or size of their experts"):
        spec_of(tmp_path, config_of("mixtral"))


@pytest.mark.parametrize(
    ("family", "quantisation"),
    [("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 128]}), ("gpt_oss", {"quant_method": "mxfp4"})],
)
def test_a_quantised_model_has_the_sizes_of_the_dequantised_one(family: str, quantisation: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "quantised").mkdir()
    quantised = spec_of(tmp_path / "quantised", config_of(family, quantization_config=quantisation))
    assert quantised.model_copy(update={"stored": None}) == spec_of(tmp_path / "plain", config_of(family))
    assert quantised.stored is not None and quantised.stored_bytes < quantised.nonexpert_bytes + quantised.routed_bytes
