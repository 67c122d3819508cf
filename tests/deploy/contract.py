"""What every target promises, on the demo model with a quarter of its experts in functions. No file of `make test`: run by
tests/deploy/on_aws.py (make test-aws), which says what it costs and destroys whatever it leaves.

moto, where AWS_ENDPOINT_URL names one, runs no functions: there, only what is about deploying is tested.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_cli.artifacts import read_json
from remoe_cli.plan.document import Plan
from remoe_cli.runtime import client

pytestmark = pytest.mark.timeout(3600)
PROMPT, NEW_TOKENS = "What is the capital of France?", 16


def remoe(*arguments: str) -> tuple[int, Any]:
    run = subprocess.run([sys.executable, "-m", "remoe_cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    return run.returncode, json.loads(run.stdout)


@dataclass(frozen=True)
class Deployed:
    """`document` is what 'remoe deploy' said; `options` say where it is."""

    document: dict[str, Any]
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.document["name"])


@pytest.fixture(scope="module", params=["local", "aws"])
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployed]:
    name, plan, target = os.environ["REMOE_TEST_NAME"], os.environ["REMOE_TEST_PLAN"], ("--target", request.param)
    asked = ("--yes",) if request.param == "aws" else ()
    code, document = remoe("deploy", plan, "--name", name, "--endpoint", "none", *target, *asked)
    assert code == 0, document
    yield Deployed(document, target)
    code, document = remoe("destroy", name, *target, *asked)
    assert code == 0 and document["state"] == "destroyed", document
    code, document = remoe("status", name, *target)
    assert code == 1 and f"no deployment named '{name}'" in document["error"]["message"]


@pytest.fixture(scope="module")
def served(deployed: Deployed) -> Iterator[client.Http]:
    """The main function on this machine, against the functions there."""
    if "aws" in deployed.options and "AWS_ENDPOINT_URL" in os.environ:
        pytest.skip("moto runs no functions")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "remoe_cli", "serve", deployed.name, "--port", str(port), *deployed.options]
    with subprocess.Popen(command) as process:
        try:
            await_ready(f"http://127.0.0.1:{port}", process)
            yield client.Http(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 600
    while time.monotonic() < give_up:
        assert process.poll() is None, "the main function ended"
        try:
            if httpx.get(f"{url}/ping", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError(url)


def test_the_status_tells_every_function(deployed: Deployed) -> None:
    code, document = remoe("status", deployed.name, *deployed.options)
    plan = read_json(Path(os.environ["REMOE_TEST_PLAN"]), Plan)
    entries = [f"{deployed.name}-layer-{layer.layer:03d}" for layer in plan.layers if layer.remote]
    assert code == 0 and document["state"] == "running"
    assert sorted(f["name"] for f in document["functions"]) == entries
    assert {f["memory_mb"] for f in document["functions"]} == {layer.memory_mb for layer in plan.layers if layer.remote}


def test_the_answer_is_the_whole_models_and_is_accounted_for(deployed: Deployed, served: client.Http) -> None:
    answer = client.answer(served, PROMPT, NEW_TOKENS, lambda text: None)
    plan = read_json(Path(os.environ["REMOE_TEST_PLAN"]), Plan)
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.name)
    ids = torch.tensor([answer["prompt_token_ids"]])
    with torch.inference_mode():
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answer["token_ids"] == whole[0, ids.shape[1] :].tolist()
    receipt = answer["receipt"]
    assert receipt["invocations"] > 0 and receipt["billed_ms"] > 0 and receipt["cost"]["functions_usd"] > 0
    called = {f["name"].removesuffix(":live") for f in receipt["functions"]}
    assert called <= {f["name"] for f in deployed.document["functions"]}


def test_functions_log_what_they_are_billed_for(deployed: Deployed, served: client.Http) -> None:
    name = deployed.document["functions"][0]["name"]
    for _ in range(30):  # CloudWatch takes its time
        _, document = remoe("logs", deployed.name, "--function", name, *deployed.options)
        if any("Billed Duration" in line for line in document["logs"][name]):
            return
        time.sleep(2)
    pytest.fail(f"no REPORT line in the log of {name}")


def test_what_is_not_there_is_an_error(deployed: Deployed) -> None:
    code, document = remoe("logs", deployed.name, "--function", "nobody", *deployed.options)
    assert code == 1 and "nobody" in document["error"]["message"]
