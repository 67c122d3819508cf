"""Calibration against real twin workers: spreads in order, cold starts that are cold, and a profile that carries them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from remoe_cli.cages import Mechanism
from remoe_cli.cli import app
from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.errors import DeployError, InvokeError
from remoe_cli.model.experts import expert_layers
from remoe_cli.model.shards import write_shard
from remoe_cli.package.bundle import HANDLER, function_zip
from remoe_cli.profile.latency_record import ColdStart
from remoe_cli.profile.record import read_profile
from remoe_cli.runtime import calibrate
from remoe_cli.runtime.calibrate import measure_target, quantiles, with_target
from remoe_cli.runtime.invoke import make_client
from tests.support.families import build
from tests.support.shards import shard_environment
from tests.support.synthetic import invocation, synthetic_profile
from tests.support.twin import Running, run_twin

RTT_S = 0.03


@pytest.fixture
def twin(tmp_path: Path, probed: Mechanism) -> Iterator[Running]:
    """Two functions with three experts each, and one that says less of itself, 30 ms away."""
    zipfile.ZipFile(io.BytesIO(function_zip())).extractall(tmp_path / "code")
    (tmp_path / "code" / "old.py").write_text("def handle(event, context):\n    return {'experts': [1]}\n")
    layers = expert_layers(build("mixtral", torch.bfloat16))
    for index, layer in enumerate(layers):
        write_shard(tmp_path / f"layer-{index}.safetensors", layer, [1, 4, 6])
    functions = [
        FunctionConfig(
            name=name,
            handler=handler,
            code_dir=str(tmp_path / "code"),
            environment=shard_environment(tmp_path / f"layer-{index}.safetensors"),
            memory_mb=1769,
            timeout_s=30,
            reserved_concurrency=1,
        )
        for name, handler, index in (("f0", HANDLER, 0), ("f1", HANDLER, 1), ("old", "old.handle", 0))
    ]
    with run_twin(functions, tmp_path / "logs", probed, rtt_ms=RTT_S * 1000) as running:
        yield running


def restarter(twin: Running) -> Callable[[str], None]:
    """What deploy/local/calibrate.py does, for a twin that lives in this process."""

    def restart(function: str) -> None:
        entry = next(f for f in twin.status()["functions"] if f["name"] == function)
        assert processes.end([p for i in entry["instances"] if (p := processes.reference(i["pid"]))]) == ()

    return restart


def test_warm_calls_and_cold_starts(
    twin: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]
) -> None:
    monkeypatch.setattr(calibrate, "_WARM_S", 2.0)
    client = make_client(twin.endpoint, 1, 30)
    warm, cold = measure_target("here", client, ["f0", "f1"], restarter(twin))
    client.close()
    for spread in (warm.unbilled_s, warm.billed_s):
        assert 0 < spread.p50 <= spread.p90 <= spread.p99
        assert list(spread.tenths) == sorted(spread.tenths) and spread.tenths[0] <= spread.p50 <= spread.tenths[-1]
    # The way to the function is waited for and not billed.
    assert warm.unbilled_s.tenths[0] >= RTT_S
    assert warm.billed_s.p50 < RTT_S
    assert 0 < warm.bytes_per_s < 1e13
    assert len({sample[0] for sample in warm.samples}) == 3
    assert all(elapsed > duration >= compute > 0 for _, elapsed, duration, compute in warm.samples)
    # Parts come from the worker, the total from the client: what is between them is the way there and the start of the process.
    parts = cold.process_s + cold.imports_s + cold.weights_s + cold.first_result_s
    assert cold.starts >= 2 and min(cold.process_s, cold.imports_s, cold.weights_s, cold.first_result_s) > 0
    assert 0.4 * cold.total_s < parts < cold.total_s * 1.05
    assert len(cold.waits_s) == cold.starts and list(cold.waits_s) == sorted(cold.waits_s)
    assert float(np.median(cold.waits_s)) == pytest.approx(cold.total_s)
    assert sum(f["cold_starts"] for f in twin.status()["functions"]) == 2 + cold.starts
    measured(f"cold start {cold.total_s * 1000:.0f} ms for the client, parts {parts * 1000:.0f} ms")

    profile = synthetic_profile(tmp_path / "profile")
    made = with_target(profile, tmp_path / "calibrated", warm, cold)
    again = read_profile(tmp_path / "calibrated")
    assert again.record.latency.invocation == warm and again.record.latency.cold_start == cold
    assert again.record.latency.remote_expert == profile.record.latency.remote_expert
    assert again.sha256 == made.sha256 != profile.sha256
    assert all(np.array_equal(again.arrays[name], array) for name, array in profile.arrays.items())


def test_a_function_that_does_not_start_cold_is_no_measurement(twin: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_WARM_S", 0.2)
    client = make_client(twin.endpoint, 1, 30)
    with pytest.raises(DeployError, match="No function of 'here' could be made to start cold"):
        measure_target("here", client, ["f0"], lambda function: None)
    client.close()


def test_a_deployment_without_functions_is_refused() -> None:
    with pytest.raises(DeployError, match="'here' has no expert functions to measure"):
        measure_target("here", None, [], lambda function: None)


def test_a_function_of_another_version_is_named(twin: Running) -> None:
    client = make_client(twin.endpoint, 1, 30)
    with pytest.raises(InvokeError, match="old does not report its 'width'"):
        measure_target("here", client, ["old"], restarter(twin))
    client.close()


def test_tenths_are_equally_likely_values_with_the_right_mean() -> None:
    seconds = np.random.default_rng(0).gamma(2.0, 1e-3, size=37)
    spread = quantiles(seconds)
    assert spread.mean == pytest.approx(seconds.mean(), rel=1e-12)
    assert len(spread.tenths) == 10 and list(spread.tenths) == sorted(spread.tenths)
    assert quantiles(np.array([-1e-4, 3e-3])).tenths == pytest.approx([0.0] * 5 + [3e-3] * 5)


@pytest.mark.parametrize("data", [False, True])
def test_what_was_measured_is_printed(
    data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measurement itself, whose test is above, takes seconds."""
    profile = synthetic_profile(tmp_path / "profile")
    warm = invocation(0).model_copy(update={"samples": ((80, 0.02, 0.01, 0.001),) * 1234})
    cold = ColdStart(starts=7, process_s=0.1, imports_s=0.9, weights_s=0.1, first_result_s=0.1, total_s=1.25)
    monkeypatch.setattr("remoe_cli.deploy.local.calibrate.calibrate", lambda name, out, *_: with_target(profile, out, warm, cold))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    arguments = ["remoe", "profile", "measure", "mine", *(("--data", str(tmp_path / "prompts.jsonl")) if data else ()), "-o"]
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / "a")])
    assert app.run() == 0
    shown = " ".join(capsys.readouterr().out.split())
    of = "the calls of 2 answers" if data else "the smallest of 1,234 calls"
    assert f"a warm call, outside the function {warm.unbilled_s.p50 * 1e3:.1f} ms {of}" in shown
    assert "a cold start 1,250.0 ms 7 starts" in shown
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / "b"), "--json"])
    assert app.run() == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["a cold start"] == {"median_s": 1.25, "of": "7 starts"} and len(measured) == 3
