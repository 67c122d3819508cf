"""The one hook: transformers' experts interface, for recording and for dispatch alike.

transformers 5 calls `experts(hidden, top_k_index, top_k_weights)` in nearly every mixture-of-experts family, looks the
implementation up by name on every call, and lets a third party register one. `attach` puts a Runner behind that call
for every MoE layer of one model; profiling attaches a recorder, serving attaches a dispatcher.

This module does not know where experts run. It groups a batch's rows by expert, runs the local ones, and adds the
weighted outputs in the order in which transformers' eager loop adds them, so that the sum rounds the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from remoe_cli.errors import ModelError

IMPLEMENTATION = "remoe"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
# Eager sums an expert's outputs in the hidden states' type, except in these classes (None: the router weights' type).
_ACCUMULATE: dict[str, torch.dtype | None] = {"Inkling2Experts": torch.float32, "NemotronHExperts": None}


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer. `layer` is its index among all hidden layers, `experts` the global count of routed experts."""

    layer: int
    name: str
    module: nn.Module = field(repr=False, compare=False)
    experts: int

    def parameters(self) -> dict[str, nn.Parameter]:
        """The stacked expert parameters, each [rows, ...] with one row an expert that is held here."""
        own = dict(self.module.named_parameters(recurse=False))
        return {name: own[name] for name in _WEIGHTS if name in own}

    @property
    def width(self) -> int:
        """Numbers in one row that enters an expert: the hidden size, or a smaller latent size in a few families."""
        return int(self.parameters()["down_proj"].shape[-1 if self.module.is_transposed else -2])


# What stands behind the hook: (layer, hidden [T, H], index [T, k], weights [T, k]) -> [T, H]
Runner = Callable[[ExpertLayer, Tensor, Tensor, Tensor], Tensor]


def expert_layers(model: PreTrainedModel) -> tuple[ExpertLayer, ...]:
    """The model's MoE layers in order; raises ModelError, naming the family, when the hook cannot serve them."""
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
            f"remoe cannot serve the family '{family}': its experts ({foreign[0]}) do not go through transformers' experts interface.",
            "Use a family that does, such as mixtral, qwen3_moe, deepseek_v3 or gpt_oss (llama4, dbrx, jetmoe, longcat_flash do not).",
        )
    if not found:
        raise ModelError(
            f"The model ('{family}') has no routed experts, so there is nothing to move out.", "Use a mixture-of-experts model."
        )
    return tuple(sorted(found, key=lambda layer: layer.layer))


def refuse_unservable(model: PreTrainedModel) -> None:
    """Raise ModelError for what would silently bypass or break the hook."""
    if getattr(model, "use_kernels", False):
        raise ModelError("The model was loaded with use_kernels=True, which replaces whole MoE blocks.", "Load it without use_kernels.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"The checkpoint ('{model.config.model_type}') is quantised, and remoe serves unquantised experts only.",
            "Save a dequantised copy first: from_pretrained(..., dequantize=True) and save_pretrained.",
        )


@dataclass(frozen=True)
class Attachment:
    """A Runner attached to a model. `calls` counts the hook's calls by layer."""

    layers: tuple[ExpertLayer, ...]
    calls: Counter[int]

    def check_fired(self, forwards: int) -> None:
        """Raise ModelError unless every MoE layer called the hook once a forward pass."""
        wrong = [layer.layer for layer in self.layers if self.calls[layer.layer] != forwards]
        if wrong:
            raise ModelError(
                f"The experts hook fired {self.calls[wrong[0]]} times in layer {wrong[0]} over {forwards} forward passes, not once a pass.",
                "This model's code does not use transformers' experts interface as remoe needs it; please report the family.",
            )


# (layer, name, experts, runner, calls), kept off the modules: a thread pool or client inside a module breaks deepcopy and
# pickling. No ExpertLayer here: it holds its module, and a value that holds its key keeps a whole model alive for ever.
_bound: WeakKeyDictionary[nn.Module, tuple[int, str, int, Runner, Counter[int]]] = WeakKeyDictionary()


