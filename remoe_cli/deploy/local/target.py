"""From a plan to a running local deployment: bundle, functions, main server, all in one state directory.

The directory of a deployment holds, beside the twin's own files:

    plan.json      a copy of the plan
    bundle/        the functions' code and shards (package/bundle.py)
    server.json    what a main server is told (runtime/server_config.py)
    main/          the share of a main function that is a function (package/partial_checkpoint.py)
"""

from __future__ import annotations

import math
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

import remoe_cli
from remoe_cli import artifacts
from remoe_cli.deploy import main_files
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.inputs import read_inputs
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.config import FunctionConfig, MainConfig, TwinConfig
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.package import bundle
from remoe_cli.package.partial_checkpoint import MANIFEST
from remoe_cli.plan.document import Plan
from remoe_cli.runtime import client
from remoe_cli.runtime.invoke import make_client

_TIMEOUT_S, _MAIN_TIMEOUT_S = 30.0, 900.0
_MOST_MEMORY_MB = 10_240
_MAIN_RUNTIME_MB = 512  # torch and transformers, besides the weights
Progress = Callable[[int, int], None]


def deploy(
    plan_path: Path, name: str, *, rtt_ms: float, say: Callable[[str], None], progress: Progress, endpoint: Endpoint | None = None
) -> dict[str, Any]:
    """Check the plan, build its bundle and start everything; returns the status document. On failure nothing is left.

    The main function is a server process, or what `endpoint` says. Raises ArtifactError for a plan that the verifier does not confirm,
    HeldError for a name that is taken, UsageError for an endpoint that the twin does not have.
    """
    if endpoint is Endpoint.sagemaker:
        raise UsageError("The local twin has no SageMaker endpoint.", "Leave --endpoint out: its main server is the same program.")
    plan, profile, catalog = read_inputs(plan_path)

    def prepare(folder: Path) -> TwinConfig:
        shutil.copyfile(plan_path, folder / "plan.json")
        manifest = bundle.build(plan, plan_path, profile, folder / "bundle", progress)
        bundle.read(folder / "bundle")
        code = bundle.unpack_code(folder / "bundle")
        config = main_files.server_config(plan, profile, catalog, manifest, lambda entry: f"{name}-{entry}")
        artifacts.write_json(folder / "server.json", config)
        functions = tuple(
            FunctionConfig(
                name=f"{name}-{entry.name}",
                handler=bundle.HANDLER,
                code_dir=str(code),
                environment={"REMOE_SHARD": str(folder / "bundle" / entry.shard)},
                memory_mb=entry.memory_mb,
                timeout_s=_TIMEOUT_S,
                reserved_concurrency=entry.replicas,
            )
            for entry in manifest.functions
        )
        main: MainConfig | FunctionConfig | None = None
        match endpoint:
            case None:
                main = _main_server(folder)
            case Endpoint.aws_lambda:
                share = main_files.write_main_files(config, folder / "plan.json", folder / "main")
                main = _main_function(name, plan, folder / "main", share.bytes)
        return TwinConfig(name=name, functions=functions, main=main, rtt_ms=rtt_ms, python=sys.executable)

    lifecycle.start(name, prepare, say)
    return status(name)


def _main_server(folder: Path) -> MainConfig:
    port = _free_port()
    return MainConfig(argv=[sys.executable, "-m", "remoe_cli.runtime.server", str(folder / "server.json"), str(port)], port=port)


def _main_function(name: str, plan: Plan, share: Path, share_bytes: int) -> FunctionConfig:
    """The main function as one of Lambda's, with the plan's memory; it runs from this installation, which has torch."""
    needed_mb = math.ceil(share_bytes / 2**20) + _MAIN_RUNTIME_MB
    memory_mb = min(max(plan.main.memory_mb, needed_mb), _MOST_MEMORY_MB)
    if needed_mb > _MOST_MEMORY_MB:
        raise DeployError(
            f"The main function needs {needed_mb} MB, and a Lambda function has {_MOST_MEMORY_MB} MB at most.",
            "Leave --endpoint lambda out, or plan with more experts remote.",
        )
    return FunctionConfig(
        name=f"{name}-main",
        handler="remoe_cli.runtime.lambda_main.handle",
        code_dir=str(Path(remoe_cli.__file__).parents[1]),
        environment={"REMOE_MAIN": str(share / MANIFEST)},
        memory_mb=memory_mb,
        timeout_s=_MAIN_TIMEOUT_S,
        reserved_concurrency=1,
    )


def status(name: str) -> dict[str, Any]:
    """The twin's status document, with what a main server really holds (runtime/main_function.py, MainState) under `main`."""
    document = lifecycle.status(name)
    main = document["main"]
    if main and main["kind"] == "server" and main["state"] == "running":
        with suppress(httpx.HTTPError):
            answer = httpx.get(f"http://127.0.0.1:{main['port']}/main", trust_env=False, timeout=5)
            main |= answer.raise_for_status().json()
    return document


def reach(name: str) -> client.MainAddress:
    """Where a deployment's main function is asked; raises DeployError when there is none that runs."""
    document = lifecycle.status(name)
    match document["main"]:
        case {"kind": "server", "state": "running", "port": port}:
            return client.Http(f"http://127.0.0.1:{port}")
        case {"kind": "lambda", "name": function}:
            return client.LambdaMain(function, make_client(document["endpoint"], 1, _MAIN_TIMEOUT_S + 10))
        case None if document["endpoint"]:
            raise DeployError(f"'{name}' has functions only.", f"Run its main function on this machine: 'remoe serve {name}'.")
    raise DeployError(f"The main server of '{name}' does not run.", f"See 'remoe logs {name}'; 'remoe destroy {name}' and deploy again.")


def plan_path(name: str) -> Path:
    """The plan that a deployment was made of."""
    return lifecycle.state_dir(name) / "plan.json"


def serve(name: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run the main function of a deployment in this process until it is interrupted, from the model's own checkpoint.

    Raises DeployError for a deployment that does not run, and what runtime/main_function.py and runtime/server.py raise.
    """
    from remoe_cli.runtime.server import serve_here

    functions = lifecycle.status(name)["endpoint"]
    if functions is None:
        raise DeployError(f"'{name}' does not run.", f"Run 'remoe destroy {name}', then deploy again.")
    serve_here(name, lifecycle.state_dir(name) / "server.json", functions, host, port, say)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
