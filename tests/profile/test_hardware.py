"""Described hardware: every figure has a source, the roofline is the one worked out by hand, and what is wrong is named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.errors import UsageError
from remoe_cli.model.spec import KvLayer, MoeSpec
from remoe_cli.model.stored import StoredWeights
from remoe_cli.profile.hardware import hardware_names, latency_from, read_hardware, whole_on_cpu, whole_on_gpu
from remoe_cli.profile.latency_record import Roofline

G5 = (resources.files("remoe_cli.profile") / "hardware" / "g5.xlarge.toml").read_text()


def spec(expert_mb: float, nonexpert_mb: float, layers: int, hidden: int, dtype: str = "bfloat16") -> MoeSpec:
    return MoeSpec(
        family="mixtral",
        dtype=dtype,
        hidden_size=hidden,
        hidden_layers=layers,
        moe_layers=tuple(range(1, layers)),
        experts_per_layer=8,
        top_k=2,
        expert_bytes=round(expert_mb * 1e6),
        nonexpert_bytes=round(nonexpert_mb * 1e6),
        hidden_state_bytes=2 * hidden,
        kv_layers=tuple(KvLayer(bytes_per_token=1024) for _ in range(layers)),
    )


SIZES = {"small": spec(1, 300, 24, 1024), "DeepSeek-V2-Lite": spec(17.3, 2600, 27, 2048), "Mixtral-8x7B": spec(352, 3100, 32, 4096)}


def test_the_ready_ones() -> None:
    assert set(hardware_names()) >= {"g4dn.xlarge", "g5.xlarge", "g6.xlarge", "g6e.xlarge", "p5.48xlarge", "paper", "lambda"}
    for name in hardware_names():
        hardware = read_hardware(name)
        assert (hardware.name, hardware.file.path) == (name, name)
        assert (hardware.gpu is None) == (name == "lambda")
        assert hardware.gpu is None or hardware.gpu.expert_overhead_s == 0.15e-3
    cpus = read_hardware("lambda")
    assert cpus.main.vcpus == cpus.main.saturation_vcpus == pytest.approx(10240 / 1769, abs=0.005)
    assert cpus.function == read_hardware("g5.xlarge").function
    paper = read_hardware("paper")
    assert (paper.main.bytes_per_s_per_vcpu, paper.main.flop_per_s_per_vcpu) == (2.5e9, 30e9)
    assert paper.gpu is not None and paper.gpu.bytes_per_s == 1.5e12
    assert (paper.main.layer_overhead_s, paper.main.load_bytes_per_s) == (0.001, 2e9)


def test_one_case_by_hand() -> None:
    """g5.xlarge: 6.4 GB/s and 20 GFLOP/s a vCPU, 35 in a function, A10G of 600 GB/s and 70 TFLOP/s."""
    latency = latency_from("g5.xlarge", spec(expert_mb=12.8, nonexpert_mb=1200, layers=10, hidden=1100))
    assert (latency.source, latency.machine, latency.measured_on) == ("described", "g5.xlarge", "2026-11-30")
    # 12.8 MB at 6.4 GB/s are 2 ms; 6.4 M weights are 12.8 MFLOP a token, 0.64 ms at 20 GFLOP/s: reading decides up to 3 tokens
    assert latency.local_expert.seconds([0, 1, 3, 4, 100], 1) == pytest.approx([0, 2.1e-3, 2.1e-3, 2.66e-3, 64.1e-3])
    assert latency.remote_expert.seconds([5, 100], 1) == pytest.approx([2.1e-3, 1e-4 + 100 * 12.8e6 / 35e9])
    assert latency.local_expert.seconds(1, [1, 4, 8]) == pytest.approx([2.1e-3, 0.6e-3, 0.6e-3])  # it has 4 vCPUs
    assert latency.remote_expert.seconds(1, [0.25, 1, 2]) == pytest.approx([8.1e-3, 2.1e-3, 2.1e-3])  # and the function one thread
    # 10 layers of 1 ms; 1.2 GB at 600 GB/s are 2 ms; 1.2 GFLOP a token at 70 TFLOP/s
    assert latency.nonexpert_decode_s == pytest.approx(12e-3)
    assert latency.nonexpert_prefill.seconds([0, 1, 100, 1000]) == pytest.approx([0, 12e-3, 12e-3, 10e-3 + 1200e9 / 70e12])
    # 20 us and 2,200 bytes a token at 22 GB/s
    assert latency.copy_s.seconds([1, 1000]) == pytest.approx([20.1e-6, 120e-6])
    assert latency.load_s == pytest.approx((1200e6 + 9 * 8 * 12.8e6) / 400e6)
    assert latency.main_vcpus == 4
    assert latency.warnings == ()


def test_a_packed_expert_is_read_as_it_is_stored_and_computed_as_if_it_were_not() -> None:
    plain = spec(expert_mb=12.8, nonexpert_mb=1200, layers=10, hidden=1100)
    stored = StoredWeights(format="MXFP4", expert_bytes=3_400_000, nonexpert_bytes=1_200_000_000, served=True, packed=True)
    one, packed = (latency_from("g5.xlarge", each).remote_expert.curve for each in (plain, plain.model_copy(update={"stored": stored})))
    assert isinstance(one, Roofline) and isinstance(packed, Roofline)
    assert packed.weights_s == pytest.approx(one.weights_s * 3.4 / 12.8) and packed.per_token_s == one.per_token_s


def test_a_whole_model_on_one_device_by_hand() -> None:
    """On g5.xlarge's A10G (600 GB/s, 70 TFLOP/s, 0.15 ms an expert), and on its 4 vCPUs (6.4 GB/s and 20 GFLOP/s each)."""
    hardware, sizes = read_hardware("g5.xlarge"), spec(expert_mb=12, nonexpert_mb=1200, layers=10, hidden=1100)
    rest, expert = whole_on_gpu(hardware, sizes)
    assert rest == latency_from("g5.xlarge", sizes).nonexpert_prefill
    # 12 MB at 600 GB/s are 20 us; 12 MFLOP a token at 70 TFLOP/s are longer from 117 tokens on
    assert expert.seconds([0, 1, 100, 7000], 1) == pytest.approx([0, 0.17e-3, 0.17e-3, 0.15e-3 + 1.2e-3])
    assert expert.seconds(1, 1) == expert.seconds(1, 64)
    rest, expert = whole_on_cpu(hardware, sizes)
    # 10 layers of 1 ms; 1.2 GB at 25.6 GB/s; 1.2 GFLOP a token at 80 GFLOP/s
    assert rest.seconds([1, 100]) == pytest.approx([10e-3 + 1200e6 / 25.6e9, 10e-3 + 1.5])
    assert expert == latency_from("g5.xlarge", sizes).local_expert.curve


