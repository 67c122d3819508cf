"""Measured latencies of tiny models: sane numbers, the right layer, threads and groups put back, and warnings."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli import cages
from remoe_cli.errors import ModelError
from remoe_cli.function.errors import FunctionProcessorError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.experts import ExpertLayer, expert_layers, run_expert
from remoe_cli.model.loader import load
from remoe_cli.profile import function_latency, function_timing, latency, pass_times, run
from remoe_cli.profile.latency_record import CpuQuota, Latency, MeasuredPoint
from remoe_cli.profile.pass_times import ExpertCall, Pass, PassTimes, time_passes
from tests.support.families import EXPERTS, build, save
from tests.support.quantised import save_quantised
from tests.support.synthetic import inverse


@pytest.fixture(scope="module")
def measured() -> Iterator[Latency]:
    threads = torch.get_num_threads()
    yield latency.measure(build("qwen3_moe", torch.bfloat16), load_s=1.5)
    assert torch.get_num_threads() == threads


def test_everything_measured_is_positive_and_finite(measured: Latency) -> None:
    assert (measured.source, measured.load_s, measured.main_vcpus) == ("measured", 1.5, torch.get_num_threads())
    assert 0 < measured.nonexpert_decode_s < 5
    assert 0 < float(measured.nonexpert_prefill.seconds(1)) <= float(measured.nonexpert_prefill.seconds(1000)) < 60
    for timing in (measured.local_expert, measured.remote_expert):
        assert all(0 < point.seconds < 5 for point in timing.points)
        assert timing.held_out_error is not None and min(timing.errors.values()) >= 0
        assert len(timing.residuals) == len(timing.points)
        seconds = timing.seconds([1, 10, 100, 1000], [[0.1], [1.0], [2.0]])
        assert np.isfinite(seconds).all() and (seconds > 0).all() and (np.diff(seconds, axis=1) >= 0).all()
    assert float(measured.copy_s.seconds(100)) == 0  # no accelerator
    assert Latency.model_validate_json(measured.model_dump_json()) == measured


def test_experts_are_timed_over_tokens_and_vcpus(measured: Latency, probed: cages.Mechanism) -> None:
    local = {(p.tokens, p.vcpus) for p in measured.local_expert.points}
    assert local == {(n, v) for n in (1, 4, 16, 64, 256) for v in latency._thread_counts()}
    assert {1, torch.get_num_threads(), len(os.sched_getaffinity(0))} <= set(latency._thread_counts())
    remote = {(p.tokens, round(p.vcpus, 3)) for p in measured.remote_expert.points}
    shares = (0.072, 0.289, 0.579, 1.0) if probed.cpu_root else (1.0,)
    assert remote == {(n, v) for n in (1, 4, 16, 64, 256) for v in shares}


def test_layers_add_up_and_dense_ones_count(measured: Latency) -> None:
    """qwen3_moe of tests/support/families.py has three layers, the middle one dense."""
    layers = measured.nonexpert_layers
    assert layers is not None
    assert layers.names == ("model.layers.0", "model.layers.1", "model.layers.2", "rest")
    assert layers.tokens == (0, 16, 64, 192)
    seconds = np.array(layers.seconds)
    assert seconds.shape == (4, 4) and (seconds > 0).all()
    assert measured.nonexpert_decode_s == pytest.approx(seconds[:, 0].sum())
    assert layers.spread >= 1


@pytest.mark.alone
def test_the_spread_is_that_of_passes_which_take_unlike_times() -> None:
    model = build("mixtral")
    naps = cycle([0.0, 0.1, 0.1])
    model.lm_head.register_forward_hook(lambda *_: time.sleep(next(naps)))
    with torch.inference_mode():
        layers = time_passes(model).nonexpert
    assert 2 < layers.spread < 200


@pytest.mark.parametrize("family", ["deepseek_v2", "nemotron_h", "gpt_oss"])
def test_every_decoder_layer_is_found(family: str) -> None:
    model = build(family)
    assert len(pass_times.decoder_layers(model, expert_layers(model)[0])) == model.config.num_hidden_layers


@pytest.mark.alone
def test_time_goes_to_the_layer_that_takes_it() -> None:
    model = build("qwen3_moe")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: time.sleep(0.03))
    model.lm_head.register_forward_hook(lambda *_: time.sleep(0.06))
    with torch.inference_mode():
        passes = time_passes(model).decode
    seconds = [min(times) for times in zip(*(one.layers_s for one in passes), strict=True)]
    assert len(passes) >= 3 and len(seconds) == 4
    assert seconds[1] > 0.03 + max(seconds[0], seconds[2]) / 2
    assert seconds[3] > 0.06 and seconds[3] > seconds[1]
    assert all(not module._forward_pre_hooks for module in model.model.layers)


@pytest.mark.alone
def test_an_experts_time_in_a_pass_counts_and_not_to_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = build("qwen3_moe"), run_expert

    def slow(layer: ExpertLayer, row: int, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002 if len(x) == 1 else 0.004)
        return real(layer, row, x)

    monkeypatch.setattr(pass_times, "run_expert", slow)
    with torch.inference_mode():
        passes = time_passes(model)
        alone = latency._alone(expert_layers(model))
    top_k = model.config.num_experts_per_tok
    assert all(len(one.experts) == 2 * top_k and {call.layer for call in one.experts} == {0, 2} for one in passes.decode)
    of_experts = min(sum(call.seconds for call in one.experts) for one in passes.decode)
    assert min(sum(one.layers_s[:3]) for one in passes.decode) < of_experts
    slower = latency._slower_in_passes(alone, passes)
    threads = torch.get_num_threads()
    in_passes = {point.tokens: latency._in_passes(point, slower).seconds for point in alone if point.vcpus == threads}
    assert 0.002 < in_passes[1] < 0.004 and 0.003 < in_passes[16] < 0.012


def test_passes_are_compared_with_as_many_threads_and_no_more_rows_than_were_timed() -> None:
    times = {1: 1.0, 2: 0.5, 64: 8.0}  # far more threads than cores are slow
    alone = [MeasuredPoint(tokens=n, vcpus=v, seconds=t * n) for v, t in times.items() for n in (1, 16)]
    rows = (1, 16, 150)  # nothing says what 150 rows take alone
    passes = [Pass((0.1,), tuple(ExpertCall(0, n, 1.2 * times[threads] * n) for n in rows)) for threads in times]
    for threads, one in zip(times, passes, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert latency._slower_in_passes(alone, PassTimes(("layers.0",), (one,), ((one,),))) == pytest.approx((1.2, 1.2))


def test_no_group_of_the_measurement_is_left(measured: Latency, probed: cages.Mechanism) -> None:
    assert not [group for root in probed.groups for group in root.parent.glob(f"remoe-profile-{os.getpid()}*")]


@pytest.mark.alone
def test_a_small_share_really_slows_long_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, probed: cages.Mechanism) -> None:
    if probed.cpu_root is None:
        pytest.skip("nobody may set a CPU quota here")
    monkeypatch.setattr(function_latency, "_TOKENS", (20_000,))
    monkeypatch.setattr(function_latency, "_MEMORY_MB", (128,))
    fast, slow = function_latency._points(list(function_latency._shards(tmp_path, expert_layers(build("qwen3_moe", torch.bfloat16)))))
    assert (round(slow.vcpus, 3), fast.vcpus) == (0.072, 1.0)
    assert slow.seconds > 4 * fast.seconds  # about 14 times, less what neighbours take from the fast one


def test_without_a_quota_the_curve_computes_what_one_would_do(monkeypatch: pytest.MonkeyPatch, measured: Latency) -> None:
    monkeypatch.setattr(cages, "probe", lambda label: cages.rlimit_only())
    timing = function_latency.function_expert(expert_layers(build("qwen3_moe", torch.bfloat16)))
    assert {point.vcpus for point in timing.points} == {1.0}
    assert isinstance(timing.curve, CpuQuota) and set(timing.errors) == {"quota"}
    warnings = measured.model_copy(update={"remote_expert": timing}).warnings
    assert any("No CPU quota" in sentence for sentence in warnings)


def test_packed_experts_are_timed_as_functions_compute_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the checkpoint's own bytes: the process that times them cannot start where there is no packed product."""
    monkeypatch.setattr(cages, "probe", lambda label: cages.rlimit_only())
    save_quantised("gpt_oss", "mxfp4", tmp_path / "mxfp4")
    save_quantised("qwen3_moe", "fp8", tmp_path / "fp8")
    save("qwen3_moe", torch.bfloat16, tmp_path / "plain", fused=False)
    for form in ("mxfp4", "fp8", "plain"):
        checkpoint = find(str(tmp_path / form))
        layers = expert_layers(load(checkpoint))
        with pytest.raises(ModelError, match=r"measured: the experts of .* it is not quantised") if form == "plain" else nullcontext():
            timing = function_latency.function_expert(layers, checkpoint)
            assert {point.vcpus for point in timing.points} == {1.0} and all(point.seconds > 0 for point in timing.points)


