"""The local target: a plan becomes a deployment of the twin, in one folder on this machine.

The folder of a deployment holds, beside the twin's own files (lifecycle.py):

    plan.json      a copy of the plan
    bundle/        the code and the shards of the expert functions (package/bundle.py)
    server.json    what the main function serves and calls (runtime/server_config.py)
    main/          the files of a main function that is a Lambda function (deploy/main_files.py)
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx

import remoe_cli
from remoe_cli import artifacts, owned
from remoe_cli.deploy import main_files
from remoe_cli.deploy.console import Console, Overview
from remoe_cli.deploy.endpoint import Endpoint
from remoe_cli.deploy.inputs import Inputs, check_model, read_inputs
from remoe_cli.deploy.local import lifecycle, overview, place
from remoe_cli.deploy.local.config import FunctionConfig, MainConfig, TwinConfig
from remoe_cli.deploy.quantised import agreed_terms
from remoe_cli.deploy.serve_here import serve_here
from remoe_cli.deploy.target import SERVE_PLAINLY, DeployOptions, ServeOptions
from remoe_cli.errors import DeployError, UsageError
from remoe_cli.lambda_limits import MAX_MEMORY_MB, MAX_TIMEOUT_S, read_timeout_s
from remoe_cli.package import bundle
from remoe_cli.package.partial_checkpoint import MANIFEST
from remoe_cli.plan.document import Plan
from remoe_cli.runtime import client, peers
from remoe_cli.runtime.invoke import make_caller, make_client
from remoe_cli.runtime.kept import Book, book_of

# What a main server does that does not answer, and what to do about it.
_MAIN_STATES = {
    "starting": ("is not started yet", "Ask again when 'remoe status {name}' says that it is running."),
    "loading": ("is loading its model", "Ask again when 'remoe status {name}' says that it is running."),
    "restarting": (
        "has ended and is started again",
        "Ask again when it runs; 'remoe logs {name} --function main' says why it ended.",
    ),
    "stopped": ("is stopped (process {pid})", "Run 'kill -CONT {pid}' to let it go on."),
    "failed": ("has ended too often", "See 'remoe logs {name} --function main', then destroy and deploy again."),
    "ended": ("has ended with its deployment", "Deploy again."),
}
_MAIN_RUNTIME_MB = 512  # torch and transformers, besides the weights


_NOT_HERE: dict[Endpoint | None, str] = {
    Endpoint.sagemaker: "SageMaker endpoint",
    Endpoint.lambda_gpu: "instance of Lambda with a GPU",
}


@dataclass(frozen=True)
class LocalTarget:
    """Deployments of the local twin (deploy/target.py says what each method does)."""

    console: Console

    def preview(self, plan_path: Path, name: str, options: DeployOptions) -> tuple[dict[str, Any], Overview]:
        raise UsageError("--dry-run goes with --target aws.", "Add --target aws, or leave --dry-run out.")

    def deploy(self, plan_path: Path, name: str, options: DeployOptions) -> dict[str, Any]:
        if options.endpoint in _NOT_HERE:
            what = _NOT_HERE[options.endpoint]
            raise UsageError(f"The local twin has no {what}.", "Leave --endpoint out: its main server is the same program.")
        lifecycle.refuse_foreign(name)
        with self.console.progress("Checking the plan"):
            inputs = read_inputs(plan_path)
        agreed_terms(inputs, options.accept_loss, self.console.say)
        options = replace(options, speculate=options.drafts(inputs[0], self.console.say))
        check_model(*inputs[:2], self.console.progress)
        if not peers.known():
            self.console.say("This system does not tell whose a connection is: other users of this machine can ask the deployment.")
        lifecycle.start(name, lambda folder: self._prepare(folder, name, plan_path, inputs, options), self.console)
        return self.status(name)

    def _prepare(self, folder: Path, name: str, plan_path: Path, inputs: Inputs, options: DeployOptions) -> TwinConfig:
        """Write the deployment's files into `folder`; return what the twin shall run."""
        plan, profile, catalog = inputs
        owned.copy_file(plan_path, folder / "plan.json")
        with self.console.progress("Packaging functions") as report:
            manifest = bundle.build(plan, plan_path, profile, folder / "bundle", report)
        with self.console.progress("Checking packaged functions"):
            bundle.read(folder / "bundle")
        code = bundle.unpack_code(folder / "bundle")
        config = main_files.server_config(
            plan,
            profile,
            catalog,
            manifest,
            lambda entry: f"{name}-{entry}",
            speculate=options.speculate,
            cache_experts=options.cache_experts,
        )
        artifacts.write_json(folder / "server.json", config)
        functions = tuple(
            FunctionConfig(
                name=f"{name}-{entry.name}",
                handler=bundle.HANDLER,
                code_dir=str(code),
                environment={
                    "REMOE_SHARD": str(folder / "bundle" / entry.shard),
                    "REMOE_SHARD_HEADER": f"{entry.head_bytes}:{entry.head_sha256}",
                    **bundle.expert_form(entry.form),
                },
                memory_mb=entry.memory_mb,
                timeout_s=entry.timeout_s,
                reserved_concurrency=entry.replicas,
            )
            for entry in manifest.functions
        )
        main: MainConfig | FunctionConfig | None = None
        match options.endpoint:
            case None:
                main = _main_server(folder, self.receipts(name))
            case Endpoint.aws_lambda:
                with self.console.progress("Packaging the main function", of_bytes=True) as report:
                    packaged = main_files.write_main_files(config, folder / "plan.json", folder / "main", report)
                main = _main_function(name, plan, folder / "main", packaged.bytes)
        idle_s = catalog.function.idle_ttl_s
        return TwinConfig(name=name, functions=functions, main=main, rtt_ms=options.rtt_ms, idle_ttl_s=idle_s, python=sys.executable)

    def names(self) -> list[str]:
        return lifecycle.names()

    def status(self, name: str) -> dict[str, Any]:
        """Return the twin's status; a main server adds what it holds in memory to `main`.

        The added figures are those of MainState (runtime/main_state.py).
        """
        document = lifecycle.status(name)
        main = document["main"]
        if main and main["kind"] == "server" and main["state"] == "running":
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"http://127.0.0.1:{main['port']}/main", trust_env=False, timeout=5)
                main |= answer.raise_for_status().json()
        return document

    def overview(self, status: dict[str, Any]) -> Overview:
        return overview.overview(status)

    def logs(self, name: str, function: str | None = None, lines: int = 50) -> dict[str, list[str]]:
        return lifecycle.logs(name, function, lines)

    def main_address(self, name: str) -> client.MainAddress:
        document = lifecycle.status(name)
        match document["main"]:
            case {"kind": "server", "state": "running", "port": port}:
                return client.Http(f"http://127.0.0.1:{port}", own_user=True)
            case {"kind": "lambda", "name": function}:
                connection = make_client(document["endpoint"], 1, read_timeout_s(MAX_TIMEOUT_S))
                return client.LambdaMain(function, connection, book=self.receipts(name))
            case None if document["endpoint"]:
                raise DeployError(f"'{name}' has functions only.", f"Run its main function on this machine: 'remoe serve {name}'.")
            case {"state": state, "pid": pid}:
                what, hint = _MAIN_STATES[state]
                raise DeployError(f"The main server of '{name}' {what}.".format(pid=pid), hint.format(name=name, pid=pid))
        raise _down(document)

    def deployed_plan(self, name: str) -> Path:
        return lifecycle.known_dir(name) / "plan.json"

    def serve(self, name: str, host: str, port: int, asked: ServeOptions = SERVE_PLAINLY) -> None:
        document = lifecycle.status(name)
        if document["endpoint"] is None:
            raise _down(document)
        connect = partial(make_caller, document["endpoint"])
        server_json = lifecycle.state_dir(name) / "server.json"
        serve_here(name, server_json, connect, host, port, self.console, asked, book=self.receipts(name))

    def receipts(self, name: str) -> Book:
        lifecycle.state_dir(name)  # raises UsageError for what is no name
        return book_of("local", name)

    def deployed_at(self, name: str) -> datetime | None:
        return datetime.fromtimestamp((lifecycle.known_dir(name) / "server.json").stat().st_mtime, UTC)

    def destroy(self, name: str) -> dict[str, Any]:
        """Destroy a deployment; `state` is "absent" when there was none.

        What is said holds for this machine: a deployment that was started elsewhere is refused.
        """
        folder = lifecycle.state_dir(name)
        if folder.is_dir() and place.recorded(folder) is None:
            self.console.say("Its files do not say on which machine it was started; what follows holds for this one.")
        with self.console.progress(f"Destroying {name}"):
            kept = lifecycle.destroy(name)
        state = "absent" if kept is None else "destroyed"
        return {"name": name, "target": "local", "state": state, "left": [], "kept": list(map(str, kept or []))}


