"""In which form a quantised checkpoint stores its weights, and how many bytes that takes.

All computing is with the weights that are dequantised from it, so all other sizes are those. Quantised are the matrices of experts
and of linear layers, but for those that the configuration leaves out; biases, norms, routers and embeddings keep the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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


_SETTINGS = ("quantization_config", "compression_config")  # the latter in early versions of compressed-tensors
_LEFT_OUT = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")
_PACKED = {"mxfp4": ("MXFP4", 4, 32, 8), "nvfp4": ("NVFP4", 4, 16, 8), "mxfp8": ("MXFP8", 8, 32, 8)}  # name, bits, group, bits of its scale
_SAID = ("quant_algo", "format", "fmt", "quant_type", "weights", "dtype")  # settings whose text has the name of a format
_WIDTHS = ("num_bits", "bits", "w_bit", "weight_bits", "nbits")
_NESTED = (("quant_config", "weight_quant_params"), ("global_quant_config", "weight"))  # where HQQ and Quark have those of weights
_BLOCK = 128 * 128  # weights that share a scale where a configuration does not say


def quantisation(folder: Path) -> dict[str, Any] | None:
    """Find the quantisation of a checkpoint: in its config.json, or in NVIDIA's hf_quant_config.json.

    Raises: ModelError where a configuration has something else in its place.
    """
    config = _read(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    key, own = next(((key, part[key]) for key in _SETTINGS for part in parts if part.get(key) is not None), ("", {}))
    if not isinstance(own, dict):
        raise ModelError(
            f"{folder}/config.json sets '{key}' to {escaped(repr(own), 80)}, which says nothing of how its weights are quantised.",
            "Remove it if they are not, or write the settings of the tool that quantised them.",
        )
    if isinstance(config.get("quantization"), dict) and not own.get("quant_method"):
        return {"quant_method": "mlx", **config["quantization"]}
    if key:
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
    "mxfp8": ("", ("",)),
    "modelopt": ("quant_algo", ("nvfp4", "fp8", "fp8_pb_wo")),
    "compressed-tensors": (
        "format",
        ("", "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    ),
}
_SERVED_NAMES = (
    "FP8 (fp8), MXFP4 (mxfp4), MXFP8 (mxfp8), NVFP4 and FP8 (modelopt), and integers of 4 and 8 bits, FP8, NVFP4 and MXFP4"
    " (compressed-tensors)"
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
    others = [bits for one in _schemes(settings) or [dict(settings)] if (bits := one.get("num_bits")) not in (4, 8)]
    if method == "compressed-tensors" and others:
        return f"{method} {'with no number of' if others[0] is None else f'with {escaped(others[0], 40)}'} bits a weight"
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
    weights = _weights(settings)
    algorithm = " ".join([method, *(str(weights.get(key, "")) for key in _SAID)]).lower()
    for known, (name, bits, group, scale) in _PACKED.items():
        if known in algorithm:
            return name, bits + scale / group
    width = next((one for key in _WIDTHS if isinstance(one := weights.get(key), int | float) and 1 < one <= 64), None)
    if width is None:
        if settings.get("load_in_4bit") or any(word in algorithm for word in ("int4", "4bit", "fp4")):
            width = 4
        elif settings.get("load_in_8bit") or "8" in algorithm:
            width = 8
        else:
            return f"an unknown format ({escaped(method, 40) or 'no quant_method'}), counted as 8 bits a weight", 8.0
    is_float = any(word in f"{algorithm} {weights.get('type', '')}" for word in ("float", "fp8", "fp4", "e4m3", "fbgemm"))
    if is_float and width == 4 and weights.get("group_size") == 16:
        return "NVFP4", 4.5
    rows, columns = _block(weights)
    together = weights.get("group_size") or weights.get("q_group_size")
    if rows * columns > 1:
        return f"{'FP' if is_float else 'INT'}{width:g}", width + 32 / (rows * columns)
    if isinstance(together, int) and together > 0:
        return f"{'FP' if is_float else 'INT'}{width:g}", width + (16 + (0 if is_float else width)) / together
    return f"{'FP' if is_float else 'INT'}{width:g}", width + 32 / _BLOCK


def _weights(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the settings of weights.

    They are those of the first group of compressed-tensors, those of a nested object, or all.
    """
    for one in _schemes(settings):
        return one
    for outer, inner in _NESTED:
        if isinstance(found := settings.get(outer), Mapping) and isinstance(found.get(inner), Mapping):
            return {**settings, **found[inner]}
    return settings


