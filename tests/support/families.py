"""Tiny random models of many mixture-of-experts families: what the loader, the hook and the packager are tested against.

Every model has hidden size 64, 8 routed experts, top-2 routing, at least two MoE layers and a vocabulary of 128. No family
has an end-of-sequence token, so a generation is as long as asked. The weights are drawn here rather than by transformers,
whose 0.02 makes every logit alike; a seed gives the same model in every process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN_SIZE = 64
EXPERTS = 8
TOP_K = 2
VOCAB_SIZE = 128
EXPERT_WIDTH = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": EXPERT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_LOCAL = {"num_local_experts": EXPERTS}
_EXPERTS = {"num_experts": EXPERTS}
_WIDTH = {"moe_intermediate_size": EXPERT_WIDTH, "intermediate_size": 96}
_DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, **_WIDTH}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

# What each family needs beside _COMMON. Between them they hold every checkpoint layout (per-expert gate/up/down, w1/w2/w3, fused),
# every experts variant of an expert function (transposed with biases, no gate), shared experts, dense layers before and between
# the MoE layers, tied embeddings, latent attention, sliding windows, and layers with a state instead of a KV cache.
_SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "olmoe": _EXPERTS,
    "qwen2_moe": _EXPERTS | _WIDTH | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _EXPERTS | _WIDTH | {"head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v2": _DEEPSEEK
    | _LATENT
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    "deepseek_v3": _DEEPSEEK | _LATENT | {"n_group": 4, "topk_group": 2},
    "gpt_oss": _LOCAL
    | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}},
    "granitemoe": _LOCAL | {"tie_word_embeddings": True},
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 48},
    "phimoe": _LOCAL,
    "glm4_moe": _DEEPSEEK | {"head_dim": 16, "use_qk_norm": True},
    "ernie4_5_moe": _WIDTH
    | {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 1, "num_hidden_layers": 3, "tie_word_embeddings": True},
    "minimax": _LOCAL | {"head_dim": 16, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    "dots1": _DEEPSEEK | {"head_dim": 16},
    "hunyuan_v1_moe": _EXPERTS | {"head_dim": 16, "moe_topk": TOP_K},
    "jamba": _EXPERTS | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2_moe": _EXPERTS | _WIDTH | {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention"]},
    "qwen3_next": _EXPERTS
    | _WIDTH
    | {
        "head_dim": 16,
        "shared_expert_intermediate_size": 48,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "flex_olmo": _EXPERTS,
    "afmoe": _EXPERTS
    | _WIDTH
    | {
        "head_dim": 16,
        "num_shared_experts": 1,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "sliding_window": 8,
        "global_attn_every_n_layers": 3,
    },
    "nemotron_h": _WIDTH
    | {
        "n_routed_experts": EXPERTS,
        "head_dim": 16,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 48,
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "chunk_size": 16,
    },
}


def _maker(name: str) -> Callable[[], PreTrainedConfig]:
    def make() -> PreTrainedConfig:
        settings = _COMMON | _SETTINGS[name]
        if "layers_block_type" in settings:  # nemotron_h counts its layers from this list and refuses another count
            settings.pop("num_hidden_layers")
        if "moe_topk" in settings or "moe_k" in settings:
            settings.pop("num_experts_per_tok")
        config: PreTrainedConfig = CONFIG_MAPPING[name](**settings)
        return config

    return make


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {name: _maker(name) for name in _SETTINGS}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of family `name` in eval mode, on `eager` experts; the same weights for the same arguments. `changes` are of its config."""
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = FAMILIES[name]()
        for field, value in changes.items():
            setattr(config, field, value)
        model = from_config(config, dtype=dtype, experts_implementation="eager")
    torch.nn.Module.train(model, False)
    with torch.no_grad():
        for parameter_name, parameter in drawn(model):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {parameter_name}".encode()))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(values * scale(parameter_name, parameter))
    return model


def save(name: str, dtype: torch.dtype, directory: Path, fused: bool, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write the checkpoint of `build(name, dtype, seed, **changes)` in `directory` and return the model.

    `fused` writes transformers' own names and fused expert tensors, else the layout that the family has on the hub.
    """
    model = build(name, dtype, seed, **changes)
    model.save_pretrained(directory, save_original_format=not fused)
    return model


def drawn(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """What is drawn anew: every matrix, every bias, and the buffers that bias the choice of experts (zero when new).

    Norms, attention sinks and the decay rates of state-space layers (`A_log`, `D`, `dt_bias`) stay as the family starts them.
    """
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "bias" in n)]
    return [(n, t) for n, t in tensors if not n.endswith(("A_log", "dt_bias")) and (t.dim() >= 2 or "bias" in n)]


def scale(name: str, tensor: torch.Tensor) -> float:
    """Standard deviation: 1/sqrt(fan-in) keeps activations near one, a router's logits are spread by two, biases are small."""
    if "bias" in name or tensor.dim() < 2:
        return 0.1
    if name.endswith("embed_tokens.weight") or name.endswith("embeddings.weight"):
        return 0.2  # the layers, not the token just read, decide the next token even where the embeddings are tied
    fan_in = tensor.shape[1] * tensor.shape[2] if tensor.dim() == 3 and "conv" in name else tensor.shape[-1]
    router = tensor.dim() == 2 and tensor.shape[0] == EXPERTS
    return (2.0 if router else 1.0) / math.sqrt(fan_in)
