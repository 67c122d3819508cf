"""The device of everything but the experts: no plan for a GPU is served on a CPU in silence, and a full GPU is named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from remoe_cli.deploy.local import overview
from remoe_cli.errors import DeployError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.runtime import batch, device, engine
from remoe_cli.runtime.device_choice import DeviceChoice
from tests.support.by_hand import by_hand


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find(by_hand(tmp_path_factory.mktemp("made"), ()).profile.record.model.path)


def test_without_a_gpu_in_the_plan_the_cpu_is_named() -> None:
    assert device.choose(False) == "cpu"
    named = device.describe(torch.device("cpu"))
    assert (named.kind, named.driver) == ("cpu", None) and named.name and named.memory_bytes > 2**28


@pytest.mark.parametrize(
    ("cuda", "remark", "why"),
    [
        (None, None, f"torch {torch.__version__} is built for CPUs."),
        ("13.0", None, "no NVIDIA GPU is visible."),
        ("13.0", "Something else is deprecated.", "no NVIDIA GPU is visible."),
        ("13.0", "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Update it.\nMore", "too old"),
    ],
    ids=["torch for CPUs", "no GPU", "another remark", "old driver"],
)
def test_a_plan_for_a_gpu_is_refused_where_torch_can_use_none(
    cuda: str | None, remark: str | None, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def available() -> bool:
        if remark:
            warnings.warn(remark, stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.delenv(device.ALLOW_CPU, raising=False)
    with pytest.raises(DeployError, match="on a GPU, and torch can use none here") as refused:
        device.choose(True)
    assert why in refused.value.message and device.ALLOW_CPU in refused.value.hint
    monkeypatch.setenv(device.ALLOW_CPU, "1")
    with caplog.at_level(logging.WARNING):
        assert device.choose(True) == "cpu"
    assert why in caplog.text and "served on the CPU" in caplog.text


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("usable", [False, True])
def test_who_asks_for_a_device_gets_that_one(
    gpu: bool, usable: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setenv(device.ALLOW_CPU, "1")
    with caplog.at_level(logging.WARNING):
        assert device.choose(gpu, DeviceChoice.CPU) == "cpu"
        assert ("the CPU was asked for" in caplog.text) == gpu
        caplog.clear()
        assert device.choose(gpu, DeviceChoice.AUTO) == ("cuda" if usable else "cpu")
        assert ("is on the GPU" if usable else "is on the CPU, because torch can use no GPU here: ") in caplog.text
    if usable:
        assert device.choose(gpu, DeviceChoice.CUDA) == "cuda"
        return
    with pytest.raises(DeployError, match="A GPU was asked for, and torch can use none here") as refused:  # whatever $REMOE_ALLOW_CPU says
        device.choose(gpu, DeviceChoice.CUDA)
    assert "Install torch for the CUDA version" in refused.value.hint


def test_experts_of_the_gpu_tier_are_local_where_the_cpu_serves(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(checkpoint)
    first = spec.moe_layers[0]
    made = engine.start_engine(checkpoint, spec, {}, lambda *_: None, gpu=True, gpu_experts={first: (0, 2)}, device=DeviceChoice.CPU)
    assert len(made.dispatcher.local[first]) == spec.experts_per_layer and not made.dispatcher.gpu and not made.dispatcher.starts


def test_the_engine_refuses_before_anything_starts(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(device.ALLOW_CPU, raising=False)

    def connect(connections: int, timeout_s: float) -> Any:
        pytest.fail("functions were reached")

    functions = {0: [engine.RemoteFunction("f", (0, 1), 1, 0.0)]}
    with pytest.raises(DeployError, match="torch can use none here"):
        engine.start_engine(checkpoint, read_spec(checkpoint), functions, connect, gpu=True)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has .."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("full", FULL, ids=["torch", "cuBLAS"])
def test_a_full_gpu_is_an_error_that_says_what_to_do(full: RuntimeError, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise full

    made = engine.start_engine(checkpoint, read_spec(checkpoint), {}, lambda *_: None)
    monkeypatch.setattr(batch.Batch, "_forward", fail)
    with pytest.raises(DeployError, match=r"^The GPU's memory is full: CUDA [^\n]+$") as error:
        made.generate([1, 2], 4)
    assert "Plan again for requests as long" in error.value.hint
    monkeypatch.setattr(engine, "choose", lambda *_: "cuda")
    monkeypatch.setattr(engine, "load", fail)
    with pytest.raises(DeployError, match="The GPU's memory is full") as error:
        engine.start_engine(checkpoint, read_spec(checkpoint), {}, lambda *_: None, gpu=True)
    assert "Free the GPU" in error.value.hint


def test_another_error_of_torch_is_not_taken_for_a_full_gpu() -> None:
    with pytest.raises(RuntimeError, match="shapes"), device.full_memory_named("-"):
        raise RuntimeError("shapes do not fit")


def test_naming_a_device_needs_no_torch() -> None:
    """Receipts are read where torch is not imported."""
    code = "import sys, json; import remoe_cli.runtime.device; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) is False


def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(device, "_DRIVER", file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(device.ALLOW_CPU, raising=False)
    assert device._driver() is None
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:12:49 UTC 2025\nGCC version: gcc 12.2.0\n")
    assert device._driver() == "580.65.06"
    with pytest.raises(DeployError, match=r"the NVIDIA driver 580\.65\.06 does not run CUDA 13\.0"):
        device.choose(True)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            {"kind": "cuda", "name": "NVIDIA A10G", "memory_bytes": 24 * 10**9, "driver": "580.65.06"},
            "cuda: NVIDIA A10G, 24 GB, driver 580.65.06",
        ),
        ({"kind": "cpu", "name": "AMD EPYC", "memory_bytes": 16 * 10**9, "driver": None}, "cpu: AMD EPYC, 16 GB"),
        ("cpu", "cpu"),
    ],
    ids=["GPU", "CPU", "a main server of an earlier version"],
)
def test_the_status_names_the_device(named: Any, said: str) -> None:
    spent = {purpose: {"billed_ms": 0} for purpose in ("loading", "answers", "cancelled")}
    held = {"expert_bytes_held": 1, "expert_bytes_of_model": 2, "local_experts": 1, "experts_of_model": 2, "spent": spent, "device": named}
    main = {"kind": "server", "port": 1, "pid": 2, "state": "running", "resident_bytes": 3, **held}
    limits = {"memory": "cgroup-v2", "cpu": "cfs-quota"}
    status = {"name": "d", "state": "running", "endpoint": "http://127.0.0.1:3", "limits": limits, "main": main, "functions": []}
    assert f"all else is on {said}" in "\n".join(overview.overview(status).above)


def test_the_status_counts_the_experts_on_the_gpu() -> None:
    spent = {purpose: {"billed_ms": 0} for purpose in ("loading", "answers", "cancelled")}
    held = {"expert_bytes_held": 1, "expert_bytes_of_model": 2, "local_experts": 5, "gpu_experts": 3, "experts_of_model": 8, "spent": spent}
    main = {"kind": "server", "port": 1, "pid": 2, "state": "running", "resident_bytes": 3, "device": "cuda", **held}
    limits = {"memory": "cgroup-v2", "cpu": "cfs-quota"}
    status = {"name": "d", "state": "running", "endpoint": "http://127.0.0.1:3", "limits": limits, "main": main, "functions": []}
    assert "  holds 5 of 8 experts (3 on the GPU): 1 byte" in "\n".join(overview.overview(status).above)