def test_a_whole_model_needs_a_gpu_to_be_on_one() -> None:
    with pytest.raises(UsageError, match=r"lambda has no \[gpu\]"):
        whole_on_gpu(read_hardware("lambda"), SIZES["small"])
    rest, _ = whole_on_cpu(read_hardware("lambda"), SIZES["small"])
    assert rest == latency_from("lambda", SIZES["small"]).nonexpert_prefill


def test_float32_has_half_as_many_weights_in_the_same_bytes() -> None:
    half, single = (latency_from("paper", spec(10, 100, 4, 64, dtype)) for dtype in ("bfloat16", "float32"))
    assert float(half.local_expert.seconds(1000, 1)) == pytest.approx(2 * float(single.local_expert.seconds(1000, 1)))
    assert float(half.local_expert.seconds(1, 1)) == pytest.approx(float(single.local_expert.seconds(1, 1)))


@pytest.mark.parametrize("name", hardware_names())
@pytest.mark.parametrize("size", SIZES)
def test_more_tokens_take_longer_and_more_vcpus_do_not(name: str, size: str) -> None:
    latency = latency_from(name, SIZES[size])
    tokens, vcpus = np.array([1, 2, 8, 64, 512, 4096]), np.array([[0.07], [0.5], [1], [2], [4], [16]])
    for timing in (latency.local_expert, latency.remote_expert):
        seconds = timing.seconds(tokens, vcpus)
        assert np.isfinite(seconds).all() and (seconds > 0).all()
        assert (np.diff(seconds, axis=1) >= 0).all() and (np.diff(seconds, axis=0) <= 0).all()
        assert (seconds[:, -1] > seconds[:, 0]).all() and (seconds[0] > seconds[-1]).all()
    for line in (latency.nonexpert_prefill, latency.copy_s):
        assert (np.diff(line.seconds(tokens)) >= 0).all()
    assert latency.nonexpert_prefill.seconds(1) > 0 and (latency.copy_s.seconds(1) > 0) == (name != "lambda")
    assert latency.load_s > 0


def test_without_a_gpu_the_cpu_does_it_all(tmp_path: Path) -> None:
    gpu = G5[G5.index("[gpu]") : G5.index("[function]")]
    provenance = "".join("[[provenance]]" + entry for entry in G5.split("[[provenance]]")[1:] if "gpu." not in entry)
    path = tmp_path / "cpu.toml"
    path.write_text(G5[: G5.index("[[provenance]]")].replace(gpu, "") + provenance)
    latency = latency_from(str(path), spec(expert_mb=12.8, nonexpert_mb=1280, layers=10, hidden=1100))
    assert float(latency.copy_s.seconds(100)) == 0
    # 1.28 GB at 4 x 6.4 GB/s are 50 ms
    assert latency.nonexpert_decode_s == pytest.approx(60e-3)
    assert float(latency.nonexpert_prefill.seconds(1000)) == pytest.approx(10e-3 + 1280e9 / 80e9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vcpus = 4.0", "vcpus = 0.0", "main.vcpus"),
        ("flop_per_s = 70e12", "flop_per_s = inf", "gpu.flop_per_s"),
        ("load_bytes_per_s = 400e6", "", "main.load_bytes_per_s"),
        ("load_bytes_per_s = 400e6", "load_bytes_per_s = 400e6\nspeed = 1.0", "main.speed"),
        ("copy_bytes_per_s = 22e9\nexpert_overhead_s = 0.00015\n", "copy_bytes_per_s = 22e9\n", "gpu.expert_overhead_s"),
        ('"gpu.copy_latency_s"', '"gpu.latency_s"', "no provenance for gpu.copy_latency_s"),
        ('of = ["main.vcpus"]', 'of = ["main.vcpus", "gpu.flop_per_s"]', "repeated gpu.flop_per_s"),
        ("remoe.hardware/1", "remoe.hardware/2", "schema_version"),
        ("[main]", "[main", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in G5
    path = tmp_path / "mine.toml"
    path.write_text(G5.replace(old, new, 1))
    with pytest.raises(UsageError) as raised:
        latency_from(str(path), SIZES["small"])
    assert message in raised.value.message and str(path) in raised.value.message


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no hardware description named 'mars'") as raised:
        latency_from("mars", SIZES["small"])
    assert all(name in raised.value.hint for name in hardware_names())
    with pytest.raises(UsageError, match="cannot be read"):
        latency_from(str(tmp_path / "none.toml"), SIZES["small"])
