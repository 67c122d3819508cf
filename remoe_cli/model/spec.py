"""Sizes of a mixture-of-experts model, from its config.json alone.

The model is built on torch's meta device, where parameters have shapes and types but no memory. So the sizes are those of the code that
will run, and no list of names in configurations has to be kept. One token is sent through that model, to see what is not a parameter:
top-k and the KV cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from remoe_cli.artifacts import MOST_EXPERTS, MOST_LAYERS, Bytes, LayerIndex, Part, is_none
from remoe_cli.errors import ModelError
from remoe_cli.model.stored import StoredWeights, quantisation, stored_weights
from remoe_cli.units import size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from remoe_cli.model.checkpoint import Checkpoint
    from remoe_cli.model.experts import ExpertLayer


_MOST_ROUTED = 2**18  # experts of all layers; Kimi K2 has 23,040


class KvLayer(Part):
    """The KV cache of one layer.

    bytes_per_token   what one token adds
    window            tokens that a layer with sliding attention keeps at most. It is one less than the config's sliding_window, because
                      between two passes transformers keeps room for the next token.
    compressed_bytes_per_token   what one token adds to entries that stand for several tokens and that no window drops
    """

    bytes_per_token: Bytes
    window: Bytes | None = None
    compressed_bytes_per_token: Annotated[float, Field(default=0.0, ge=0, le=2**62, exclude_if=lambda size: size == 0)] = 0.0

    def bytes_of(self, tokens: int) -> int:
        """Count the bytes after `tokens` tokens of one sequence."""
        return self.bytes_per_token * min(tokens, self.window or tokens) + int(self.compressed_bytes_per_token * tokens)


class AssistantSpec(Part):
    """Sizes of an assistant model (model/assistant.py).

    bytes       all its weights, in the dtype in which they are stored
    kv_layers   the KV cache of each hidden layer that has one
    """

    dtype: str
    bytes: Bytes
    hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    kv_layers: Annotated[tuple[KvLayer, ...], Field(max_length=MOST_LAYERS)]

    def kv_cache_bytes(self, tokens: int) -> int:
        """Count the bytes of KV cache after `tokens` tokens of one answer and its prompt."""
        return sum(layer.bytes_of(tokens) for layer in self.kv_layers)


class RemoteExperts(Part):
    """Routed experts as expert functions have them, where they are quantised on request.

    form           `int8` or `int4` (model/quantise.py)
    expert_bytes   one routed expert in that form
    """

    form: Literal["int8", "int4"]
    expert_bytes: Bytes


# Families whose caches requests cannot share (batch_cache.py tells for a loaded model), and Llama 4: its attention takes a token's place
# from the length of the cache, which in a batch is that of the longest request.
ONE_AT_A_TIME = frozenset(("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "llama4", "llama4_text", "minimax"))


class MoeSpec(Part):
    """Sizes of a mixture-of-experts model, in bytes of the dtype in which it is stored.

    moe_layers           indices, among all hidden layers, of those with routed experts
    expert_bytes         one routed expert, mu(e)
    nonexpert_bytes      everything else, with tied tensors counted once: the sum of mu(f_l)
    hidden_state_bytes   one token's hidden state D, which is sent to an expert function and back
    stored               the weights as a quantised checkpoint stores them; None where it stores them as they are computed with
    remote               experts as expert functions have them, where they are quantised on request; None for experts as they are stored
    context_tokens       positions that the model has; None where its config does not say
    kv_layers            the KV cache of each hidden layer that has one; recurrent states do not grow and are not counted

    Source: method.md, section 2, for the symbols.
    """

    family: str
    dtype: str
    hidden_size: Bytes
    hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    moe_layers: Annotated[tuple[LayerIndex, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    experts_per_layer: Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
    top_k: Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
    expert_bytes: Bytes
    nonexpert_bytes: Bytes
    hidden_state_bytes: Bytes
    kv_layers: Annotated[tuple[KvLayer, ...], Field(max_length=MOST_LAYERS)]
    context_tokens: Bytes | None = None
    stored: StoredWeights | None = None
    remote: RemoteExperts | None = Field(default=None, exclude_if=is_none)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if list(self.moe_layers) != sorted(set(self.moe_layers)) or self.moe_layers[-1] >= self.hidden_layers:
            raise ValueError("moe_layers must ascend and be among the hidden layers")
        if self.top_k > self.experts_per_layer:
            raise ValueError("top_k must not be more than experts_per_layer")
        if self.experts > _MOST_ROUTED:
            raise ValueError(f"all layers together must not have more than {_MOST_ROUTED:,} experts")
        if self.stored is not None and self.remote is not None:
            raise ValueError("experts that are stored quantised cannot be quantised on request")
        return self

    @property
    def experts(self) -> int:
        """Routed experts of all layers together."""
        return self.experts_per_layer * len(self.moe_layers)

    @property
    def routed_bytes(self) -> int:
        """The bytes of all routed experts."""
        return self.expert_bytes * self.experts

    @property
    def is_served_quantised(self) -> bool:
        """Whether the weights are stored, sent and read quantised."""
        return self._read is self.stored

    @property
    def is_packed(self) -> bool:
        """Whether expert functions compute from the stored bytes.

        Otherwise they dequantise experts first.
        """
        return self.remote is not None or (self.stored is not None and self.stored.served and self.stored.packed)

    @property
    def function_expert_bytes(self) -> int:
        """What one routed expert takes in the memory of an expert function."""
        return self.fetched_expert_bytes if self.is_packed else self.expert_bytes

    @property
    def fetched_expert_bytes(self) -> int:
        """What an expert function fetches of one routed expert."""
        return self.read_expert_bytes if self.remote is None else self.remote.expert_bytes

    @property
    def dequantised_beside_bytes(self) -> int:
        """What a function needs beside its experts: one more, while it is being dequantised."""
        return self.expert_bytes if self.is_served_quantised and not self.is_packed else 0

    @property
    def _read(self) -> StoredWeights | MoeSpec:
        return self.stored if self.stored is not None and self.stored.served else self

    @property
    def read_expert_bytes(self) -> int:
        """What is read of one routed expert: as the checkpoint stores it, where remoe serves that form."""
        return self._read.expert_bytes

    @property
    def read_nonexpert_bytes(self) -> int:
        """What is read of everything else."""
        return self._read.nonexpert_bytes

    @property
    def read_bytes(self) -> int:
        """What is read of all weights."""
        return self.read_nonexpert_bytes + self.read_expert_bytes * self.experts

    @property
    def stored_bytes(self) -> int:
        """The bytes of all weights as the checkpoint stores them."""
        if self.stored is None:
            return self.nonexpert_bytes + self.routed_bytes
        return self.stored.nonexpert_bytes + self.stored.expert_bytes * self.experts

    @property
    def stored_as(self) -> str | None:
        """A sentence on what is quantised, in the checkpoint or on request; None where nothing is."""
        if self.remote is not None:
            return (
                f"Expert functions have experts in {self.remote.form.upper()}, as was asked for: {size(self.remote.expert_bytes)} an"
                f" expert, not {size(self.expert_bytes)}. The main function's experts stay as they are."
            )
        if self.stored is None:
            return None
        if not self.stored.served:
            whole = size(self.nonexpert_bytes + self.routed_bytes)
            copy = f"Expert functions compute with a {self.dtype} copy of {whole}, and 'remoe deploy' needs that copy."
            return f"The checkpoint is stored in {self.stored.format}, {size(self.stored_bytes)}. {copy}"
        if self.is_packed:
            computed = f"Expert functions compute from it ({size(self.read_expert_bytes)} an expert, not {size(self.expert_bytes)})."
        elif self.stored.expert_bytes == self.expert_bytes:
            computed = "Experts are not quantised."
        elif self.stored.either:
            computed = "Expert functions can compute from it, or dequantise experts first: a plan says which is better."
        else:
            computed = f"Expert functions dequantise experts first: they do not compute from {self.stored.format} as it is stored here."
        return f"{self.read_as} {computed}"

    @property
    def read_as(self) -> str | None:
        """A sentence on how the weights are stored and read, where both are quantised; None elsewhere."""
        if self.stored is None or not self.stored.served:
            return None
        return (
            f"The checkpoint is stored in {self.stored.format}, {size(self.stored_bytes)}. It is sent and read in that form; the main"
            f" function's part is dequantised to {self.dtype} in memory."
        )

    def kv_cache_bytes(self, tokens: int) -> int:
        """Count the bytes of KV cache after `tokens` tokens of one sequence.

        A layer with sliding attention keeps at most its window.
        """
        return sum(layer.bytes_of(tokens) for layer in self.kv_layers)

    def local_experts(self, remote: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """List by MoE layer the experts that are not in `remote`."""
        away = {x: set(remote.get(x, ())) for x in self.moe_layers}
        return {x: tuple(e for e in range(self.experts_per_layer) if e not in away[x]) for x in self.moe_layers}


def read_spec(checkpoint: Checkpoint, remote: Literal["int8", "int4"] | None = None) -> MoeSpec:
    """Read the sizes of a checkpoint's model from its config.json.

    The sizes of a quantised model are those after dequantisation; `stored` has those before it. `remote` is the form of experts in expert
    functions, where they are to be quantised.

    Raises: ModelError when the model has no experts that the hook can serve, its MoE layers differ, or its experts cannot be quantised.
    """
    from remoe_cli.model.experts import expert_layers
    from remoe_cli.model.loader import model_dtype, read_config, skeleton
    from remoe_cli.model.quantise import quantised_bytes

    config = read_config(checkpoint)
    settings = quantisation(checkpoint.path)
    model = skeleton(config)
    layers = expert_layers(model)
    sizes = {sum(p.numel() * p.element_size() for p in x.parameters().values()) // x.experts for x in layers}
    counts = {x.experts for x in layers}
    top_k, kv_layers = _one_token(model)
    if len(sizes) > 1 or len(counts) > 1 or len(top_k) > 1:
        raise ModelError(
            f"The MoE layers of '{config.model_type}' differ in the number or size of their experts.", "Use a model with equal MoE layers."
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
        context_tokens=getattr(text, "max_position_embeddings", None),
        stored=None if settings is None else stored_weights(settings, model, layers),
        remote=None if remote is None else RemoteExperts(form=remote, expert_bytes=quantised_bytes(layers[0], remote, settings)),
    )


def _one_token(model: PreTrainedModel) -> tuple[set[int], tuple[KvLayer, ...]]:
    """Send one token through a model on the meta device, to see its top-k and its KV cache."""
    import torch
    from transformers import DynamicCache

    from remoe_cli.model.checkpoint import reason
    from remoe_cli.model.experts import attach

    top_k: set[int] = set()

    def see(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top_k.add(index.shape[-1])
        return hidden

    attachment = attach(model, see)
    try:
        text = model.config.get_text_config()
        # A model that also takes pictures looks for several sequences in one where it has no cache yet, which needs numbers.
        given = None if text is model.config else DynamicCache(config=text)
        with torch.no_grad():
            ids = torch.zeros((1, 1), dtype=torch.long, device="meta")
            cache = model(input_ids=ids, past_key_values=given, use_cache=True).past_key_values
    except Exception as error:  # every family's code fails its own way on a config that does not suit it
        raise ModelError(
            f"A model of family '{model.config.model_type}' cannot be sized by this config.json: {reason(error)}",
            "Compare it with a config.json of the same family. If it is sound, please report the family.",
        ) from None
    attachment.check_fired(1)
    return top_k, tuple(layer for x in cache.layers if (layer := kv_layer(x)) is not None)


def kv_layer(cached: Any) -> KvLayer | None:
    """Measure a layer's cache after one token: keys, values (MLA: the latent), a sparse indexer's keys.

    DeepSeek-V4 has one tensor for keys and values, and beside the window it keeps one entry for every `compress_rate` tokens.
    """
    tensors = {id(t): t for name in ("keys", "values", "indexer_keys") if (t := getattr(cached, name, None)) is not None}
    window = getattr(cached, "sliding_window", None)
    if not tensors:
        return None
    entries = [t for t in getattr(cached, "compressed_kv", {}).values() if t is not None]
    return KvLayer(
        bytes_per_token=sum(t.numel() * t.element_size() for t in tensors.values()),
        window=window and window - 1,
        compressed_bytes_per_token=sum(t.shape[-1] * t.element_size() / cached.compress_rate for t in entries),
    )