def _schemes(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the settings of weights of each group of compressed-tensors, with the group's `targets`."""
    groups = settings.get("config_groups")
    some = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    whole = {key: value for key, value in settings.items() if key != "config_groups"}
    return [
        {
            **whole,
            **({"format": group["format"]} if group.get("format") else {}),
            **_whole(group["weights"]),
            "targets": group.get("targets"),
        }
        for group in some
        if isinstance(group.get("weights"), Mapping)
    ]


def _whole(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Read whole numbers that are written as text, as transformers does."""
    return {key: int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value for key, value in weights.items()}


@dataclass(frozen=True)
class _Patterns:
    """Patterns of modules' names, which stand for what is in a module too.

    parts         names, or parts of them
    globs         with *
    expressions   written after `re:`
    """

    parts: frozenset[str]
    globs: tuple[str, ...]
    expressions: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, listed: Iterable[Any]) -> _Patterns:
        texts = [text for some in listed for text in ([some] if isinstance(some, str) else some if isinstance(some, list) else [])]
        names = [str(text) for text in texts]
        plain = frozenset(name for name in names if not name.startswith("re:") and "*" not in name)
        return cls(plain, tuple(name for name in names if not name.startswith("re:") and "*" in name), tuple(_expressions(names)))

    def match(self, names: Iterable[str]) -> bool:
        """Tell whether a pattern stands for a module that has one of these names."""
        return any(self._matches(name) for name in names)

    def _matches(self, name: str) -> bool:
        steps = name.split(".")
        spans = (".".join(steps[first:last]) for first in range(len(steps)) for last in range(first + 1, len(steps) + 1))
        return (
            any(span in self.parts for span in spans)
            or any(fnmatch(name, glob) or fnmatch(name, glob + ".*") for glob in self.globs)
            or any(expression.match(name) is not None for expression in self.expressions)
        )


def _expressions(names: Iterable[str]) -> Iterator[re.Pattern[str]]:
    for name in names:
        if name.startswith("re:"):
            try:
                yield re.compile(name[3:])
            except re.error:
                continue


class _Scheme:
    """Which settings hold for the weights of a module, by its names."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._left_out = settings, _Patterns.of(settings.get(key) for key in _LEFT_OUT)
        self._schemes = [(_Patterns.of([one["targets"]]), one) for one in _schemes(settings)]

    def of(self, names: Iterable[str]) -> Mapping[str, Any] | None:
        """Find those of a module that has these names in checkpoints; None where it is not quantised."""
        names = tuple(names)
        if self._left_out.match(names):
            return None
        if not self._schemes:
            return self._settings
        named = (one for patterns, one in self._schemes if patterns.match(names))
        return next(named, next((one for patterns, one in self._schemes if not one["targets"] or "Linear" in patterns.parts), None))

    def of_expert(self, names: Iterable[str]) -> Mapping[str, Any] | None:
        """Find those of a matrix of experts.

        Where no group names it, it has the first one's: checkpoints may name experts otherwise.
        """
        names = tuple(names)
        if str(self._settings.get("expert_dtype")).lower() in ("fp4", "mxfp4"):
            return None if self._left_out.match(names) else {"quant_method": "mxfp4"}
        found = self.of(names)
        return found if found is not None or self._left_out.match(names) else _weights(self._settings)


# By the beginning of a parameter's name, what checkpoints call the matrices of one expert that are in it.
_MATRICES = {"gate_up": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "up": ("up_proj", "w1"), "down": ("down_proj", "w2")}


def _called(path: str, parameter: str) -> tuple[str, ...]:
    """List what a checkpoint may call the matrices of a parameter of an experts module.

    They are in the module as such, or in its first expert.
    """
    known = next((of for start, of in _MATRICES.items() if parameter.startswith(start + "_proj")), ())
    paths = dict.fromkeys((path, path.replace(".mlp.", ".block_sparse_moe.")))
    return tuple(name for one in paths for name in (one, f"{one}.{parameter}", *(f"{one}.0.{matrix}" for matrix in known)))


def stored_weights(settings: Mapping[str, Any], model: PreTrainedModel, layers: tuple[ExpertLayer, ...]) -> StoredWeights:
    """Count the bytes of a model's weights as they are stored."""
    from torch import nn

    scheme, paths = _Scheme(settings), {id(module): path for path, module in model.named_modules()}
    served, fits, packed = _unserved(settings) is None, True, True
    expert = nonexpert = 0.0
    routed: set[int] = set()
    of_experts, of_linear = dict[str, None](), dict[str, None]()
    for layer in layers:
        for key, parameter in layer.parameters().items():
            routed.add(id(parameter))
            is_matrix = not key.endswith("bias") and parameter.dim() == 3
            found = scheme.of_expert(_called(paths.get(id(layer.module), ""), key)) if is_matrix else None
            each = parameter.numel() / layer.experts / len(layers)
            if found is None:
                fits = fits and key.endswith("bias")
                expert += each * parameter.element_size()
                continue
            name, bits = bits_per_weight(found)
            of_experts[name] = None
            fits = fits and _fits(parameter, _block(found) if name == "FP8" else (1, 1))
            packed = packed and is_packed_format(name, found)
            expert += each * bits / 8
    head = model.get_output_embeddings()
    linear = {
        id(module.weight): found
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and (found := scheme.of([path])) is not None
    }
    for parameter in {id(parameter): parameter for parameter in model.parameters()}.values():
        if id(parameter) not in routed and (found := linear.get(id(parameter))) is not None:
            name, bits = bits_per_weight(found)
            of_linear[name] = None
            nonexpert += parameter.numel() * bits / 8
        elif id(parameter) not in routed:
            nonexpert += parameter.numel() * parameter.element_size()
    own = " and ".join(of_experts) or (str(model.dtype).removeprefix("torch.") if of_linear else bits_per_weight(settings)[0])
    others = "" if of_linear.keys() <= of_experts.keys() else f"{' and '.join(of_linear)} with experts in "
    return StoredWeights(
        format=f"{others}{own}",
        expert_bytes=round(expert),
        nonexpert_bytes=round(nonexpert),
        served=served,
        packed=served and fits and packed and bool(of_experts),
        either=served and fits and list(of_experts) == ["FP8"],
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
    for key in ("weight_block_size", "block_structure"):
        block = settings.get(key)
        if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block):
            return block[0], block[1]
    return 1, 1
