"""An expert function as a worker of the twin: what it imports, how fast it starts, what it refuses."""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from remoe_cli.cages import Mechanism
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.function.codec import Batch, from_wire, pack, to_wire, unpack
from remoe_cli.function.expert_ffn import narrow
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.shards import write_shard
from remoe_cli.package.bundle import HANDLER, function_zip
from tests.support.families import HIDDEN_SIZE, build
from tests.support.shards import shard_environment
from tests.support.twin import Running, run_twin

# The same work done the usual way: torch and safetensors, only the expert that is asked for.
TORCH_WORKER = """
import base64, json, os
import numpy as np, torch
from safetensors import safe_open
from function.codec import unpack
torch.set_num_threads(1)

def handle(event, context):
    batch = unpack(base64.b64decode(event))
    with safe_open(os.environ["REMOE_SHARD"], framework="pt") as shard:
        up, down = (shard.get_tensor(f"{batch.experts[0]:05d}.{name}") for name in ("gate_up_proj", "down_proj"))
    x = torch.from_numpy(batch.data.copy()).view(torch.bfloat16)
    gate, up = torch.nn.functional.linear(x, up).chunk(2, dim=-1)
    y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)
    return base64.b64encode(y.view(torch.uint16).numpy().tobytes()).decode()
"""
ROWS = np.random.default_rng(0).standard_normal((1, HIDDEN_SIZE), dtype=np.float32)
EVENT = to_wire(pack(Batch("bfloat16", (3,), (1,), narrow(ROWS, "bfloat16"))))


@pytest.fixture
def twin(tmp_path: Path, probed: Mechanism) -> Iterator[Running]:
    write_shard(tmp_path / "layer.safetensors", expert_layers(build("mixtral", torch.bfloat16))[0], range(8))
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(tmp_path / "code")
    (tmp_path / "code" / "torch_worker.py").write_text(TORCH_WORKER)
    functions = [
        FunctionConfig(
            name=name,
            handler=handler,
            code_dir=str(tmp_path / "code"),
            environment=shard_environment(tmp_path / "layer.safetensors"),
            memory_mb=1769,
            timeout_s=30,
            reserved_concurrency=1,
        )
        for name, handler in (("ours", HANDLER), ("torch", "torch_worker.handle"))
    ]
    with run_twin(functions, tmp_path / "logs", probed, idle_ttl_s=0.2) as running:
        yield running


def test_no_framework_is_loaded(twin: Running, measured: Callable[[str], None]) -> None:
    twin.raw(EVENT, "ours")
    health = twin.call({"health": True}, name="ours")
    assert {"numpy", "numkong", "awslambdaric", "function"} <= set(health["modules"])
    assert {"torch", "transformers", "boto3", "safetensors", "remoe_cli"}.isdisjoint(health["modules"])
    assert health["experts"] == list(range(8)) and health["experts_ready"] == [3]
    assert twin.call({"health": True, "bring": [1, 2]}, name="ours")["experts_ready"] == [3], "experts are read, and not made ready"
    split = health["cold_start"]
    assert set(split) == {"process_s", "imports_s", "weights_s", "first_result_s"} and all(0 < s < 5 for s in split.values())
    measured(
        f"function worker: {sum(split.values()) * 1000:.0f} ms from process start to first result, {len(health['modules'])} modules ("
        + ", ".join(f"{name.removesuffix('_s')} {s * 1000:.1f}" for name, s in split.items())
        + ")"
    )


@pytest.mark.alone
def test_it_starts_in_a_fifth_of_a_torch_workers_time(twin: Running, measured: Callable[[str], None]) -> None:
    """Cold start to first answer, in turns. The first of ours only fills the page cache; torch, which this process has read, is in it."""
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    answers = {}
    for name in ("ours", "torch", "ours", "torch", "ours", "ours"):
        start = time.perf_counter()
        answers[name] = twin.raw(EVENT, name)
        times[name].append(time.perf_counter() - start)
        assert "FunctionError" not in answers[name], answers[name]["body"]
        while any(f["instances"] for f in twin.status()["functions"]):
            time.sleep(0.05)
    ours, theirs = statistics.median(times["ours"][1:]), min(times["torch"])
    measured(f"cold start to first answer: {ours * 1000:.0f} ms, a torch worker {theirs * 1000:.0f} ms, ratio {ours / theirs:.3f}")
    assert ours / theirs <= 0.2
    same = np.frombuffer(base64.b64decode(json.loads(answers["torch"]["body"])), dtype=np.uint16)
    assert np.array_equal(unpack(from_wire(answers["ours"]["body"])).data[0], same)


@pytest.mark.parametrize(
    ("event", "kind", "message"),
    [
        (to_wire(pack(Batch("bfloat16", (9,), (1,), narrow(ROWS, "bfloat16")))), "WeightsError", "expert 9 is not in this function"),
        (to_wire(pack(Batch("float32", (3,), (1,), ROWS))), "FrameError", "this function's experts are bfloat16"),
        (to_wire(pack(Batch("bfloat16", (3,), (1,), narrow(ROWS[:, :8], "bfloat16")))), "FrameError", "width"),
        (b'"AAAA"', "FrameError", "shorter than its head"),
        (b'{"health": true, "bring": [9]}', "WeightsError", "expert 9 is not in this function"),
        (b'{"health": false}', "FrameError", "neither a frame nor a request for health or for the end"),
    ],
)
def test_what_it_refuses_it_names(twin: Running, event: bytes, kind: str, message: str) -> None:
    answer = twin.raw(event, "ours")
    error = json.loads(answer["body"])
    assert answer["FunctionError"] == "Unhandled"
    assert error["errorType"] == kind and message in error["errorMessage"]
    assert "FunctionError" not in twin.raw(EVENT, "ours")
