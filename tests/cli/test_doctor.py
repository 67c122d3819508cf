"""`remoe doctor` names what is right and what is wrong, with what to do, and its exit code says which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moto import mock_aws

from remoe_cli import cages
from remoe_cli.artifacts import write_json
from remoe_cli.cli import app
from remoe_cli.doctor import account, deployment, machine, model
from remoe_cli.doctor.finding import Finding
from remoe_cli.plan.build import make_plan
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.problem.request import PlanRequest
from tests.support.families import save
from tests.support.synthetic import plan_by_hand, synthetic_profile


def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr("sys.argv", ["remoe", "doctor", *arguments, "--json"])
    code = app.run()
    return code, json.loads(capsys.readouterr().out)


def named(found: Iterator[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in found}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("REMOE_CACHE_DIR", str(tmp_path / "cache"))


def test_a_machine_that_passes_these_tests_is_in_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, document = doctor(capsys, monkeypatch)
    wrong = [each for each in document["findings"] if not each["ok"]]
    assert (code, document["ok"], wrong) == (0, True, [])
    names = [each["name"] for each in document["findings"]]
    assert {
        "Python",
        "torch",
        "transformers",
        "solver",
        "GPU",
        "number types",
        "limits of functions",
        "port",
        "prices of aws-us-east-1",
    } <= {*names}


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    found = named(machine.findings())
    assert not list(tmp_path.iterdir())
    assert found["limits of functions"].value.startswith("memory ")
    assert not [group for group in Path("/sys/fs/cgroup").rglob("remoe-doctor-*")]


@pytest.mark.parametrize(
    ("name", "break_it", "hint"),
    [
        ("transformers", lambda patch: patch.setattr(machine, "version", lambda name: "4.50.0"), "Install transformers==5.23.*."),
        (
            "disk of caches",
            lambda patch: patch.setattr(machine.os, "access", lambda *_: False),
            "Set REMOE_CACHE_DIR to a folder of yours.",
        ),
    ],
)
def test_what_is_wrong_with_the_machine_is_named(name: str, break_it: Any, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    found = named(machine.findings())[name]
    assert (found.ok, found.hint) == (False, hint)


def test_limits_that_are_not_lambdas_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cages, "probe", lambda label: cages.rlimit_only())
    found = named(machine.findings())["limits of functions"]
    assert found.ok
    assert "less exactly" in found.hint and "as fast as this machine" in found.hint


def test_a_taken_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(machine, "_PORT", listener.getsockname()[1])
        found = named(machine.findings())["port"]
    assert found.value.endswith("is taken")
    assert "--port" in found.hint


def test_without_credentials_the_account_is_not_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (found,) = account.findings("us-east-1", None)
    assert not found.ok
    assert "AWS_PROFILE" in found.hint


@mock_aws
def test_an_account_is_named_by_caller_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret-secret")
    found = named(account.findings("eu-west-1", None))
    assert "123456789012" in found["AWS credentials"].value and "environment" in found["AWS credentials"].value
    assert found["AWS region"].value == "eu-west-1"
    assert "secret-secret-secret" not in str(found)


def test_a_model_is_judged_by_its_settings(tmp_path: Path) -> None:
    save("qwen2_moe", torch.float32, tmp_path / "model", fused=False)
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    found = named(model.findings(str(tmp_path / "model")))
    assert found["experts"].value == "qwen2_moe: 8 in each of 2 of 2 layers, top-2"
    assert not found["weights"].ok and "no .safetensors file" in found["weights"].value


@pytest.mark.parametrize(
    ("settings", "is_served"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, False),
    ],
)
def test_a_quantised_checkpoint_is_right_where_it_is_served(settings: dict[str, Any], is_served: bool, tmp_path: Path) -> None:
    save("qwen3_moe", torch.bfloat16, tmp_path, fused=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = named(model.findings(str(tmp_path)))["stored form"]
    assert (found.ok, bool(found.hint)) == (is_served, not is_served) and "The checkpoint is stored in" in found.value
    assert "quantised already" in named(model.findings(str(tmp_path)))["quantising"].value


def test_whether_experts_can_be_quantised_is_told_by_the_settings(tmp_path: Path) -> None:
    save("qwen3_moe", torch.bfloat16, tmp_path, fused=False)
    found = named(model.findings(str(tmp_path)))["quantising"]
    assert found.ok and found.value.startswith("experts of functions can be in INT8 or INT4, which takes ") and "--experts" in found.hint
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 40}))
    found = named(model.findings(str(tmp_path)))["quantising"]
    assert found.ok and "have 40 weights, which groups of 32 do not divide" in found.value and not found.hint


def test_a_model_without_experts_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}')
    (found,) = model.findings(str(tmp_path))
    assert (found.ok, found.value) == (False, "The model ('llama') has no routed experts.")


def test_a_plan_whose_profile_is_gone_would_not_be_deployed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.json").write_text(plan_by_hand(()).model_dump_json())
    code, document = doctor(capsys, monkeypatch, str(tmp_path / "plan.json"))
    (found,) = document["findings"]
    assert (code, found["ok"]) == (1, False)
    assert found["hint"]


def test_what_is_no_plan_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, document = doctor(capsys, monkeypatch, str(tmp_path / "none.json"))
    assert (code, document["error"]["kind"]) == (2, "Usage")


def test_the_device_of_a_deployment_is_named() -> None:
    device = {"kind": "cuda", "name": "NVIDIA L4", "memory_bytes": 24e9, "driver": "580.1"}
    status = {"name": "mine", "target": "local", "state": "running", "main": {"state": "running", "device": device}, "functions": []}
    found = named(deployment.findings(status))
    assert found["main function"].value == "running, on cuda: NVIDIA L4"
    dead = named(deployment.findings(status | {"state": "dead", "hint": "Deploy again."}))
    assert (dead["deployment"].ok, dead["deployment"].hint) == (False, "Deploy again.")


def test_the_memory_that_the_kernel_gives_back_is_available() -> None:
    """What is kept of files looks used, and makes room."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    shown = machine._memory().value
    assert "available" in shown
    measured, unit = shown.partition(", ")[2].split()[:2]
    assert float(measured.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit] == pytest.approx(available, rel=0.3)


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("echo 27.1", "docker, server 27.1"),
        ("echo down >&2; exit 1", "docker, but its server does not answer"),
        ("exec sleep 60", "docker, but its server does not answer"),
    ],
)
def test_docker_is_asked_whether_it_builds(script: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "_DOCKER_S", 0.5)
    found = machine._docker()
    assert found.value.endswith(value) and found.ok and bool(found.hint) is value.endswith("answer")


