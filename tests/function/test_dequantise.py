"""Dequantisation by numpy: bit for bit that of transformers and of compressed-tensors, for every code and every scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from remoe_cli.function.dequantise import FormError, Stored, block, dequantise
from remoe_cli.model.quantised import array_of
from tests.support.quantised import fp8, nibbles, packed

NAMES = {
    **{torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"},
    **{torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"},
}


def stored(tensor: Tensor) -> Stored:
    return NAMES[tensor.dtype], array_of(tensor)


def weights(form: str, dtype: torch.dtype = torch.bfloat16, **tensors: Tensor) -> Tensor:
    array = dequantise(form, {role: stored(tensor) for role, tensor in tensors.items()}, str(dtype).removeprefix("torch."))
    return torch.from_numpy(array).view(dtype)


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal to the bit, but for the bits of what is no number."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    bits = {2: torch.uint16, 4: torch.int32}[mine.element_size()]
    return bool(((mine.contiguous().view(bits) == theirs.contiguous().view(bits)) | (mine.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_8_bit_code_under_scales_of_all_sizes(kind: torch.dtype, scales: torch.dtype, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256).view(256, 256).view(kind)
    exponents = torch.arange(256, dtype=torch.uint8).view(16, 16)
    grid = exponents if scales == torch.uint8 else exponents.view(torch.float8_e8m0fnu)
    if scales in (torch.float32, torch.bfloat16):
        grid = (grid.float() * 1.37).to(scales)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, grid, dtype)
    assert same(weights("fp8", dtype, codes=codes, scales=grid), theirs)


def test_every_byte_of_mxfp4_under_every_scale() -> None:
    """The scale 255 is no number."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255).view(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    theirs = convert_moe_packed_tensors(blocks[None], scales[None])[0].T.contiguous()
    assert same(weights("fp4", codes=blocks, scales=scales), theirs)


def compressor(form: str, **arguments: Any) -> tuple[Any, QuantizationScheme]:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    return BaseCompressor.get_value_from_registry(form), scheme


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, None)])
def test_packed_integers_with_and_without_zero_points(bits: int, group: int | None, zeros: bool, scales: torch.dtype) -> None:
    made = packed(bits, group, zeros)("w", torch.randn(96, 256, generator=torch.Generator().manual_seed(bits)))
    state = {name.replace("w_", "weight_"): tensor for name, tensor in made.items()}
    state["weight_scale"] = state["weight_scale"].to(scales)
    roles = {"weight_packed": "codes", "weight_scale": "scales", "weight_shape": "shape", "weight_zero_point": "zero_points"}
    mine = weights("words", **{roles[name]: tensor for name, tensor in state.items()})
    strategy = "group" if group else "channel"
    their, scheme = compressor("pack-quantized", num_bits=bits, type="int", symmetric=not zeros, strategy=strategy, group_size=group)
    assert same(mine, their.decompress(state, scheme)["weight"].to(torch.bfloat16))


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
def test_integers_that_are_not_packed(scales: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (64, 96), dtype=torch.int8, generator=generator)
    scale = torch.rand(64, 1, generator=generator).to(scales)
    their, scheme = compressor("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel")
    theirs = their.decompress({"weight": codes, "weight_scale": scale}, scheme)["weight"].to(torch.bfloat16)
    assert same(weights("int8", codes=codes, scales=scale), theirs)


def test_nvfp4_of_compressed_tensors_divides_by_the_scale_of_the_tensor() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    grouped, divisor = weight.unflatten(-1, (-1, 16)), torch.tensor([700.0])
    scales = (grouped.abs().amax(dim=-1) / 6 * divisor).to(torch.float8_e4m3fn)
    codes = nibbles(grouped * divisor / scales.float()[..., None]).flatten(-2)
    their, scheme = compressor("nvfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    theirs = their.decompress({"weight_packed": codes, "weight_scale": scales, "weight_global_scale": divisor}, scheme)["weight"]
    assert same(weights("fp4", codes=codes, scales=scales, divisor=divisor), theirs)


def test_blocks_at_the_edges_are_cut() -> None:
    """576 rows, as DeepSeek-V3's kv_a_proj_with_mqa has, are four blocks and a half. transformers refuses them; the format is clear."""
    weight = torch.randn(576, 200, generator=torch.Generator().manual_seed(0))
    made = fp8("w", weight)
    assert made["w_scale_inv"].shape == (5, 2)
    every = made["w_scale_inv"].repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    assert same(weights("fp8", codes=made["w"], scales=made["w_scale_inv"]), (made["w"].float() * every).to(torch.bfloat16))


@pytest.mark.parametrize(("length", "count"), [(10, 0), (7, 5)])
def test_scales_that_fit_no_blocks(length: int, count: int) -> None:
    with pytest.raises(FormError, match=f"{count} scales do not fit {length} weights"):
        block(length, count)


@pytest.mark.parametrize(
    ("form", "tensors"),
    [
        ("fp8", {"codes": np.zeros((4, 4), np.uint8)}),
        ("fp8", {"codes": np.zeros((4, 4), np.uint8), "scales": np.zeros(3, np.uint8)}),
        ("fp4", {"codes": np.zeros((4, 4), np.uint8), "scales": np.zeros((4, 3), np.uint8)}),
        ("words", {"codes": np.zeros((4, 4), np.uint8), "scales": np.zeros((4, 1), np.uint8), "shape": np.array([4, 5])}),
        ("other", {}),
    ],
)
def test_tensors_that_do_not_fit(form: str, tensors: dict[str, Any]) -> None:
    with pytest.raises(FormError, match="do not fit"):
        dequantise(form, {role: ("U8", array) for role, array in tensors.items()}, "bfloat16")
