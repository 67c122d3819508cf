"""In which form a quantised checkpoint stores its weights, and how many bytes that takes.

All computing is with the weights that are dequantised from it, so all other sizes are those. Quantised are the matrices of experts
and of linear layers, but for those that the configuration leaves out; biases, norms, routers and embeddings keep the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from remoe_cli import bounded
from remoe_cli.artifacts import Part, escaped, shown
from remoe_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from remoe_cli.model.experts import ExpertLayer


class StoredWeights(Part):
    """The weights as a quantised checkpoint stores them.

    format          name of the format, such as MXFP4
    expert_bytes    one routed expert
    nonexpert_bytes everything else
    served          whether remoe serves this form: then it is what is stored, sent and read; otherwise a copy in the model's type is
    packed          whether expert functions compute from it (function/packed.py); otherwise they dequantise experts first
    either          whether they can do both, and the planner chooses; `packed` is false then until it has
    """

    format: str
    expert_bytes: int
    nonexpert_bytes: int
    served: bool = Field(default=False, exclude_if=lambda served: not served)
    packed: bool = Field(default=False, exclude_if=lambda packed: not packed)
    either: bool = Field(default=False, exclude_if=lambda either: not either)


_LEFT_OUT = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")
_PACKED = {"mxfp4": ("MXFP4", 4, 32, 8), "nvfp4": ("NVFP4", 4, 16, 8), "mxfp8": ("MXFP8", 8, 32, 8)}  # name, bits, group, bits of its scale
_BLOCK = 128 * 128  # weights that share a scale where a configuration does not say


def quantisation(folder: Path) -> dict[str, Any] | None:
    """Find the quantisation of a checkpoint: in its config.json, or in NVIDIA's hf_quant_config.json."""
    config = _read(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    own = next((part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), dict)), None)
    if own is not None:
        experts = next((part["expert_dtype"] for part in parts if part.get("expert_dtype")), None)
        return {**own, "expert_dtype": experts}  # DeepSeek-V4 says of its experts what differs
    beside = _read(folder / "hf_quant_config.json").get("quantization")
    return {"quant_method": "modelopt", **beside} if isinstance(beside, dict) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = bounded.read_json(file, bounded.CONFIG)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# By quant_method, what says more of the format, and what of it is served. docs/reference/families.md has the list for people.
_SERVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp8": ("fmt", ("", "e4m3", "e5m2")),
    "mxfp4": ("", ("",)),
    "modelopt": ("quant_algo", ("nvfp4", "fp8", "fp8_pb_wo")),
    "compressed-tensors": (
        "format",
        ("", "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    ),
}
_SERVED_NAMES = (
    "FP8 (fp8), MXFP4 (mxfp4), NVFP4 and FP8 (modelopt), and integers of 4 and 8 bits, FP8, NVFP4 and MXFP4 (compressed-tensors)"
)


def refuse_format(settings: Mapping[str, Any]) -> None:
    """Refuse a quantised checkpoint whose experts remoe does not serve as they are stored.

    Raises: ModelError that names the format.
    """
    if (reason := _unserved(settings)) is not None:
        raise ModelError(
            f"The checkpoint is quantised by {reason}, which remoe does not serve.",
            f"Use a bfloat16 copy of the model, or one in {_SERVED_NAMES}.",
        )


def _unserved(settings: Mapping[str, Any]) -> str | None:
    """Name what is not served of a quantisation; None where all of it is."""
    method = str(settings.get("quant_method", "")).lower()
    if method not in _SERVED:
        return shown(method, 40) if method else "a method that its configuration does not name"
    key, served = _SERVED[method]
    groups = settings.get("config_groups")
    for name in _formats(settings, key, groups if isinstance(groups, Mapping) else {}):
        if name not in served:
            return f"{method} with {key} {shown(name, 40)}"
    if settings.get("transform_config"):
        return f"{method} with transforms of its weights"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return f"{method} with sparse weights"
    if method == "compressed-tensors" and (bits := _weights(settings).get("num_bits")) not in (4, 8):
        return f"{method} with {escaped(bits, 40)} bits a weight"
    return None


def _formats(settings: Mapping[str, Any], key: str, groups: Mapping[str, Any]) -> set[str]:
    """List the formats that a configuration names: its own, or those of its groups where they have some."""
    own = [group[key] for group in groups.values() if isinstance(group, Mapping) and group.get(key)]
    return {str(name or "").lower() for name in (own or [settings.get(key)])}


def bits_per_weight(settings: Mapping[str, Any]) -> tuple[str, float]:
    """Name the format of quantised weights, and count their bits with those of their scales.

    >>> bits_per_weight({"quant_method": "mxfp4"})
    ('MXFP4', 4.25)
    >>> bits_per_weight({"quant_method": "gptq", "bits": 4, "group_size": 128})
    ('INT4', 4.15625)
    >>> bits_per_weight({"quant_method": "fp8", "weight_block_size": [128, 128]})
    ('FP8', 8.001953125)
    >>> bits_per_weight({"quant_method": "x"})
    ('an unknown format (x), counted as 8 bits a weight', 8.0)
    """
    method = str(settings.get("quant_method", "")).lower()
    algorithm = f"{method} {settings.get('quant_algo', '')} {settings.get('format', '')} {settings.get('fmt', '')}".lower()
    for known, (name, bits, group, scale) in _PACKED.items():
        if known in algorithm:
            return name, bits + scale / group
    weights = _weights(settings)
    width = next((int(weights[key]) for key in ("num_bits", "bits", "w_bit", "weight_bits") if isinstance(weights.get(key), int)), None)
    if width is None:
        if settings.get("load_in_4bit") or "int4" in algorithm or "4bit" in algorithm:
            width = 4
        elif settings.get("load_in_8bit") or "8" in algorithm:
            width = 8
        else:
            return f"an unknown format ({method or 'no quant_method'}), counted as 8 bits a weight", 8.0
    is_float = any(word in f"{algorithm} {weights.get('type', '')}" for word in ("float", "fp8", "e4m3", "fbgemm"))
    if is_float and width == 4 and weights.get("group_size") == 16:
        return "NVFP4", 4.5
    block = settings.get("weight_block_size")
    together = weights.get("group_size") or weights.get("q_group_size")
    if isinstance(block, list | tuple) and all(isinstance(side, int) and side > 0 for side in block):
        return f"FP{width}", width + 32 / (block[0] * block[-1])
    if isinstance(together, int) and together > 0:
        return f"{'FP' if is_float else 'INT'}{width}", width + (16 + (0 if is_float else width)) / together
    return f"{'FP' if is_float else 'INT'}{width}", width + 32 / _BLOCK


def _weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the settings of weights: a group's of compressed-tensors, or all."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            return {**settings, **group["weights"]}
    return settings


def stored_weights(settings: Mapping[str, Any], model: PreTrainedModel, layers: tuple[ExpertLayer, ...]) -> StoredWeights:
    """Count the bytes of a model's weights as they are stored."""
    from torch import nn

    name, bits = bits_per_weight(settings)
    of_experts, expert_bits = name, bits
    if str(settings.get("expert_dtype")).lower() in ("fp4", "mxfp4"):
        of_experts, expert_bits = bits_per_weight({"quant_method": "mxfp4"})
        name = f"{name} with experts in FP4"
    left_out = [str(pattern) for key in _LEFT_OUT for pattern in settings.get(key) or ()]
    names = {id(module): path for path, module in model.named_modules()}
    served, fits = _unserved(settings) is None, True
    expert = nonexpert = 0.0
    routed: set[int] = set()
    for layer in layers:
        routed |= {id(parameter) for parameter in layer.parameters().values()}
        keeps = _is_left_out(names.get(id(layer.module), ""), left_out)
        for key, parameter in layer.parameters().items():
            plain = keeps or key.endswith("bias") or parameter.dim() < 3
            fits = fits and (key.endswith("bias") or (not plain and _fits(parameter, _block(settings) if of_experts == "FP8" else (1, 1))))
            expert += parameter.numel() * (parameter.element_size() if plain else expert_bits / 8) / layer.experts / len(layers)
    head = model.get_output_embeddings()
    linear = {
        id(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not _is_left_out(path, left_out)
    }
    for parameter in {id(parameter): parameter for parameter in model.parameters()}.values():
        if id(parameter) not in routed:
            nonexpert += parameter.numel() * (bits / 8 if id(parameter) in linear else parameter.element_size())
    return StoredWeights(
        format=name,
        expert_bytes=round(expert),
        nonexpert_bytes=round(nonexpert),
        served=served,
        packed=served and fits and is_packed_format(of_experts, settings),
        either=served and fits and of_experts == "FP8",
    )


def is_packed_format(name: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether expert functions compute from matrices of a format as stored (function/packed.py).

    They always do then. From FP8 they can, and dequantised experts take twice the memory and less time: so neither is always better, and
    the planner chooses.

    >>> is_packed_format("INT4", {"group_size": 32}), is_packed_format("INT4", {"group_size": 40}), is_packed_format("FP8", {})
    (True, False, False)
    """
    if name in ("MXFP4", "NVFP4"):
        return True
    weights = _weights(settings)
    if name not in ("INT4", "INT8") or not weights.get("symmetric", True):
        return False
    group = weights.get("group_size")
    return not isinstance(group, int) or group <= 0 or (group % 32 == 0 and not group & (group - 1))


def _fits(parameter: Tensor, block: tuple[int, int]) -> bool:
    """Tell whether a matrix of each expert has a packed product.

    It needs the number type, the sides, and whole blocks of scales. The rows of gate and up are two matrices where they are stored.
    """
    rows, columns = parameter.shape[1:]
    powers = all(side > 0 and not side & (side - 1) for side in block)
    whole = powers and rows % (2 * block[0]) == 0 and columns % max(block[1], 32) == 0 and block[1] in (1, *(1 << n for n in range(5, 24)))
    return whole and str(parameter.dtype) == "torch.bfloat16" and rows % 32 == 0


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Read how many rows and columns share a scale of FP8; 1 and 1 where there are no blocks."""
    block = settings.get("weight_block_size")
    if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(side, int) for side in block):
        return block[0], block[1]
    return 1, 1


def _is_left_out(path: str, patterns: list[str]) -> bool:
    """Tell whether a module, or one that it is in, is named by a pattern: a part of a name, a glob, or `re:` and a regular expression."""
    return any(_matches(path, pattern) for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], path) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatch(path, pattern) or fnmatch(path, pattern + ".*")
    return path == pattern or path.startswith(pattern + ".") or f".{pattern}." in f".{path}."
