"""From a plan to AWS and back by the command line, against moto's server: packaged, asked, deployed, looked at, destroyed."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import torch

from remoe_cli.artifacts import json_text, read_json, sha256_bytes, write_json
from remoe_cli.cli import app
from remoe_cli.deploy.aws import access, packing, session, status, target
from remoe_cli.deploy.aws import names as names_of
from remoe_cli.deploy.aws.session import Account
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.target import ServeOptions
from remoe_cli.errors import DeployError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.spec import read_spec
from remoe_cli.package.bundle import function_zip
from remoe_cli.package.dependencies import FunctionPackage
from remoe_cli.package.partial_checkpoint import MainFile, MainManifest
from remoe_cli.plan.catalog.catalog import Catalog, read_catalog
from remoe_cli.plan.document import LayerPlan, Plan, Source
from remoe_cli.profile.record import ModelRef, Profile, write_profile
from remoe_cli.runtime import client
from remoe_cli.runtime.device_choice import DeviceChoice
from remoe_cli.runtime.direct import DirectClient
from remoe_cli.runtime.server_config import ServerConfig
from tests.support.families import save
from tests.support.synthetic import plan_by_hand, synthetic_profile

LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 5, 6), memory_mb=512, replicas=1, functions=((1, 2), (5, 6))),
    LayerPlan(layer=1, remote=(3,), memory_mb=1024, replicas=2),
)
Remoe = Callable[..., tuple[int, Any]]


class Inputs:
    """A checkpoint, a profile of it, an AWS catalog, and plans that no planner made, taken for verified."""

    def __init__(self, folder: Path) -> None:
        save("mixtral", torch.float32, folder / "model", fused=False)
        found = find(str(folder / "model"))
        update = {"model": ModelRef(path=found.name, revision=found.revision), "spec": read_spec(found)}
        synthetic = synthetic_profile(folder / "synthetic", experts=8)
        self.profile: Profile = write_profile(folder / "profile", synthetic.record.model_copy(update=update), synthetic.arrays)
        self.catalog: Catalog = read_catalog("aws-us-east-1")
        source = Source(path=str(self.profile.path), sha256=self.profile.sha256)
        main = next(spec for spec in self.catalog.main.menu if spec.name.startswith("ml.g4dn"))
        self.plan = plan_by_hand(LAYERS, profile=source, catalog=self.catalog.file, main=main)
        self.path = folder / "thrifty.json"
        write_json(self.path, self.plan)

    def read(self, path: Path) -> tuple[Plan, Profile, Catalog]:
        return read_json(path, Plan), self.profile, self.catalog


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, account: Account) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "code.zip").write_bytes(function_zip())
    made = Inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_CACHE_DIR", str(folder / "cache"))
        patch.setattr(target, "read_inputs", made.read)
        patch.setattr(target, "read_without_profile", lambda path: (*made.read(path)[::2], ""))
        # Without dependencies, whose wheels take long to fetch (tests/deploy/aws/test_expert_function.py does): moto runs no functions.
        patch.setattr(packing, "function_package", lambda architecture, python: FunctionPackage.of(folder / "code.zip"))
        yield made


@pytest.fixture
def connected(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands share one connection: making another costs a second (tests/deploy/aws/test_session.py makes them)."""
    monkeypatch.setattr(session, "connect", lambda region, profile: account)


@pytest.fixture
def remoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Remoe:
    """The command in this process: its exit code and its JSON document."""

    def run(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments, "--json"])
        capsys.readouterr()
        code = app.run()
        return code, json.loads(capsys.readouterr().out)

    return run


