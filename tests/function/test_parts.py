"""The function's parts: frames, shards, arithmetic."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from remoe_cli.function.codec import STORAGE, Batch, FrameError, frame_bytes, from_wire, origin_of, pack, to_wire, unpack, wire_bytes
from remoe_cli.function.deadline import refuse_late
from remoe_cli.function.errors import FunctionMemoryError, FunctionTimeError, ShardDigestError, WeightsError
from remoe_cli.function.expert_ffn import Expert, FfnSpec, narrow, widen
from remoe_cli.function.ready import ReadyExperts, room_bytes
from remoe_cli.function.weights import ALIGNMENT, Head, ShardFile, open_shard, read_head
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.ffn import describe, to_storage
from remoe_cli.model.shards import write_shard
from tests.support.damage import checked, flip, flipped
from tests.support.families import build
from tests.support.shards import shard_environment

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _batch(dtype: str = "bfloat16") -> Batch:
    rows = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    return Batch(dtype, (1, 4), (2, 3), narrow(rows, dtype), compute_us=7)


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_frame_comes_back_as_it_was(dtype: str) -> None:
    batch = _batch(dtype)
    frame = pack(batch)
    back = unpack(from_wire(to_wire(frame)))
    assert (back.dtype, back.experts, back.rows, back.compute_us) == (dtype, (1, 4), (2, 3), 7)
    assert np.array_equal(back.data, batch.data)
    assert len(frame) == frame_bytes(5, 2, 8, dtype)
    assert len(to_wire(frame)) == wire_bytes(len(frame))
    assert isinstance(json.loads(to_wire(frame)), str)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f[:-1],
        lambda f: f + b"\0",
        lambda f: f[:10],
        lambda f: b"XXXX" + f[4:],
        lambda f: f[:4] + b"\x09" + f[5:],
        lambda f: f[:24] + b"\x09" + f[25:],  # experts no longer ascend
        lambda f: f[:40] + b"\x80\x7f" + f[42:],  # an infinity among the rows
    ],
)
def test_a_damaged_frame_is_refused(damage) -> None:  # type: ignore[no-untyped-def]
    """By its check, and where that is right too, by what it says."""
    damaged = damage(pack(_batch()))
    for frame in (damaged, checked(damaged)):
        with pytest.raises(FrameError):
            unpack(frame)


def test_every_bit_of_a_frame_is_checked() -> None:
    frame = pack(_batch())
    assert checked(frame) == frame
    for place in range(8 * len(frame)):
        with pytest.raises(FrameError):
            unpack(flipped(frame, place))


def test_an_answer_says_whose_it_is_and_what_it_answers() -> None:
    asked = unpack(pack(_batch()))
    other = unpack(pack(replace(_batch(), data=_batch().data[::-1])))
    assert asked.check != other.check and asked.origin == 0
    answer = unpack(pack(replace(_batch(), origin=origin_of("shard", asked.check))))
    assert answer.origin == origin_of("shard", asked.check)
    assert answer.origin not in (origin_of("other shard", asked.check), origin_of("shard", other.check))


@given(st.binary(max_size=200))
def test_garbage_is_a_frame_error_or_a_batch(garbage: bytes) -> None:
    for parse in (unpack, from_wire, lambda b: unpack(b"RMO2\x01\0" + b), lambda b: unpack(checked(b"RMO2\x01\0" + b))):
        with suppress(FrameError):
            parse(garbage)


@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_rounds_as_torch_does(number: float) -> None:
    values = np.array([number], dtype=np.float32)
    assert torch.equal(torch.from_numpy(widen(narrow(values, "bfloat16"), "bfloat16")), torch.tensor([number]).bfloat16().float())


def _torch_gate(h: torch.Tensor, spec: FfnSpec) -> torch.Tensor:
    """The families' gates, in their own words (transformers 5.23)."""
    gate, up = (h[..., ::2], h[..., 1::2]) if spec.interleaved else h.chunk(2, dim=-1)
    limit, alpha = spec.limit, spec.alpha
    act = {
        "silu": F.silu,
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    match spec.gate:
        case "none":
            return act[spec.activation](h)
        case "standard":
            return act[spec.activation](gate) * up
        case "wide":
            return (act[spec.activation](gate.float()) * up.float()).to(gate.dtype)
        case "clamped":
            return act[spec.activation](gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)
        case "sigmoid":
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
            return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    raise AssertionError(spec.gate)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("gate", "activation", "interleaved", "bias"),
    [
        ("standard", "silu", False, False),
        ("standard", "gelu_pytorch_tanh", False, False),
        ("standard", "relu", False, True),
        ("none", "relu2", False, False),
        ("wide", "silu", False, False),
        ("clamped", "silu", False, False),
        ("sigmoid", "silu", True, True),
        ("sigmoid", "silu", False, False),
    ],
)
def test_the_arithmetic_is_torchs(dtype: str, transposed: bool, gate: str, activation: str, interleaved: bool, bias: bool) -> None:
    spec = FfnSpec(dtype, gate, activation, limit=0.7, alpha=1.702, interleaved=interleaved, transposed=transposed)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(TORCH[dtype])

    inner = 48 if gate == "none" else 96
    up, down, x = draw(inner, 64), draw(64, 48), torch.randn((9, 64), generator=generator).to(TORCH[dtype])
    up_bias, down_bias = draw(inner), draw(64)
    h = F.linear(x, up) + up_bias if bias else F.linear(x, up)
    y = F.linear(_torch_gate(h, spec), down)
    expected = (y + down_bias if bias else y).float().numpy()

    name = "up_proj" if gate == "none" else "gate_up_proj"
    tensors = {name: up.T.contiguous() if transposed else up, "down_proj": down.T.contiguous() if transposed else down}
    if bias:
        tensors |= {name + "_bias": up_bias, "down_proj_bias": down_bias}
    got = widen(Expert.of({n: to_storage(t) for n, t in tensors.items()}, spec).run(to_storage(x)), dtype)
    # Sums taken in another order may cross a rounding boundary: few numbers, by one step of the type.
    step = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-9}[dtype] * np.abs(expected).max()
    assert np.abs(got - expected).max() <= step
    assert dtype == "float32" or (got != expected).mean() < 0.05