def test_warnings_name_what_cannot_be_trusted(measured: Latency) -> None:
    sound = inverse(1e-3, 1e-4, 1).model_copy(update={"held_out_error": 0.15, "points": (MeasuredPoint(tokens=1, vcpus=0.5, seconds=1.0),)})
    poor = sound.model_copy(update={"held_out_error": 0.1501})
    both = measured.model_copy(update={"local_expert": sound, "remote_expert": sound, "nonexpert_layers": None})
    assert both.warnings == ()
    (warning,) = both.model_copy(update={"local_expert": poor}).warnings
    assert "main function" in warning and "15%" in warning and "physical" in warning
    (warning,) = both.model_copy(update={"remote_expert": poor}).warnings
    assert "expert function" in warning
    assert measured.nonexpert_layers is not None
    (warning,) = both.model_copy(update={"nonexpert_layers": measured.nonexpert_layers.model_copy(update={"spread": 2.0})}).warnings
    assert "2.0 times" in warning and "quiet machine" in warning


def test_a_processor_that_cannot_compute_packed_experts_is_said_with_those_that_can() -> None:
    reason = "packed experts need a processor with AVX2 and FMA, and this one lacks them"
    made = function_latency._failed(f"Traceback\n  File x\nremoe_cli.function.errors.FunctionProcessorError: {reason}\n")
    assert made.message == f"The time of the function's arithmetic cannot be measured: {reason}."
    assert "on an x86-64 processor with AVX2 and FMA or on arm64" in made.hint and "--latency-from" in made.hint


