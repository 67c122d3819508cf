"""Experts that are quantised on request: the numbers of compressed-tensors, to the nearest, exact in every type of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from pydantic import ValidationError

from remoe_cli.errors import ModelError
from remoe_cli.function.dequantise import Floats, dequantise
from remoe_cli.function.expert_ffn import narrow, widen
from remoe_cli.function.weights import ShardFile
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.quantise import BY_NAME, INT4, INT8, Integers, quantise
from remoe_cli.model.shards import write_shards
from remoe_cli.model.spec import MoeSpec, read_spec
from remoe_cli.model.stored import StoredWeights
from tests.support.families import save
from tests.support.quantised import save_quantised


def weights(rows: int = 24, columns: int = 160) -> Floats:
    """Groups of very different sizes, one of zeros, and numbers at both ends of a range."""
    random = np.random.default_rng(0)
    made = random.standard_normal((rows, columns)) * np.exp2(random.integers(-12, 6, (rows, 1)))
    made[3, 32:64] = 0
    made[4, :3] = 2.0**5, -(2.0**5), 2.0**4
    return widen(narrow(made.astype(np.float32), "bfloat16"), "bfloat16")


@pytest.mark.parametrize("to", BY_NAME.values(), ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_each_weight_becomes_the_nearest_number_that_every_type_has(to: Integers, dtype: str) -> None:
    given = weights()
    stored = quantise(given, to, dtype)
    scales = widen(stored["scales"][1], "bfloat16").repeat(32, axis=1)
    made = widen(dequantise(to.form, stored, dtype), dtype)
    assert np.array_equal(made, widen(dequantise(to.form, stored, "float32"), "float32"))  # rounded to the type without a change
    fraction = np.frexp(scales)[0] * 2**to.digits
    assert np.array_equal(fraction, np.rint(fraction))
    largest = np.abs(given.reshape(24, -1, 32)).max(axis=2).repeat(32, axis=1)
    half = 2 ** (to.bits - 1) - 0.5
    assert (scales * half >= largest).all()  # so the largest is within half a step, also at the end of the range
    assert (np.abs(made - given) <= scales / 2).all()
    coarse = 1 + 2.0 ** (1 - to.digits) if to.digits > 1 else 2
    assert ((scales < coarse * largest / half * 1.0001) | (largest < 1e-3)).all()  # no coarser than its digits make it


@pytest.mark.parametrize("to", BY_NAME.values(), ids=str)
def test_the_tensors_are_those_of_compressed_tensors(to: Integers) -> None:
    stored = quantise(weights(), to, "bfloat16")
    codes = torch.from_numpy(stored["codes"][1])
    if to is INT4:
        codes = unpack_from_int32(codes, 4, torch.Size(stored["shape"][1].tolist()))
    scales = torch.from_numpy(stored["scales"][1]).view(torch.bfloat16)
    theirs = (codes.to(torch.bfloat16).unflatten(-1, (-1, 32)) * scales[..., None]).flatten(-2)
    assert torch.equal(theirs.view(torch.uint16), torch.from_numpy(dequantise(to.form, stored, "bfloat16")))
    assert sum(array.nbytes for _, array in stored.values()) == to.matrix_bytes(24 * 160)


def test_what_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Rows of 40 weights cannot be quantised in groups of 32"):
        quantise(np.zeros((2, 40), np.float32), INT8, "bfloat16")
    with pytest.raises(ModelError, match="no finite numbers"):
        quantise(np.full((2, 32), np.nan, np.float32), INT8, "bfloat16")
    for to, dtype, most in ((INT8, "float16", 65504), (INT4, "float16", 65504), (INT8, "bfloat16", 3e38), (INT4, "float32", 3e38)):
        with pytest.raises(ModelError, match=f"weights of experts are as large as .*{to.name.upper()} cannot hold in a model in {dtype}"):
            quantise(np.full((2, 32), most, np.float32), to, dtype)
    save_quantised("qwen3_moe", "fp8", tmp_path / "fp8")
    with pytest.raises(ModelError, match=r"quantised already \(fp8\), so its experts cannot be quantised to INT8"):
        read_spec(find(str(tmp_path / "fp8")), "int8")
    save("qwen3_moe", torch.bfloat16, tmp_path / "odd", fused=False, moe_intermediate_size=40)
    with pytest.raises(ModelError, match="down_proj have 40 weights, which groups of 32 do not divide"):
        read_spec(find(str(tmp_path / "odd")), "int8")


@pytest.mark.parametrize(("family", "to"), [("gpt_oss", "int8"), ("mixtral", "int4")])
def test_a_shard_holds_what_the_spec_counts_and_its_experts_stay_the_nearest(family: str, to: str, tmp_path: Path) -> None:
    """Also of a family whose matrices stand on their sides, and that has biases."""
    model = save(family, torch.bfloat16, tmp_path / "model", fused=True)
    found = find(str(tmp_path / "model"))
    spec = read_spec(found, to)  # type: ignore[arg-type]
    assert (
        spec.is_packed and spec.remote is not None and spec.function_expert_bytes == spec.fetched_expert_bytes == spec.remote.expert_bytes
    )
    assert spec.read_expert_bytes == spec.expert_bytes and spec.dequantised_beside_bytes == 0 and f"in {to.upper()}" in str(spec.stored_as)
    layer = expert_layers(model)[0]
    (written,) = write_shards(found, {layer.layer: [(2, 5)]}, 1, tmp_path, BY_NAME[to])
    shard = ShardFile(written.path)
    assert shard.head.packed_refusal() is None
    assert all(shard.head.stored_bytes(e) == spec.remote.expert_bytes for e in (2, 5))
    for name, parameter in layer.parameters().items():
        own, made = parameter[5].detach().float().numpy(), widen(shard.tensors(5)[name], "bfloat16")
        error = float(np.sqrt(np.square(made - own).mean() / max(1e-12, np.square(own).mean())))
        assert error < (1e-9 if name.endswith("bias") else {"int8": 0.01, "int4": 0.11}[to])


def test_a_model_is_quantised_once() -> None:
    stored = StoredWeights(format="FP8", expert_bytes=1, nonexpert_bytes=1)
    whole = {
        "family": "x",
        "dtype": "bfloat16",
        "hidden_size": 1,
        "hidden_layers": 1,
        "moe_layers": (0,),
        "experts_per_layer": 2,
        "top_k": 1,
    }
    sizes = {"expert_bytes": 4, "nonexpert_bytes": 4, "hidden_state_bytes": 2, "kv_layers": (), "stored": stored}
    assert MoeSpec.model_validate(whole | sizes)
    with pytest.raises(ValidationError, match="cannot be quantised on request"):
        MoeSpec.model_validate(whole | sizes | {"remote": {"form": "int8", "expert_bytes": 2}})