def test_an_expert_is_one_range_of_the_shard_and_only_asked_ones_are_read(tmp_path: Path) -> None:
    layer = expert_layers(build("gpt_oss", torch.bfloat16))[0]
    path = tmp_path / "layer.safetensors"
    experts = [7, 2, 5]  # rows 0..2 of the layer stand for these ids
    write_shard(path, layer, experts)
    shard = ShardFile(path)
    assert shard.experts == (2, 5, 7)
    ranges = sorted(shard.head.range(e) for e in experts)
    sizes = {sum(p[0].numel() * p.element_size() for p in layer.parameters().values())}
    assert {last - first for first, last in ranges} == sizes
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    data = path.read_bytes()
    assert ranges[0][0] == len(read_head(path)) and ranges[0][0] % ALIGNMENT == 0
    assert shard.head.sha256 == {e: hashlib.sha256(data[slice(*shard.head.range(e))]).hexdigest() for e in experts}
    for row, expert in enumerate(experts):
        for name, tensor in layer.parameters().items():
            assert np.array_equal(shard.tensors(expert)[name], to_storage(tensor[row]))
    assert FfnSpec(**shard.head.ffn) == describe(layer)
    anyone = load_file(path)  # the safetensors library's own reading of it
    assert len(anyone) == 3 * len(layer.parameters())
    assert all(torch.equal(anyone[f"{e:05d}.{name}"], p[row]) for row, e in enumerate(experts) for name, p in layer.parameters().items())
    with pytest.raises(WeightsError, match=r"expert 3 is not in this function, which holds \[2, 5, 7\]"):
        shard.tensors(3)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b + b"\0" * 64, lambda b: b"\xff" * 8 + b[8:], lambda b: b"\2\0\0\0\0\0\0\0{}"]
)
def test_a_damaged_shard_is_refused(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "layer.safetensors"
    write_shard(path, expert_layers(build("mixtral"))[0], [0, 1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match="is not a shard of experts"):
        ShardFile(path)


def test_each_byte_that_is_mapped_is_checked_once_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_shard(path, expert_layers(build("mixtral"))[0], range(4))
    environment, head = shard_environment(path), Head.parse(read_head(path))
    assert open_shard(environment).tensors(2)
    for at in (head.range(2)[0], head.range(2)[1] - 1):
        flip(path, at)
        shard = open_shard(environment)
        shard.bring([0, 1, 3])
        for _ in range(2):
            with pytest.raises(ShardDigestError, match=rf"expert 2 of {path} is not the one that was deployed"):
                ReadyExperts(shard, float("inf")).get(2)
        flip(path, at)
    # Another shard of the same size, which vouches for itself.
    write_shard(path, expert_layers(build("mixtral"))[1], range(4))
    with pytest.raises(ShardDigestError, match=rf"the head of {path} is not the one that was deployed"):
        open_shard(environment)


def test_a_head_must_vouch_for_every_expert(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_shard(path, expert_layers(build("mixtral"))[0], [0, 1])
    head = read_head(path)
    assert Head.parse(head).sha256.keys() == {0, 1}
    with pytest.raises(WeightsError, match="does not give one digest for each expert"):
        Head.parse(head.replace(rb'"{\"0\"', rb'"{\"2\"'))


def test_the_least_recently_used_expert_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    layer = expert_layers(build("mixtral"))[0]
    write_shard(path, layer, range(8))
    shard = ShardFile(path)
    each = shard.head.expert_bytes(0)
    ready = ReadyExperts(shard, 3.5 * each)
    held = []
    for expert in (0, 1, 2, 0, 3, 0, 4):
        assert np.array_equal(ready.get(expert).up.weights, to_storage(layer.parameters()["gate_up_proj"][expert]))
        held.append(ready.ids)
    assert held == [(0,), (0, 1), (0, 1, 2), (0, 1, 2), (0, 2, 3), (0, 2, 3), (0, 3, 4)]
    with pytest.raises(WeightsError, match="expert 8 is not in this function"):
        ready.get(8)
    assert ready.ids == (0, 3, 4)
    with pytest.raises(FunctionMemoryError, match=r"an expert takes \d+\.\d MB, and the memory has 0\.0 MB for experts"):
        ReadyExperts(shard, each - 1)


def test_room_is_what_the_memory_limit_leaves() -> None:
    rooms = [room_bytes({"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": size}) for size in ("4096", "8192")]
    assert rooms[1] - rooms[0] == pytest.approx(4096 << 20, abs=8 << 20)
    assert rooms[0] < (4096 - 24) << 20
    assert room_bytes({}) == float("inf")


def test_the_function_imports_no_framework() -> None:
    code = "import sys; import remoe_cli.function.expert_ffn, remoe_cli.function.codec, remoe_cli.function.weights; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "boto3", "pydantic", "remoe_cli.errors"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("rows", "done", "took_s", "left_s", "late"),
    [
        ((5, 5, 5, 5), 0, 0.0, 0.0, False),  # nothing is known yet
        ((5, 5, 5, 5), 1, 2.0, 6.1, False),
        ((5, 5, 5, 5), 1, 2.0, 5.9, True),
        ((1, 900, 900), 1, 2.0, 5.0, False),  # by rows the others took an hour, and by experts 4 s
        ((900, 1, 1), 1, 9.0, 0.1, False),
        ((900, 900, 900), 2, 9.0, 4.0, True),
    ],
)
def test_experts_that_cannot_be_done_in_time_are_not_begun(
    rows: tuple[int, ...], done: int, took_s: float, left_s: float, late: bool
) -> None:
    with pytest.raises(FunctionTimeError, match="take about") if late else nullcontext():
        refuse_late(rows, done, took_s, lambda: left_s)
