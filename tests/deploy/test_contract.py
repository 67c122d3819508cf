"""What every target promises, asserted of each target in the same words.

Here AWS is moto's server, whose functions the local twin runs (tests/support/moto_functions.py), and the plan is one of a tiny model.
`make test-aws` runs this file against a real account, with the demo model (tests/deploy/on_aws.py).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli.artifacts import read_json
from remoe_cli.deploy.aws import packing, session
from remoe_cli.deploy.aws import target as aws_target
from remoe_cli.deploy.aws.contents import expected
from remoe_cli.deploy.console import SILENT
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.local import target as local_target
from remoe_cli.deploy.target import DeployOptions, Target
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.package.bundle import function_zip
from remoe_cli.package.dependencies import FunctionPackage
from remoe_cli.plan.document import LayerPlan, Plan
from remoe_cli.profile.record import read_profile
from remoe_cli.progress import Report
from remoe_cli.runtime import client
from tests.support import by_hand, forked

REAL_NAME = os.environ.get("REMOE_TEST_NAME")  # set by tests/deploy/on_aws.py
NEW_TOKENS = 16
LAYERS = (
    LayerPlan(layer=0, remote=(1, 2, 3, 5, 6, 7), memory_mb=1769, replicas=1, functions=((1, 7), (2, 5, 3, 6))),
    LayerPlan(layer=1, remote=(1, 3, 4, 6), memory_mb=1769, replicas=2),
)
pytestmark = pytest.mark.timeout(3600 if REAL_NAME else 300)


@dataclass(frozen=True)
class Asked:
    """What is deployed: a plan of some model, under a name, and a prompt for it."""

    name: str
    plan_path: Path
    prompt: str

    @property
    def plan(self) -> Plan:
        return read_json(self.plan_path, Plan)

    @property
    def function_names(self) -> list[str]:
        return [f"{self.name}-{function.entry}" for function in expected(self.plan).functions]

    def whole_models_answer(self, prompt_ids: list[int]) -> list[int]:
        """The tokens that transformers generates with the model that was profiled."""
        model: Any = AutoModelForCausalLM.from_pretrained(read_profile(Path(self.plan.profile.path)).record.model.path)
        ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        return list(whole[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    if REAL_NAME:
        yield Asked(REAL_NAME, Path(os.environ["REMOE_TEST_PLAN"]), "What is the capital of France?")
        return
    folder = tmp_path_factory.mktemp("contract")
    made = by_hand.by_hand(folder, LAYERS)
    (folder / "code.zip").write_bytes(function_zip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMOE_STATE_DIR", str(folder / "state"))
        patch.setenv("REMOE_CACHE_DIR", str(folder / "cache"))
        for module in (local_target, aws_target):
            patch.setattr(module, "read_inputs", lambda path: (made.plan, made.profile, made.catalog))
        patch.setattr(aws_target, "read_without_profile", lambda path: (made.plan, made.catalog, ""))
        # Without dependencies, whose wheels take long to fetch (tests/deploy/aws/test_expert_function.py does): the twin's Python has them.
        patch.setattr(packing, "function_package", lambda architecture, python: FunctionPackage.of(folder / "code.zip"))
        yield Asked("contract", made.plan_path, by_hand.PROMPT)


class Stages:
    """The titles of all progress displays, of which only one may be open at a time, as on a terminal."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self._open = False

    @contextmanager
    def progress(self, title: str, *, of_bytes: bool = False) -> Iterator[Report]:
        assert not self._open, f"'{title}' is opened inside '{self.titles[-1]}'"
        self.titles.append(title)
        self._open = True
        try:
            yield lambda done, total, what="": None
        finally:
            self._open = False


@pytest.fixture(scope="module", params=["local", "aws"])
def place(request: pytest.FixtureRequest) -> tuple[Target, Stages]:
    stages = Stages()
    console = replace(SILENT, progress=stages.progress)
    if request.param == "local":
        return local_target.LocalTarget(console), stages
    account = session.connect() if REAL_NAME else request.getfixturevalue("account")
    return aws_target.AwsTarget(lambda: account, console), stages


@pytest.fixture(scope="module")
def target(place: tuple[Target, Stages]) -> Target:
    return place[0]


@pytest.fixture(scope="module")
def stages(place: tuple[Target, Stages]) -> Stages:
    return place[1]


@pytest.fixture(scope="module")
def deployed(target: Target, asked: Asked) -> Iterator[dict[str, Any]]:
    """The document that `deploy` returned."""
    try:
        yield target.deploy(asked.plan_path, asked.name, DeployOptions(endpoint=Endpoint.none))
    finally:
        with suppress(DeployError):
            target.destroy(asked.name)


