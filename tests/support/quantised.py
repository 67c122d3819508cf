"""Tiny random checkpoints in the formats in which models are published, written tensor by tensor as those formats say.

The reference is transformers, which dequantises them itself while it loads them. It reads no NVFP4 of modelopt: there the reference is a
checkpoint of what modelopt's own arithmetic makes of the same tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.families import save

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Wide enough for several blocks of 128 x 128 in every expert.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128}
Tensors = dict[str, Tensor]


def nibbles(values: Tensor) -> Tensor:
    """Round values [..., 2 n] to 4-bit floats, two a byte, the first in the lower half."""
    codes = (values.abs()[..., None] - FP4).abs().argmin(dim=-1) + 8 * (values < 0)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def fp8(name: str, weight: Tensor, block: int = 128) -> Tensors:
    rows, columns = weight.shape
    down, across = -(-rows // block), -(-columns // block)
    padded = torch.zeros(down * block, across * block)
    padded[:rows, :columns] = weight.float()
    scales = padded.view(down, block, across, block).abs().amax(dim=(1, 3)).clamp_min(1e-6) / 448
    every = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
    return {name: (weight.float() / every).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def mxfp8(name: str, weight: Tensor) -> Tensors:
    """One exponent of two for 32 neighbours of a row."""
    grouped = weight.float().unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(dim=-1).clamp_min(1e-6) / 448).log2().ceil()
    codes = (grouped / exponents.exp2()[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return {name: codes, f"{name}_scale_inv": (exponents + 127).to(torch.uint8)}


def mxfp4(name: str, weight: Tensor) -> Tensors:
    """The fused parameter [experts, in, out] as blocks [experts, out, in / 32, 16]."""
    grouped = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(dim=-1).clamp_min(1e-6) / 6).log2().ceil()
    scales = (exponents + 127).clamp(0, 254).to(torch.uint8)
    return {f"{name}_blocks": nibbles(grouped / exponents.exp2()[..., None]), f"{name}_scales": scales}


def nvfp4(name: str, weight: Tensor) -> Tensors:
    grouped = weight.float().unflatten(-1, (-1, 16))
    all_scale = weight.float().abs().max() / (6 * 448)
    scales = (grouped.abs().amax(dim=-1) / (6 * all_scale)).to(torch.float8_e4m3fn)
    values = grouped / (scales.float() * all_scale)[..., None]
    unread = {name.replace("weight", "input_scale"): torch.tensor(0.5)}
    return {name: nibbles(values).flatten(-2), f"{name}_scale": scales, f"{name}_scale_2": all_scale, **unread}


def from_nvfp4(tensors: Tensors) -> Tensors:
    """Dequantise in modelopt's order: the scales times that of the tensor, then the values times these, rounded at the end."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            table = torch.cat([FP4, -FP4])
            values = torch.stack([table[(tensor & 15).long()], table[(tensor >> 4).long()]], dim=-1).flatten(-2)
            scales = tensors[f"{name}_scale"].float() * tensors[f"{name}_scale_2"]
            out[name] = (values.unflatten(-1, (-1, 16)) * scales[..., None]).flatten(-2).to(torch.bfloat16)
        elif not re.search(r"_scale(_2)?$", name):
            out[name] = tensor
    return out


def packed(bits: int, group: int | None, zeros: bool = False) -> Callable[[str, Tensor], Tensors]:
    def quantise(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        half, grouped = 1 << (bits - 1), weight.float().unflatten(-1, (-1, group or columns))
        least, most = grouped.amin(dim=-1), grouped.amax(dim=-1)
        scales = ((most - least) / (2 * half - 1) if zeros else grouped.abs().amax(dim=-1) / (half - 1)).clamp_min(1e-6).to(torch.bfloat16)
        zero = (-half - least / scales.float()).round().clamp(-half, half - 1) if zeros else torch.zeros_like(least)
        codes = ((grouped / scales.float()[..., None]) + zero[..., None]).round().clamp(-half, half - 1).flatten(-2)
        tensors = {
            f"{name}_packed": _words(codes, bits),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        return tensors | ({f"{name}_zero_point": _words(zero.T, bits).T.contiguous()} if zeros else {})

    return quantise


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers along the last axis into 32-bit words, from the lowest bit on."""
    each = 32 // bits
    codes = codes.to(torch.int64) + (1 << (bits - 1))
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    words = (codes << (bits * torch.arange(each))).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def channels(name: str, weight: Tensor) -> Tensors:
    """One scale a row, of 8-bit floats."""
    scales = (weight.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-6) / 448).to(torch.bfloat16)
    return {name: (weight.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale": scales}


def compressed(form: str, bits: int, kind: str, group: int | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group" if group else "channel", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*gate$"],
    }


@dataclass(frozen=True)
class Format:
    """A format: how it stores a matrix, and what config.json says; None where hf_quant_config.json says it."""

    quantise: Callable[[str, Tensor], Tensors]
    config: Mapping[str, Any] | None
    beside: Mapping[str, Any] | None = field(default=None)


FORMATS = {
    "fp8": Format(fp8, {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "mxfp4": Format(mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]}),
    "mxfp8": Format(mxfp8, {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head", "gate"]}),
    "nvfp4": Format(nvfp4, None, {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*gate"]}}),
    "int4": Format(packed(4, 32), compressed("pack-quantized", 4, "int", 32)),
    "int8": Format(packed(8, None), compressed("pack-quantized", 8, "int", None)),
    "fp8-channels": Format(channels, compressed("float-quantized", 8, "float", None)),
}
# The pairs that the tests run end to end; every format and six families are among them.
PAIRS = [
    ("deepseek_v3", "fp8"),
    ("qwen3_moe", "fp8"),
    ("gpt_oss", "mxfp4"),
    ("qwen3_moe", "nvfp4"),
    ("mixtral", "int4"),
    ("deepseek_v2", "int4"),
    ("glm4_moe", "int8"),
]


def save_quantised(family: str, form: str, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint of `family` whose experts and linear layers are stored in `form`."""
    changes = {"hidden_size": 256, "intermediate_size": 128} if family == "mixtral" else {} if family == "gpt_oss" else WIDE
    save(family, torch.bfloat16, folder, fused=False, seed=seed, **changes)
    wanted = r"experts\.(gate_up|down)_proj$" if form == "mxfp4" else r"\.layers\..*(_proj|_with_mqa|\.w[123])\.weight$"
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= FORMATS[form].quantise(name, tensor) if re.search(wanted, name) else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if FORMATS[form].config is not None:
        config["quantization_config"] = FORMATS[form].config
    if FORMATS[form].beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(FORMATS[form].beside))
    (folder / "config.json").write_text(json.dumps(config))


def dequantised(folder: Path, scratch: Path) -> PreTrainedModel:
    """The model as transformers loads and dequantises it."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        scratch.mkdir()
        config.save_pretrained(scratch)
        save_file(from_nvfp4(load_file(folder / "model.safetensors")), scratch / "model.safetensors", {"format": "pt"})
        folder = scratch
    else:
        config.quantization_config["dequantize"] = True
    load: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_pretrained
    return load(folder, config=config, dtype=torch.bfloat16, experts_implementation="eager")
