"""The hook into a model: transformers' experts interface, for recording and for dispatch.

transformers 5 calls `experts(hidden, top_k_index, top_k_weights)` in nearly every mixture-of-experts family, looks the implementation up
by name at every call, and lets others register one. `attach` puts a Runner behind that call for every MoE layer of one model: profiling
attaches a recorder, serving attaches a dispatcher.

Where experts run is not known here. This module groups the rows of a batch by expert, runs the local experts, and adds the weighted
outputs in the order in which transformers' eager loop adds them, so that the sum is rounded in the same way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from remoe_cli.errors import ModelError
from remoe_cli.model.adapted import hooked
from remoe_cli.model.blocked import blocks_of, product
from remoe_cli.model.exchange import Exchange
from remoe_cli.model.gpu_experts import GpuExperts
from remoe_cli.model.grouping import Grouping, by_expert, device_sum, rows_of, weighted_sum
from remoe_cli.model.ordered import across
from remoe_cli.model.ordered import linear as ordered_linear

IMPLEMENTATION = "remoe"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
# Modules that adapters.py makes fit the interface, by the names that their families give them.
_TO_ADAPT = {"DbrxExperts", "JetMoeMoE", "Llama4TextMoe", "LongcatFlashMoE", "Step3p7Experts"}
# Why families have no adapter (adapters.py), by the name of their experts.
_REASONS = {
    "DogeCDMoE": ", and they are single rows of an embedding, too small to be sent to",
    "Llama4TextExperts": ", and a token goes to several of them",
}
# Eager sums an expert's outputs in the hidden states' type, except in these classes (None: the router weights' type).
_ACCUMULATE: dict[str, torch.dtype | None] = {
    "Inkling2Experts": torch.float32,
    "NemotronHExperts": None,
    "_JetMoeExperts": torch.float32,
}


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer of a model.

    layer     its index among all hidden layers
    name      of the module
    experts   the number of routed experts, wherever they are held
    """

    layer: int
    name: str
    module: nn.Module = field(repr=False, compare=False)
    experts: int

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the stacked expert parameters [rows, ...], one row for each expert that is held here."""
        own = self.module._parameters  # named_parameters takes as long as a small expert
        return {name: p for name in _WEIGHTS if (p := own.get(name)) is not None}

    @property
    def is_blocked(self) -> bool:
        """Whether experts are in blocks, and not in the module's parameters (model/blocked.py)."""
        return bool(blocks_of(self.module))

    @property
    def width(self) -> int:
        """The width of an expert's rows: the hidden size, or a smaller latent size in a few families."""
        return int(self.parameters()["down_proj"].shape[-1 if self.module.is_transposed else -2])


# What stands behind the hook: (layer, hidden [T, H], index [T, k], weights [T, k]) -> [T, H]
Runner = Callable[[ExpertLayer, Tensor, Tensor, Tensor], Tensor]


def expert_layers(model: PreTrainedModel) -> tuple[ExpertLayer, ...]:
    """List the model's MoE layers in order, after what has an adapter is adapted.

    Raises: ModelError, with the name of the family, when the hook cannot serve them or there are none.
    """
    if any(type(module).__name__ in _TO_ADAPT for module in model.modules()):
        from remoe_cli.model.adapters import adapt

        adapt(model)
    found, foreign = [], []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate"):
            number = re.findall(r"\.(\d+)(?=\.|$)", name)
            found.append(ExpertLayer(int(number[-1]), name, module, int(module.num_experts)))
        elif re.search(r"Experts?$|MoE$|MoeMLP$", kind) and not kind.startswith("Shared"):
            foreign.append(kind)
    family = model.config.model_type
    if not found and foreign:
        raise ModelError(
            f"remoe cannot serve the family '{family}': its experts ({foreign[0]}) do not go through transformers' experts interface"
            f"{_REASONS.get(foreign[0], '')}.",
            "Use a family that does, such as mixtral, qwen3_moe, deepseek_v3 or gpt_oss (doge does not).",
        )
    if len({layer.layer for layer in found}) < len(found):  # ernie4_5_vl_moe has others for pictures
        raise ModelError(
            f"remoe cannot serve the family '{family}': a layer of it has several sets of experts.",
            "Use a family whose layers have one set of experts, such as mixtral, qwen3_vl_moe, deepseek_v3 or gpt_oss.",
        )
    if not found:
        raise ModelError(f"The model ('{family}') has no routed experts.", "Use a mixture-of-experts model.")
    return tuple(sorted(found, key=lambda layer: layer.layer))