def test_the_life_of_a_deployment(inputs: Inputs, account: Account, connected: None, remoe: Remoe) -> None:
    plan, to = str(inputs.path), ("--target", "aws", "--endpoint", "none", "--speculate", "auto", "--cache-experts", "auto")
    code, done = remoe("deploy", plan, *to, "--yes")
    assert code == 0 and done["state"] == "running" and done["main"] is None and len(done["changes"]) == 16
    names = ["thrifty-layer-000-0", "thrifty-layer-000-1", "thrifty-layer-001"]
    assert [(f["name"], f["memory_mb"], f["drift"]) for f in done["functions"]] == list(zip(names, (512, 512, 1024), [[]] * 3, strict=True))

    # What is in the bucket is what was packaged, and what the functions are to read.
    environment = account.client("lambda").get_function_configuration(FunctionName=names[2], Qualifier="live")["Environment"]["Variables"]
    bucket, _, key = environment["REMOE_SHARD"].removeprefix("s3://").partition("/")
    shard = account.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    head_bytes, _, _ = environment["REMOE_SHARD_HEADER"].partition(":")
    assert int(head_bytes) == 8 + int.from_bytes(shard[:8], "little")
    config = read_json(access.deployed_file(account, "thrifty", "server.json"), ServerConfig)
    assert [f.function for f in config.functions] == [f"{name}:live" for name in names] and config.speculate == "auto"
    assert config.cache_experts

    # A stack of somebody else's is none of remoe's deployments, whatever its name is.
    body = json.dumps({"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}})
    account.client("cloudformation").create_stack(StackName="remoe-foreign", TemplateBody=body)
    code, listed = remoe("list", "--target", "aws")
    row = {
        "name": "thrifty",
        "target": "aws",
        "state": "running",
        "main": None,
        "usd_per_hour_at_rest": 0.0,
        "usd_per_hour_of_traffic": None,
    }
    assert code == 0 and [row | each for each in listed["deployments"]] == listed["deployments"] != []
    code, several = remoe("status", "--target", "aws")
    assert code == 0 and [each["name"] for each in several["deployments"]] == ["thrifty"]
    account.client("cloudformation").delete_stack(StackName="remoe-foreign")

    # Again: nothing is packaged anew, nothing changed.
    shards = {path: path.stat().st_mtime_ns for path in packing.cache_dir().rglob("*.safetensors")}
    assert len(shards) == 3
    assert remoe("deploy", plan, *to, "--yes") == (0, {**done, "changes": []})
    assert {path: path.stat().st_mtime_ns for path in packing.cache_dir().rglob("*.safetensors")} == shards

    put_later_plan(account, bucket, inputs.plan.model_copy(update={"reason": "of another deployment, that failed"}))
    assert read_json(access.deployed_file(account, "thrifty", "plan.json"), Plan) == inputs.plan

    logs = account.client("logs")
    now_ms = int(time.time() * 1000)
    for stream in range(2):  # of two instances, which wrote in turns
        where = {"logGroupName": f"/aws/lambda/{names[0]}", "logStreamName": str(stream)}
        logs.create_log_stream(**where)
        events = [{"timestamp": now_ms + n, "message": f"line {n}\n"} for n in range(stream, 30, 2)]
        logs.put_log_events(**where, logEvents=events)
    code, found = remoe("logs", "thrifty", "--target", "aws", "--lines", "3")
    assert code == 0 and found["logs"] == {names[0]: ["line 27", "line 28", "line 29"], names[1]: [], names[2]: []}
    code, failed = remoe("logs", "thrifty", "--target", "aws", "--function", "main")
    assert code == 1 and "no function 'main'; there are: thrifty-layer-000-0, " in failed["error"]["message"]

    code, failed = remoe("infer", "thrifty", "--prompt", "x", "--target", "aws")
    assert code == 1 and "remoe serve thrifty --target aws" in failed["error"]["hint"]

    code, cost = remoe("cost", "thrifty", "--target", "aws")
    assert code == 0 and (cost["total"]["requests"], cost["meter"]) == (0, None)
    assert cost["receipts"].endswith("/receipts/aws/123456789012-us-east-1/thrifty")

    assert remoe("destroy", "thrifty", "--target", "aws")[0] == 2  # nobody can be asked
    code, gone = remoe("destroy", "thrifty", "--target", "aws", "--yes")
    assert (code, gone) == (0, {"name": "thrifty", "target": "aws", "state": "destroyed", "left": [], "kept": [], "receipts": None})
    code, failed = remoe("status", "thrifty", "--target", "aws")
    assert code == 1 and "no deployment named 'thrifty' in account 123456789012, us-east-1" in failed["error"]["message"]


def put_later_plan(account: Account, bucket: str, plan: Plan) -> None:
    """As a deployment leaves it that was never made: a later share than that which stands."""
    body = json_text(plan).encode()
    file = MainFile(name="plan.json", bytes=len(body), sha256=sha256_bytes(body))
    put = account.client("s3").put_object
    put(Bucket=bucket, Key=names_of.main_file_key(file.sha256, file.name), Body=body)
    put(Bucket=bucket, Key=names_of.main_manifest_key("f" * 64), Body=MainManifest(files=(file,)).model_dump_json().encode())


def test_the_main_function_on_sagemaker_is_found(inputs: Inputs, account: Account, connected: None, remoe: Remoe) -> None:
    image = f"{account.id}.dkr.ecr.us-east-1.amazonaws.com/remoe:1"
    plan, to = str(inputs.path), ("--target", "aws", "--name", "gpu", "--yes")
    code, failed = remoe("deploy", plan, *to)
    assert code == 2 and "needs its image" in failed["error"]["message"] and "remoe package" in failed["error"]["hint"]
    code, failed = remoe("deploy", plan, *to, "--endpoint-image", image)
    assert code == 2 and "has no repository remoe in us-east-1" in failed["error"]["message"]
    assert not list(packing.cache_dir().glob("deployments/*-gpu")), "it is told before anything is packaged"
    account.client("ecr").create_repository(repositoryName="remoe")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": []}
    account.client("ecr").put_image(repositoryName="remoe", imageManifest=json.dumps(manifest), imageTag="1")
    code, done = remoe("deploy", plan, *to, "--endpoint-image", image)
    assert code == 0 and done["main"] == {"kind": "sagemaker", "name": "gpu-main", "state": "InService"}
    (listed,) = remoe("list", "--target", "aws")[1]["deployments"]
    assert (listed["main"], listed["usd_per_hour_at_rest"]) == (inputs.plan.main.name, inputs.plan.main.usd_per_hour)
    share = packing.cache_dir() / "deployments"
    assert len(list(share.glob("*-gpu/main/*.safetensors"))) >= 1
    endpoint = access.main_address(account, "gpu")
    assert isinstance(endpoint, client.SageMaker) and endpoint.endpoint == "gpu-main"
    model = account.client("sagemaker").list_models()["Models"][0]["ModelName"]
    container = account.client("sagemaker").describe_model(ModelName=model)["PrimaryContainer"]
    bucket, _, key = container["Environment"]["REMOE_MAIN"].removeprefix("s3://").partition("/")
    assert "weights-0000.safetensors" in account.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    assert remoe("destroy", "gpu", "--target", "aws", "--yes")[0] == 0
    with pytest.raises(DeployError, match="no deployment named 'gpu'"):
        access.main_address(account, "gpu")


def test_people_are_asked(inputs: Inputs, connected: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(answer: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["remoe", *arguments])
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        code = app.run()
        return code, *capsys.readouterr()

    deploy = ("deploy", str(inputs.path), "--target", "aws", "--endpoint", "none", "--name", "asked")
    code, out, message = run("\n", *deploy)
    assert code == 1 and "Deploy 'asked' to account 123456789012, us-east-1, uploading" in message and "you did not agree" in message
    assert "+ Layer001 " in out and "a month at rest" in out
    code, out, message = run("yes\n", *deploy)
    assert code == 0 and "asked (aws, account 123456789012, us-east-1): running" in out and "[16/16]" in message
    code, _, message = run("n\n", "destroy", "asked", "--target", "aws")
    assert code == 1 and "Destroy 'asked' in account 123456789012" in message
    assert run("y\n", "destroy", "asked", "--target", "aws")[0] == 0


def test_a_dry_run_takes_no_credentials_and_no_model(inputs: Inputs, remoe: Remoe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    source = Source(path="nowhere", sha256="0" * 64)
    dry = str(tmp_path / "Dry v1.0, with a name that is long.json")
    write_json(Path(dry), inputs.plan.model_copy(update={"profile": source}))
    code, document = remoe("deploy", dry, "--target", "aws", "--dry-run", "--monthly-alert", "5", "--alert-email", "a@b.c")
    assert code == 0 and {"template", "resources", "cost", "quotas", "changes"} <= set(document)
    assert document["template"]["Description"] == "remoe: dry-v1-0-with-a-name-tha"
    assert document["template"]["Resources"]["Layer001"]["Properties"]["MemorySize"] == 1024
    assert "AWS::Budgets::Budget" in {resource["type"] for resource in document["resources"]}
    code, failed = remoe("deploy", dry, "--target", "aws", "--yes")
    assert code == 2 and "No AWS region" in failed["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deploy", "PLAN", "--dry-run"), "--dry-run goes with --target aws"),
        (("deploy", "PLAN", "--target", "aws", "--dry-run", "--rtt-ms", "5"), "--rtt-ms goes with --target local"),
        (("deploy", "PLAN", "--region", "us-east-1"), "--region goes with --target aws"),
        (("deploy", "PLAN", "--target", "aws"), "'remoe deploy' asks before it changes anything, but there is no terminal to answer."),
        (("destroy", "x", "--target", "aws"), "'remoe destroy' asks before it changes anything"),
        (("deploy", "PLAN", "--target", "aws", "--dry-run", "--monthly-alert", "5"), "A monthly alert needs an amount and an address"),
        (("deploy", "PLAN", "--target", "aws", "--dry-run", "--name", "No_Name"), "cannot be the name of a deployment on AWS"),
        (("status", "x", "--profile", "p"), "--profile goes with --target aws"),
        (("logs", "A!", "--target", "aws"), "cannot be the name"),
    ],
)
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str, inputs: Inputs, remoe: Remoe) -> None:
    code, failed = remoe(*(str(inputs.path) if argument == "PLAN" else argument for argument in arguments))
    assert code == 2 and message in failed["error"]["message"] and failed["error"]["hint"]


