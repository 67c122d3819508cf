"""Sizes of a mixture-of-experts model, from its config.json alone.

The model is built on torch's meta device, where parameters have shapes and types but no memory, so the sizes are
those of the very code that will run and no list of config names has to be kept. Only what is not a parameter comes
from the config: the KV cache, and top-k where the router does not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from remoe_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from remoe_cli.model.checkpoint import Checkpoint
    from remoe_cli.model.experts import ExpertLayer


class KvLayer(BaseModel):
    """KV-cache bytes that one token adds in one layer; `window` is how many tokens a sliding layer keeps at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: int
    window: int | None = None


class MoeSpec(BaseModel):
    """Sizes in bytes at the stored dtype.

    moe_layers          indices, among all hidden layers, of those with routed experts
    expert_bytes        one routed expert (mu(e) in the paper)
    nonexpert_bytes     everything else, tied tensors counted once (sum of mu(f_l))
    hidden_state_bytes  one token's hidden state (D), which is what travels to an expert function and back
    kv_layers           one entry for each hidden layer that keeps a KV cache
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    dtype: str
    hidden_size: int
    hidden_layers: int
    moe_layers: tuple[int, ...]
    experts_per_layer: int
    top_k: int
    expert_bytes: int
    nonexpert_bytes: int
    hidden_state_bytes: int
    kv_layers: tuple[KvLayer, ...]

    @property
    def routed_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.expert_bytes * self.experts_per_layer * len(self.moe_layers)

    def kv_cache_bytes(self, tokens: int) -> int:
        """KV cache after `tokens` tokens of one sequence (sum of a_l, sliding windows capped)."""
        return sum(layer.bytes_per_token * min(tokens, layer.window or tokens) for layer in self.kv_layers)

    def local_experts(self, remote: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """By MoE layer, the experts that stay when those in `remote` leave."""
        return {x: tuple(e for e in range(self.experts_per_layer) if e not in set(remote.get(x, ()))) for x in self.moe_layers}


_TOP_K = ("num_experts_per_tok", "top_k", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token")
# Layer kinds that keep a recurrent state or none instead of a KV cache.
_NO_KV = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}


def read_spec(checkpoint: Checkpoint) -> MoeSpec:
    """Sizes of the checkpoint's model; raises ModelError when it has no experts that the hook can serve."""
    from remoe_cli.model.experts import expert_layers
    from remoe_cli.model.loader import model_dtype, read_config, skeleton

    config = read_config(checkpoint)
    model = skeleton(_unquantised(config))
    layers = expert_layers(model)
    sizes = {sum(p.numel() * p.element_size() for p in x.parameters().values()) // x.experts for x in layers}
    counts = {x.experts for x in layers}
    if len(sizes) > 1 or len(counts) > 1:
        raise ModelError(
            f"The MoE layers of '{config.model_type}' differ in the number or size of their experts.", "remoe plans equal layers only."
        )
    expert, experts = sizes.pop(), counts.pop()
    total = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    itemsize = model_dtype(config).itemsize
    text = config.get_text_config()
    return MoeSpec(
        family=config.model_type,
        dtype=str(model_dtype(config)).removeprefix("torch."),
        hidden_size=text.hidden_size,
        hidden_layers=text.num_hidden_layers,
        moe_layers=tuple(x.layer for x in layers),
        experts_per_layer=experts,
        top_k=_top_k(model, layers[0], text),
        expert_bytes=expert,
        nonexpert_bytes=total - expert * experts * len(layers),
        hidden_state_bytes=layers[0].width * itemsize,
        kv_layers=tuple(_kv_layers(text, itemsize)),
    )


def _unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the dequantised model: quantised checkpoints are served dequantised or not at all."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _top_k(model: Any, layer: ExpertLayer, config: PreTrainedConfig) -> int:
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for source in (*block.modules(), config):
        for name in _TOP_K:
            if isinstance(value := getattr(source, name, None), int) and not isinstance(value, bool) and value > 0:
                return value
    raise ModelError(
        f"The config of '{config.model_type}' does not say how many experts a token uses.", f"It has none of {', '.join(_TOP_K)}."
    )


def _kv_layers(config: PreTrainedConfig, itemsize: int) -> Iterator[KvLayer]:
    """GQA keeps 2 heads' worth of keys and values; MLA keeps the latent and the rotary key (transformers-moe.md section 7)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None)
    numbers = latent + config.qk_rope_head_dim if latent else 2 * heads * head
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["full_attention"] * count
    sliding = getattr(config, "sliding_window", None)
    uniform = "sliding_attention" not in kinds and getattr(config, "use_sliding_window", True) and not hasattr(config, "layer_types")
    for kind in kinds[:count]:
        if kind not in _NO_KV:
            yield KvLayer(bytes_per_token=numbers * itemsize, window=sliding if uniform or kind == "sliding_attention" else None)
