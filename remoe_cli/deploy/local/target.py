"""From a plan to a running local deployment: bundle, functions, main server, all in one state directory.

The directory of a deployment holds, beside the twin's own files:

    plan.json      a copy of the plan
    bundle/        the functions' code and shards (package/bundle.py)
    server.json    what the main server is told (runtime/server.py)
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from remoe_cli import artifacts
from remoe_cli.deploy.inputs import read_inputs
from remoe_cli.deploy.local import lifecycle
from remoe_cli.deploy.local.config import FunctionConfig, MainConfig, TwinConfig
from remoe_cli.package import bundle
from remoe_cli.plan.catalog import Catalog
from remoe_cli.plan.document import Plan
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.receipt import Prices
from remoe_cli.runtime.server import ServedFunction, ServerConfig

_TIMEOUT_S = 30.0
_MOST_EXPERT_ROWS = 1e6
Progress = Callable[[int, int], None]


def deploy(plan_path: Path, name: str, *, rtt_ms: float, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Check the plan, build its bundle and start everything; returns the status document. On failure nothing is left.

    Raises ArtifactError for a plan that the verifier does not confirm, HeldError for a name that is taken.
    """
    plan, profile, catalog = read_inputs(plan_path)

    def prepare(folder: Path) -> TwinConfig:
        shutil.copyfile(plan_path, folder / "plan.json")
        manifest = bundle.build(plan, plan_path, profile, folder / "bundle", progress)
        bundle.read(folder / "bundle")
        code = bundle.unpack_code(folder / "bundle")
        port = _free_port()
        artifacts.write_json(folder / "server.json", _server_config(name, plan, folder / "plan.json", profile, catalog, manifest, port))
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
        server = MainConfig(argv=[sys.executable, "-m", "remoe_cli.runtime.server", str(folder / "server.json")], port=port)
        return TwinConfig(name=name, functions=functions, main=server, rtt_ms=rtt_ms, python=sys.executable)

    lifecycle.start(name, prepare, say)
    return status(name)


def _server_config(
    name: str, plan: Plan, plan_file: Path, profile: Profile, catalog: Catalog, manifest: bundle.Manifest, port: int
) -> ServerConfig:
    expert_rows = _expert_rows(profile)
    return ServerConfig(
        model=manifest.model,
        spec=manifest.spec,
        functions=tuple(
            ServedFunction(layer=f.layer, function=f"{name}-{f.name}", experts=f.experts, replicas=f.replicas, expert_rows=expert_rows)
            for f in manifest.functions
        ),
        port=port,
        plan=str(plan_file),
        prices=Prices(
            catalog=catalog.name,
            main_gb=plan.main.memory_mb / 1024,
            main_usd_per_gb_second=catalog.main_usd_per_gb_second,
            function_usd_per_gb_second=catalog.function_usd_per_gb_second,
            function_usd_per_request=catalog.function.usd_per_request,
        ),
    )


def _expert_rows(profile: Profile) -> float:
    """What an expert adds to an invocation besides its rows, in rows; at one vCPU, where the planner divides among replicas too
    (plan/remote_side.py, `lpt`). A million where rows cost next to nothing: then only experts count."""
    work_s = profile.record.latency.remote_expert.work_s
    one_s, many_s = float(work_s(1, 1.0)), float(work_s(65, 1.0))
    row_s = (many_s - one_s) / 64
    return min(max(one_s / row_s - 1, 0.0), _MOST_EXPERT_ROWS) if row_s > 0 else _MOST_EXPERT_ROWS


def status(name: str) -> dict[str, Any]:
    """The twin's status document, with what the main server really holds (runtime/server.py, MainState) under `main`."""
    document = lifecycle.status(name)
    main = document["main"]
    if main and main["state"] == "running":
        with suppress(httpx.HTTPError):
            answer = httpx.get(f"http://127.0.0.1:{main['port']}/main", trust_env=False, timeout=5)
            main |= answer.raise_for_status().json()
    return document


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