def refuse_unservable(model: PreTrainedModel) -> None:
    """Refuse a model that would bypass or break the hook without a sign of it.

    Raises: ModelError for kernels that replace MoE blocks, and for quantised weights.
    """
    if getattr(model, "use_kernels", False):
        raise ModelError("The model was loaded with use_kernels=True, which replaces whole MoE blocks.", "Load it without use_kernels.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"The model ('{model.config.model_type}') was loaded quantised, and so its experts do not go through the hook.",
            "Load it with remoe, which dequantises it.",
        )


@dataclass(frozen=True)
class Attachment:
    """A model with a Runner behind its hook; `calls` counts the hook's calls by layer."""

    layers: tuple[ExpertLayer, ...]
    calls: Counter[int]

    def check_fired(self, forwards: int) -> None:
        """Check that every MoE layer has called the hook once in each forward pass.

        Raises: ModelError when a layer has not.
        """
        wrong = [layer.layer for layer in self.layers if self.calls[layer.layer] != forwards]
        if wrong:
            raise ModelError(
                f"Layer {wrong[0]} called the experts hook {self.calls[wrong[0]]} times in {forwards} forward passes, not once in each.",
                "This model's code does not use transformers' experts interface as remoe needs it. Please report the family.",
            )


# (layer, name, experts, runner, calls), kept off the modules: a thread pool or client inside a module breaks deepcopy and
# pickling. No ExpertLayer here: it holds its module, and a value that holds its key keeps a whole model alive for ever.
_bound: WeakKeyDictionary[nn.Module, tuple[int, str, int, Runner, Counter[int]]] = WeakKeyDictionary()


def attach(model: PreTrainedModel, runner: Runner) -> Attachment:
    """Put `runner` behind the hook of every MoE layer; a second call replaces the first."""
    refuse_unservable(model)
    layers = expert_layers(model)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _hook)
    model.set_experts_implementation(IMPLEMENTATION)
    calls: Counter[int] = Counter()
    for layer in layers:
        _bound[layer.module] = (layer.layer, layer.name, layer.experts, runner, calls)
        hooked(layer.module, _hook)
    return Attachment(layers, calls)


