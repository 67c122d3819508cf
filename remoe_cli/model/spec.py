"""Sizes of a mixture-of-experts model, from its config.json alone.

The model is built on torch's meta device, where parameters have shapes and types but no memory, so the sizes are
those of the very code that will run and no list of config names has to be kept. What is not a parameter, top-k and the
KV cache, is seen by sending one token through that model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remoe_cli.artifacts import Part
from remoe_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from remoe_cli.model.checkpoint import Checkpoint
    from remoe_cli.model.experts import ExpertLayer


class KvLayer(Part):
    """KV-cache bytes that one token adds in one layer; `window` is how many tokens a sliding layer keeps at most.

    Between two passes transformers keeps one token less than the config's sliding_window: the next token completes it.
    """

    bytes_per_token: int
    window: int | None = None


class MoeSpec(Part):
    """Sizes in bytes at the stored dtype.

    moe_layers          indices, among all hidden layers, of those with routed experts
    expert_bytes        one routed expert (mu(e) in the paper)
    nonexpert_bytes     everything else, tied tensors counted once (sum of mu(f_l))
    hidden_state_bytes  one token's hidden state (D), which is what travels to an expert function and back
    kv_layers           one entry for each hidden layer that keeps a KV cache; recurrent states do not grow and are not counted
    """

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


def part_name(layer: int, part: int, parts: int) -> str:
    """The name of function `part` of `parts` that hold hidden layer `layer`'s experts: of its shard, and on every target."""
    return f"layer-{layer:03d}-{part}" if parts > 1 else f"layer-{layer:03d}"


def read_spec(checkpoint: Checkpoint) -> MoeSpec:
    """Sizes of the checkpoint's model, of a quantised one after dequantisation, as which alone it can be served.

    Raises ModelError when it has no experts that the hook can serve.
    """
    from remoe_cli.model.experts import expert_layers
    from remoe_cli.model.loader import model_dtype, read_config, skeleton

    config = read_config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton(config)
    layers = expert_layers(model)
    sizes = {sum(p.numel() * p.element_size() for p in x.parameters().values()) // x.experts for x in layers}
    counts = {x.experts for x in layers}
    top_k, kv_layers = _one_token(model)
    if len(sizes) > 1 or len(counts) > 1 or len(top_k) > 1:
        raise ModelError(
            f"The MoE layers of '{config.model_type}' differ in the number or size of their experts.", "remoe plans equal layers only."
        )
    expert, experts = sizes.pop(), counts.pop()
    total = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    text = config.get_text_config()
    return MoeSpec(
        family=config.model_type,
        dtype=str(model_dtype(config)).removeprefix("torch."),
        hidden_size=text.hidden_size,
        hidden_layers=text.num_hidden_layers,
        moe_layers=tuple(x.layer for x in layers),
        experts_per_layer=experts,
        top_k=top_k.pop(),
        expert_bytes=expert,
        nonexpert_bytes=total - expert * experts * len(layers),
        hidden_state_bytes=layers[0].width * model_dtype(config).itemsize,
        kv_layers=kv_layers,
    )


def _one_token(model: PreTrainedModel) -> tuple[set[int], tuple[KvLayer, ...]]:
    """One token through a model on the meta device: the widths of the index that the hook sees, and the cache that it leaves."""
    import torch

    from remoe_cli.model.checkpoint import reason
    from remoe_cli.model.experts import attach

    top_k: set[int] = set()

    def see(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top_k.add(index.shape[-1])
        return hidden

    attachment = attach(model, see)
    try:
        with torch.no_grad():
            cache = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device="meta"), use_cache=True).past_key_values
    except Exception as error:  # every family's code fails its own way on a config that does not suit it
        raise ModelError(
            f"A model of family '{model.config.model_type}' cannot run with this config.json: {reason(error)}", "Check config.json."
        ) from None
    attachment.check_fired(1)
    return top_k, tuple(layer for x in cache.layers if (layer := _kv_layer(x)) is not None)


def _kv_layer(cached: Any) -> KvLayer | None:
    """What a cache layer holds after one token: keys and values (MLA: the latent), a sparse indexer's keys; None without any."""
    tensors = [t for name in ("keys", "values", "indexer_keys") if (t := getattr(cached, name, None)) is not None]
    window = getattr(cached, "sliding_window", None)
    if not tensors:
        return None
    return KvLayer(bytes_per_token=sum(t.numel() * t.element_size() for t in tensors), window=window and window - 1)