def attach(model: PreTrainedModel, runner: Runner) -> Attachment:
    """Route every MoE layer of `model` through `runner`; a second call replaces the first."""
    refuse_unservable(model)
    layers = expert_layers(model)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _hook)
    model.set_experts_implementation(IMPLEMENTATION)
    calls: Counter[int] = Counter()
    for layer in layers:
        _bound[layer.module] = (layer.layer, layer.name, layer.experts, runner, calls)
    return Attachment(layers, calls)


def _hook(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if module not in _bound:
        raise ModelError(
            "An experts module was called that remoe did not attach to.", "Attach to the model that is run, not to a copy of it."
        )
    number, name, experts, runner, calls = _bound[module]
    calls[number] += 1
    return runner(ExpertLayer(number, name, module, experts), hidden, index, weights)


@dataclass(frozen=True)
class _Group:
    expert: int
    tokens: Tensor
    slots: Tensor


def _groups(index: Tensor, experts: int) -> Iterator[_Group]:
    """Rows by expert, ascending; within one expert slot-major, the order in which eager's torch.where lists them.

    Ids of `experts` and above mean "no expert" in the families that use them, and are skipped.
    """
    tokens = index.shape[0]
    order = torch.argsort(index.t().reshape(-1), stable=True)
    position = 0
    for expert, count in enumerate(torch.bincount(index.reshape(-1), minlength=experts).tolist()[:experts]):
        if count:
            places = order[position : position + count]
            yield _Group(expert, places % tokens, places.div(tokens, rounding_mode="floor"))
        position += count


# Sends rows by expert away and returns the function that waits for their outputs.
Remote = Callable[[ExpertLayer, dict[int, Tensor]], Callable[[], dict[int, Tensor]]]


def run_experts(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor, local: Mapping[int, int], remote: Remote) -> Tensor:
    """One MoE layer: remote rows leave first, local experts run meanwhile, all outputs are weighted and added.

    `local` maps an expert's id to its row in the module's parameters. Outputs come back unweighted, [n, H] an expert.
    """
    groups = list(_groups(index, layer.experts))
    away = {g.expert: hidden[g.tokens] for g in groups if g.expert not in local}
    wait = remote(layer, away) if away else dict
    outputs = {g.expert: run_expert(layer, local[g.expert], hidden[g.tokens]) for g in groups if g.expert in local}
    outputs.update(wait())
    kind = type(layer.module).__name__
    accumulate = (_ACCUMULATE[kind] or weights.dtype) if kind in _ACCUMULATE else hidden.dtype
    total = torch.zeros_like(hidden, dtype=accumulate)
    for g in groups:
        total.index_add_(0, g.tokens, (outputs[g.expert] * weights[g.tokens, g.slots, None]).to(accumulate))
    return total.to(hidden.dtype)


def move_rest(model: PreTrainedModel, device: str) -> None:
    """Move all but the routed experts to `device`: they stay in CPU memory, as a plan for a GPU has it."""
    modules = [layer.module for layer in expert_layers(model)]
    for module in modules:
        setattr(module, "_apply", lambda *_, module=module: module)  # noqa: B010 (which is what Module.to moves a part by)
    model.to(device)
    for module in modules:
        delattr(module, "_apply")


def run_expert(layer: ExpertLayer, row: int, x: Tensor) -> Tensor:
    """One expert's feed-forward network on rows x [n, H], as eager computes it, without the router weight; on the device of its weights."""
    m: Any = layer.module
    w = layer.parameters()
    device, x = x.device, x.to(w["down_proj"].device)
    up = "gate_up_proj" if m.has_gate else "up_proj"

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[name][row] if m.is_transposed else F.linear(x, w[name][row])
        return y + w[name + "_bias"][row] if m.has_bias else y

    h: Tensor = linear(x, up)
    h = m._apply_gate(h) if m.has_gate else m.act_fn(h)
    out = linear(h, "down_proj")
    out = m.post_expert_norm(out) if m.has_post_expert_norm else out
    return out.to(device)