@pytest.fixture(scope="module")
def served(target: Target, deployed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[client.Http]:
    """The main function on this machine, by `remoe serve`, against the deployed functions."""
    if REAL_NAME and deployed["target"] == "aws" and "AWS_ENDPOINT_URL" in os.environ:
        pytest.skip("moto's functions are not packaged as AWS runs them")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("served")
    arguments = ("serve", deployed["name"], "--target", deployed["target"], "--port", str(port))
    process = forked.start(forked.command, arguments, {}, stdout=folder / "out", stderr=folder / "err")
    try:
        _await_ready(f"http://127.0.0.1:{port}", process, folder / "err")
        yield client.Http(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.join(30)


def _await_ready(url: str, process: BaseProcess, log: Path) -> None:
    give_up = time.monotonic() + 600
    while time.monotonic() < give_up:
        assert process.is_alive(), f"the main function ended: {log.read_text()}"
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ping", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(url)


def test_deploying_returns_the_status_of_what_is_deployed(target: Target, deployed: dict[str, Any], asked: Asked) -> None:
    status = target.status(asked.name)
    for document in (deployed, status):
        assert (document["name"], document["state"], document["main"]) == (asked.name, "running", None)
        assert [f["name"] for f in document["functions"]] == asked.function_names
        assert [f["memory_mb"] for f in document["functions"]] == [f.memory_mb for f in expected(asked.plan).functions]
    assert deployed["target"] == status["target"] in ("local", "aws")


CHECKS = ("Checking the plan", "Checking the model's files")
LONG_STAGES = {
    "local": [*CHECKS, "Packaging functions", "Checking packaged functions", "Starting the supervisor"],
    "aws": [
        *("Connecting to AWS", *CHECKS, "Packaging the functions' code", "Checking packaged functions", "Packaging functions"),
        *("Checking the packaged main function", "Comparing with the bucket", "Working out the changes", "Uploading"),
        *("Stack remoe-{name}", "Reading the status"),
    ],
}


def test_every_long_stage_shows_progress(deployed: dict[str, Any], stages: Stages, asked: Asked) -> None:
    expected_titles = [title.format(name=asked.name) for title in LONG_STAGES[deployed["target"]]]
    assert stages.titles[: len(expected_titles)] == expected_titles


def test_names_overview_and_preview_are_the_targets_own(target: Target, deployed: dict[str, Any], asked: Asked) -> None:
    overview = target.overview(target.status(asked.name))
    assert "running" in overview.above[0] and [row[0] for row in overview.tables[0].rows] == asked.function_names
    assert asked.name in target.names()
    if deployed["target"] == "local":
        with pytest.raises(UsageError, match="--dry-run goes with"):
            target.preview(asked.plan_path, asked.name, DeployOptions())
    else:
        document, _ = target.preview(asked.plan_path, asked.name, DeployOptions(endpoint=Endpoint.none))
        assert document["resources"]


def test_the_plan_that_was_deployed_can_be_read(target: Target, deployed: dict[str, Any], asked: Asked) -> None:
    assert read_json(target.deployed_plan(asked.name), Plan) == asked.plan


def test_a_deployment_of_functions_only_has_no_address(target: Target, deployed: dict[str, Any], asked: Asked) -> None:
    with pytest.raises(DeployError, match=f"'{asked.name}' has functions only") as raised:
        target.main_address(asked.name)
    assert f"remoe serve {asked.name}" in raised.value.hint


def test_the_answer_is_the_whole_models_and_is_accounted_for(deployed: dict[str, Any], served: client.Http, asked: Asked) -> None:
    answer = client.answer(served, asked.prompt, NEW_TOKENS, lambda text: None)
    assert answer["token_ids"] == asked.whole_models_answer(answer["prompt_token_ids"])
    receipt = answer["receipt"]
    assert receipt["invocations"] > 0 and receipt["billed_ms"] > 0 and receipt["cost"]["functions_usd"] > 0
    called = {f["name"].removesuffix(":live") for f in receipt["functions"]}
    assert called and called <= set(asked.function_names)


def test_functions_log_what_they_are_billed_for(target: Target, served: client.Http, asked: Asked) -> None:
    name = asked.function_names[0]
    for _ in range(30):  # CloudWatch takes its time
        logs = target.logs(asked.name, name, lines=20)
        if any("Billed Duration" in line for line in logs[name]):
            assert list(logs) == [name] and len(logs[name]) <= 20
            assert set(asked.function_names) <= set(target.logs(asked.name))
            return
        time.sleep(2)
    pytest.fail(f"no REPORT line in the log of {name}")


def test_a_function_that_is_not_there_has_no_log(target: Target, deployed: dict[str, Any], asked: Asked) -> None:
    with pytest.raises(DeployError, match="nobody"):
        target.logs(asked.name, "nobody")


METHODS: dict[str, Callable[[Target, str], object]] = {
    "status": lambda target, name: target.status(name),
    "logs": lambda target, name: target.logs(name),
    "main_address": lambda target, name: target.main_address(name),
    "deployed_plan": lambda target, name: target.deployed_plan(name),
    "serve": lambda target, name: target.serve(name, "127.0.0.1", 0),
    "destroy": lambda target, name: target.destroy(name),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_name_that_is_not_deployed_is_an_error(method: str, target: Target, asked: Asked) -> None:
    if method == "destroy":
        assert target.destroy("stranger")["state"] == "absent"  # what was wanted
    else:
        with pytest.raises(DeployError, match="no deployment named 'stranger'") as raised:
            METHODS[method](target, "stranger")
        assert "remoe deploy" in raised.value.hint
    with pytest.raises(UsageError, match="cannot be the name of a deployment"):
        METHODS[method](target, "No name!")


def test_destroying_leaves_nothing(target: Target, deployed: dict[str, Any], stages: Stages, asked: Asked) -> None:
    """The last test of a target."""
    stages.titles.clear()
    document = target.destroy(asked.name)
    gone = {"name": asked.name, "target": deployed["target"], "state": "destroyed", "left": [], "kept": []}
    assert {**document, "left": []} == gone
    assert REAL_NAME or document["left"] == []  # AWS may name what is deleted for minutes
    assert stages.titles and {title.split()[0] for title in stages.titles} <= {"Destroying", "Stack", "Emptying"}
    with pytest.raises(DeployError, match=f"no deployment named '{asked.name}'"):
        target.status(asked.name)