def test_a_processor_without_packed_products_times_dequantised_experts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert function_latency.computes_packed(said.append) and not said

    def none() -> None:
        raise FunctionProcessorError("this one lacks AVX2")

    monkeypatch.setattr(function_latency, "library", none)
    assert not function_latency.computes_packed(said.append)
    assert said == ["Experts are timed dequantised alone, so plans of this profile have functions dequantise them: this one lacks AVX2."]


def test_a_function_that_cannot_be_timed_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"cannot be measured: .*No such file"):
        list(function_latency._points([Path("nowhere.safetensors")]))


@pytest.mark.alone
def test_more_tokens_are_not_tried_after_a_call_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_timing, "_ENOUGH_S", 0.02)
    slow: Any = SimpleNamespace(width=4, spec=SimpleNamespace(dtype="float32"), run=lambda x: time.sleep(0.01 * len(x)))
    points = list(function_timing._points([1, 4, 16], iter([slow] * 20), 0.001, np.random.default_rng(0)))
    assert [n for n, _ in points] == [1, 4]
    assert [s for _, s in points] == pytest.approx([0.01, 0.04], rel=0.5)


def test_experts_come_from_as_many_layers_as_outgrow_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = expert_layers(build("mixtral", torch.bfloat16))
    each = sum(p.numel() * p.element_size() for p in layers[0].parameters().values()) // EXPERTS
    monkeypatch.setattr(function_latency, "_BEYOND_CACHE_BYTES", each * EXPERTS + 1)
    assert [path.name for path in function_latency._shards(tmp_path, layers)] == ["0.safetensors", "1.safetensors"]
    monkeypatch.setattr(function_latency, "_BEYOND_CACHE_BYTES", each)
    assert [path.name for path in function_latency._shards(tmp_path, layers)] == ["0.safetensors"]


def test_times_of_a_gpu_are_not_taken_for_those_of_a_cpu(measured: Latency) -> None:
    """A run on another device measures again; where nobody says on what, any times do."""
    with_gpu = measured.model_copy(update={"gpu_expert": measured.local_expert})
    assert "gpu_expert" not in measured.model_dump_json() and "gpu_expert" in with_gpu.model_dump_json()
    on_gpu = (None, False, True)
    assert [run._is_measured(measured, each) for each in on_gpu] == [True, True, False]
    assert [run._is_measured(with_gpu, each) for each in on_gpu] == [True, False, True]
    assert not run._is_measured(with_gpu.model_copy(update={"source": "described"}), None)