def test_a_kv_cache_has_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    save("qwen2_moe", torch.float32, tmp_path, fused=False)
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "KV cache of 512 tokens" in named(model.findings(str(tmp_path)))["sizes"].value


def test_a_name_that_is_nothing_is_told_the_deployments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, document = doctor(capsys, monkeypatch, "my-remot")
    assert (
        code == 2 and "There is no deployment named 'my-remot'; no deployment runs here. There is no folder" in document["error"]["message"]
    )
    assert "NAME of a deployment" in document["error"]["hint"]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_plan_that_is_not_for_aws_has_rows_that_say_so(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    profile, catalog = synthetic_profile(tmp_path / "profile"), read_catalog("local")
    write_json(tmp_path / "plan.json", make_plan(profile, catalog, PlanRequest(remote_share=share)))
    code, document = doctor(capsys, monkeypatch, str(tmp_path / "plan.json"), "--target", "aws")
    assert code == 1
    rows = {each["name"]: (each["ok"], each["value"]) for each in reversed(document["findings"])}  # the first of each name
    assert rows["AWS credentials"] == (False, "No AWS region is set.")
    ok, said = rows["on AWS"]
    assert (ok, said.split(":")[0]) == (
        (True, "The prices of the catalog local are not AWS's") if share else (False, "Nothing of this plan runs on AWS")
    )
    assert ("reserved concurrency" in rows) is bool(share) and "largest payload" not in rows