def _down(document: dict[str, Any]) -> DeployError:
    return DeployError(f"The deployment '{document['name']}' does not run here: it is {document['state']}.", document["hint"])


def _main_server(folder: Path, book: Book) -> MainConfig:
    # -P: nothing is imported from the current folder, which others may have written.
    command = [sys.executable, "-P", "-m", "remoe_cli.runtime.server"]
    return MainConfig(argv=[*command, str(folder / "server.json"), str(book.folder)])


def _main_function(name: str, plan: Plan, folder: Path, main_bytes: int) -> FunctionConfig:
    """Make the main function a Lambda function with the plan's memory, run by this installation."""
    needed_mb = math.ceil(main_bytes / 2**20) + _MAIN_RUNTIME_MB
    memory_mb = min(max(plan.main.memory_mb, needed_mb), MAX_MEMORY_MB)
    if needed_mb > MAX_MEMORY_MB:
        raise DeployError(
            f"The main function needs {needed_mb} MB, and a Lambda function has {MAX_MEMORY_MB} MB at most.",
            "Leave --endpoint lambda out, or plan with more experts remote.",
        )
    return FunctionConfig(
        name=f"{name}-main",
        handler="remoe_cli.runtime.lambda_main.handle",
        runtime="remoe_cli.runtime.lambda_runtime",
        code_dir=str(Path(remoe_cli.__file__).parents[1]),
        environment={"REMOE_MAIN": str(folder / MANIFEST), "REMOE_SHARDS": str(folder.parent / "bundle")},
        memory_mb=memory_mb,
        timeout_s=MAX_TIMEOUT_S,
        reserved_concurrency=1,
    )
