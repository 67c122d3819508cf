"""One timeout for each function: the plan's number is the bundle's, the twin's, the dispatcher's and the template's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoe_cli import cages
from remoe_cli.artifacts import read_json
from remoe_cli.deploy.aws import access, contents
from remoe_cli.deploy.aws.template import templates
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local import calibrate, lifecycle, target
from remoe_cli.deploy.local.config import FunctionConfig, TwinConfig
from remoe_cli.deploy.target import DeployOptions
from remoe_cli.lambda_limits import INIT_LIMIT_S, MAX_TIMEOUT_S, read_timeout_s
from remoe_cli.package.bundle import Manifest
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import LayerPlan
from remoe_cli.runtime import client, container, engine, invoke
from remoe_cli.runtime.invoke import FailedCall, make_client, ping
from remoe_cli.runtime.server_config import ServerConfig
from tests.support import aws
from tests.support.by_hand import ByHand, by_hand, on_twin
from tests.support.handlers import server

HERE = target.LocalTarget(SILENT)
LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 3, 5), memory_mb=1769, replicas=1, functions=((1, 2), (3, 5)), timeout_s=47),
    LayerPlan(layer=1, remote=(1, 3), memory_mb=1769, replicas=1, timeout_s=123),
)
PLANNED = {"layer-000-0": 47, "layer-000-1": 47, "layer-001": 123}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    with on_twin(by_hand(tmp_path, LAYERS), tmp_path, monkeypatch) as made:
        yield made


def test_on_the_twin(made: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    HERE.deploy(made.plan_path, "t", DeployOptions(endpoint=Endpoint.none))
    folder = lifecycle.state_dir("t")
    bundle = read_json(folder / "bundle" / "manifest.json", Manifest)
    assert {f.name: f.timeout_s for f in bundle.functions} == PLANNED
    twin = read_json(folder / "twin.json", TwinConfig)
    assert {f.name.removeprefix("t-"): f.timeout_s for f in twin.functions} == PLANNED
    served = read_json(folder / "server.json", ServerConfig)
    assert {f.function.removeprefix("t-"): f.timeout_s for f in served.functions} == PLANNED
    # Neither an answer nor a measurement gives up a call before the function's own timeout does.
    asked: list[float] = []
    monkeypatch.setattr(calibrate, "make_client", lambda endpoint, connections, timeout_s: asked.append(timeout_s))
    monkeypatch.setattr(calibrate, "measure_target", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate("t", folder.parent / "measured", (), 8, SILENT)
    assert asked == [read_timeout_s(123)]


def test_on_aws() -> None:
    plan = aws.plan(Endpoint.aws_lambda, LAYERS)
    functions = aws.of_type(templates(plan, aws.contents(plan), aws.settings(Endpoint.aws_lambda)), "Lambda::Function")
    found = {f["Properties"]["FunctionName"].removeprefix("tiny-"): f["Properties"]["Timeout"] for f in functions.values()}
    assert found == PLANNED | {"main": MAX_TIMEOUT_S}
    assert {f.entry: f.timeout_s for f in contents.expected(plan).functions} == PLANNED
    assert access._ANSWER.read_timeout == read_timeout_s(MAX_TIMEOUT_S)


def test_the_dispatcher_waits_longer_than_any_function_may_take(made: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Asked(Exception):
        pass

    def connect(connections: int, timeout_s: float) -> None:
        asked.append(timeout_s)
        raise Asked

    functions = {layer.layer: [engine.RemoteFunction("f", layer.remote, 1, 0.0, layer.timeout_s)] for layer in LAYERS}
    with pytest.raises(Asked):
        engine.start_engine(None, made.profile.record.spec, functions, connect)  # type: ignore[arg-type]
    assert asked == [read_timeout_s(123)] and read_timeout_s(123) > 123 + INIT_LIMIT_S


def test_no_time_is_written_down_a_second_time() -> None:
    """A rented main function ends an answer when its plan says, before SageMaker does; nobody else has a number of his own."""
    assert read_catalog("aws-us-east-1").main.rented_timeout_s == container.LIMITS.streamed_s < 480
    assert container.LIMITS.whole_s < 60
    for module in (client, engine, invoke, target, calibrate):
        text = Path(str(module.__file__)).read_text()
        assert not [name for name in ("_TIMEOUT_S =", "read=600", "read_timeout=60") if name in text]


@pytest.mark.parametrize("timeout_s", [0.4, 0.8])
def test_a_functions_own_timeout_is_what_is_seen_and_billed(
    timeout_s: float, tmp_path: Path, probed: cages.Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = server(tmp_path, probed, monkeypatch)
    (tmp_path / "code" / "slow.py").write_text("import time\ndef handle(event, context):\n    time.sleep(60)\n")
    with serve("slow.handle", timeout_s=timeout_s) as running:
        made = make_client(running.endpoint, 1, read_timeout_s(timeout_s))
        with pytest.raises(FailedCall, match=r"Sandbox\.Timedout") as raised:
            ping(made, "f")
        made.close()
        call = raised.value.invocation
        assert (call.billed_tries, call.unreported, call.failed) == (1, 0, True)
        assert timeout_s * 1000 <= call.billed_ms == running.status()["functions"][0]["billed_ms"]


@pytest.mark.parametrize("timeout_s", [1, 30, 900])
def test_the_wait_is_a_little_longer(timeout_s: int) -> None:
    assert timeout_s + INIT_LIMIT_S < read_timeout_s(timeout_s) < timeout_s + INIT_LIMIT_S + 30
    assert math.isfinite(read_timeout_s(timeout_s))


def test_a_packaged_function_config_keeps_lambdas_limit() -> None:
    with pytest.raises(ValueError, match="less than or equal to 900"):
        FunctionConfig.model_validate_json(
            json.dumps({"name": "f", "handler": "h", "code_dir": "/", "memory_mb": 128, "timeout_s": 901, "reserved_concurrency": 1})
        )