def _hook(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if module not in _bound:
        raise ModelError(
            "remoe is not attached to an experts module that was called.", "Attach to the model that runs, not to a copy of it."
        )
    number, name, experts, runner, calls = _bound[module]
    calls[number] += 1
    return runner(ExpertLayer(number, name, module, experts), hidden, index, weights)


Ids = npt.NDArray[np.integer]
# Sends rows by expert to where these run, and returns the function that waits for their outputs. All rows are on the host.
Remote = Callable[[ExpertLayer, dict[int, Tensor]], Callable[[], dict[int, Tensor]]]


def run_experts(
    layer: ExpertLayer,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    local: Mapping[int, int],
    remote: Remote,
    exchange: Exchange | None = None,
    gpu: GpuExperts | None = None,
    meanwhile: Callable[[Tensor], None] = lambda hidden: None,
    seen: Callable[[Ids], None] = lambda ids: None,
) -> Tensor:
    """Run one MoE layer: send remote rows, run local experts meanwhile, weight and add all outputs.

    `local` maps an expert's id to its row in the module's parameters. Where the hidden states are on a device, they come to the host in one
    copy and what is computed there goes back in another, through the buffers of `exchange` (None: through new ones). Before the host waits
    for the first, the device gets the work of the experts `gpu`, if that can be given without a wait, and then what `meanwhile(hidden)`
    gives it. `seen` is called with the index on the host.

    Shapes: hidden [T, H], index and weights [T, k]; outputs come back unweighted, [n, H] for each expert; returns [T, H].
    """
    kind = type(layer.module).__name__
    accumulate = (_ACCUMULATE[kind] or weights.dtype) if kind in _ACCUMULATE else hidden.dtype
    if hidden.device.type == "cpu":
        seen(chosen := index.numpy())
        groups = by_expert(chosen, layer.experts)
        outputs = _on_host(layer, hidden, groups, local, remote)
        return weighted_sum(outputs, hidden, weights, groups, accumulate).to(hidden.dtype)
    exchange = exchange or Exchange()
    arrived = exchange.to_host(hidden, index, weights)
    computed = gpu.run(hidden, index) if gpu and gpu.starts_early(index) else None
    meanwhile(hidden)
    here, ids, factors = arrived()
    seen(chosen := ids.numpy())
    groups = by_expert(chosen, layer.experts)
    if gpu is None:
        outputs = _on_host(layer, here, groups, local, remote)
        return exchange.to_device(hidden.device, weighted_sum(outputs, here, factors, groups, accumulate).to(hidden.dtype))[0]
    there, groups = groups.divided(gpu.ids)
    if computed is None:
        computed = hidden.new_zeros(index.numel(), hidden.shape[1])
        outputs = _on_host(layer, here, groups, local, remote, partial(_on_device, layer, gpu, hidden, index, there, computed))
    else:
        outputs = _on_host(layer, here, groups, local, remote)
    if outputs:
        places, rows = exchange.to_device(hidden.device, torch.from_numpy(groups.places), torch.cat(outputs))
        computed.index_copy_(0, places, rows)
    return device_sum(computed, index, weights, accumulate).to(hidden.dtype)


def _on_device(layer: ExpertLayer, gpu: GpuExperts, hidden: Tensor, index: Tensor, grouping: Grouping, out: Tensor) -> None:
    """Compute groups on the device into their slots, expert by expert.

    The host knows where each starts and ends, so nothing waits.

    Shapes: hidden [T, H], index [T, k], out [T k, H].
    """
    there = replace(layer, module=gpu.module)
    if len(hidden) == 1:  # a decode step: the host knows the few places, so the device need not sort for them
        for expert, start, end in grouping.groups:
            computed = run_expert(there, gpu.ids.index(expert), hidden.expand(end - start, -1))
            for place, row in zip(grouping.flat[start:end].tolist(), computed, strict=True):
                out[place] = row
        return
    tokens, flat = grouping.on_device(index)
    for expert, start, end in grouping.groups:
        out.index_copy_(0, flat[start:end], run_expert(there, gpu.ids.index(expert), hidden[tokens[start:end]]))


def _on_host(
    layer: ExpertLayer,
    hidden: Tensor,
    grouping: Grouping,
    local: Mapping[int, int],
    remote: Remote,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Compute the unweighted outputs of each group, [n, H]; `meanwhile` is called when remote rows are on their way."""
    groups = {expert: rows_of(hidden, grouping, start, end) for expert, start, end in grouping.groups}
    sent = {expert: x for expert, x in groups.items() if expert not in local}
    wait = remote(layer, sent) if sent else dict
    meanwhile()
    outputs = {expert: run_expert(layer, local[expert], x) for expert, x in groups.items() if expert in local}
    outputs.update(wait())
    return [outputs[expert] for expert in groups]


def run_expert(layer: ExpertLayer, row: int, x: Tensor) -> Tensor:
    """Run one expert on rows x [n, H] as eager does, without the router's weights."""
    m: Any = layer.module
    w: Any = m._parameters  # a look-up for each, not a dictionary for each expert
    blocked = blocks_of(m)
    up = "gate_up_proj" if m.has_gate else "up_proj"

    def linear(x: Tensor, name: str) -> Tensor:
        if blocked:
            y = product(x, blocked[name][row])
        elif m.is_transposed:
            y = across(x, w[name][row])
        else:
            y = ordered_linear(x, w[name][row])
        return y + w[name + "_bias"][row] if m.has_bias else y

    h: Tensor = linear(x, up)
    h = m._apply_gate(h) if m.has_gate else m.act_fn(h)
    out = linear(h, "down_proj")
    return m.post_expert_norm(out) if m.has_post_expert_norm else out