def test_serving_calls_functions_by_the_accounts_own_session(
    account: Account, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(access, "deployed_file", lambda account, name, file_name: tmp_path / file_name)
    monkeypatch.setattr(status, "stack_state", lambda account, name: SimpleNamespace(outputs={"Bucket": f"remoe-{name}"}))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setattr(access, "serve_here", lambda *given, book: served.append((*given, book)))
    target.AwsTarget(lambda: account, SILENT).serve("x", "127.0.0.1", 8080, ServeOptions(device=DeviceChoice.CPU))
    ((name, server_json, connect, host, port, _, asked, last_resort, book),) = served
    assert last_resort.shards == "s3://remoe-x" and last_resort.environment()["AWS_ACCESS_KEY_ID"]
    assert book.folder.parts[-3:] == ("aws", "123456789012-us-east-1", "x")
    assert (name, server_json, host, port, asked.device) == ("x", tmp_path / "server.json", "127.0.0.1", 8080, DeviceChoice.CPU)
    caller = connect(3, 5.0)
    assert isinstance(caller, DirectClient) and caller.endpoint_url == account.client("lambda").meta.endpoint_url
    held = account.session.get_credentials()
    assert (caller.credentials().access_key, caller.credentials().region) == (held.access_key, "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-AFTER-A-NEW-LOGIN")
    assert connect(3, 5.0).credentials().access_key == "AKIA-AFTER-A-NEW-LOGIN"  # read again
    assert caller.credentials().access_key == held.access_key
    assert boto3.DEFAULT_SESSION is None
