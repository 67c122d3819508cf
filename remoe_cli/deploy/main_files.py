"""The files of a main function, the same on every target: its configuration and its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from remoe_cli import artifacts, owned
from remoe_cli.model.checkpoint import find_profiled
from remoe_cli.model.draft import Speculate
from remoe_cli.package import partial_checkpoint
from remoe_cli.package.assistant_files import write_assistant
from remoe_cli.package.bundle import FunctionEntry, Manifest
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import expert_functions, main_function, prices
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import MB, Main, Placement, Problem
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import ModelRef, Profile
from remoe_cli.runtime import last_resort
from remoe_cli.runtime.expected_cost import costs_of
from remoe_cli.runtime.receipt import Prices
from remoe_cli.runtime.server_config import ServedFunction, ServerConfig, StartPolicy

_MOST_EXPERT_ROWS = 1e6
_RESERVED = 0.05  # of the main function's memory, which no experts are kept in that are remote
_WASTED_SHARE = 0.1  # of what a mean request costs, which starting its functions ahead may be expected to waste


def server_config(
    plan: Plan,
    profile: Profile,
    catalog: Catalog,
    bundle: Manifest,
    invoked: Callable[[str], str],
    stored: Callable[[FunctionEntry], str] = lambda entry: entry.shard,
    speculate: Speculate | None = None,
    cache_experts: bool = False,
) -> ServerConfig:
    """Make the document server.json.

    `invoked` maps a bundle entry to the name of its function, `stored` to where its shard is, below the place of all shards. `speculate`
    is by default the plan's.
    """
    speculate = plan.speculate if speculate is None else speculate
    expert_rows = _expert_rows(profile.in_form(plan.model.packed))
    # All functions of a layer have the /tmp that the fullest needs, as the plan is priced.
    problem, storage_mb = problem_of(plan, profile, catalog).at_main(plan.main), dict[int, float]()
    for f in bundle.functions:
        own_mb = float(prices.function_storage_mb(catalog, bundle.spec.fetched_expert_bytes, len(f.experts)))
        storage_mb[f.layer] = max(storage_mb.get(f.layer, 0.0), own_mb)
    use = dict(zip(problem.spec.moe_layers, np.clip(problem.workload.use, 0.0, 1.0).round(6).tolist(), strict=True))
    starts = {f.name: _start_usd(problem, f.memory_mb, storage_mb[f.layer]) for f in bundle.functions}
    function_prices = prices.function_prices(catalog)
    return ServerConfig(
        model=bundle.model,
        spec=bundle.spec,
        functions=tuple(
            ServedFunction(
                layer=f.layer,
                function=invoked(f.name),
                experts=f.experts,
                replicas=f.replicas,
                expert_rows=expert_rows,
                timeout_s=f.timeout_s,
                shard=stored(f),
                head_bytes=f.head_bytes,
                head_sha256=f.head_sha256,
                form=f.form,
                use=tuple(use[f.layer][expert] for expert in f.experts),
                start_usd=starts[f.name][0],
                expert_usd=starts[f.name][1],
            )
            for f in bundle.functions
        ),
        prices=Prices(
            catalog=catalog.name,
            main=main_function.prices_of(problem, Main(plan.main, plan.instances)),
            function=function_prices,
            storage_mb={invoked(f.name): storage_mb[f.layer] for f in bundle.functions},
        ),
        gpu=main_function.on_gpu(problem, plan.main),
        gpu_experts={layer.layer: layer.gpu for layer in plan.layers if layer.gpu},
        served=plan.workload.served,
        concurrency=plan.concurrency,
        speculate=speculate,
        assistant=None
        if plan.assistant is None or speculate == "off"
        else ModelRef(path=plan.assistant.name, revision=plan.assistant.revision),
        planned=costs_of(problem, Placement(plan.main, plan.layers, plan.instances)),
        cache_experts=cache_experts,
        spare_experts=_spare_experts(problem, plan) if bundle.functions else 0,
        start_ahead=StartPolicy(
            idle_s=catalog.function.idle_ttl_s,
            most_usd=_WASTED_SHARE * plan.outcome.cost_usd_per_request,
            n_in=round(problem.workload.n_in),
            usd_per_call=function_prices.usd_per_call,
        )
        if bundle.functions
        else None,
    )


def write_main_files(
    config: ServerConfig, plan_path: Path, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> partial_checkpoint.MainManifest:
    """Write the main function's weights and assistant, server.json, plan.json and their manifest.

    `progress` is called with the bytes of weights done and their total.

    Raises: ModelError for a model that is missing or incomplete, ArtifactError for one that has changed since it was profiled.
    """
    remote: dict[int, tuple[int, ...]] = {}
    for function in config.functions:
        remote[function.layer] = (*remote.get(function.layer, ()), *function.experts)
    checkpoint = find_profiled(config.model.path, config.model.revision)
    partial_checkpoint.write_partial_checkpoint(checkpoint, config.spec.local_experts(remote), folder, progress)
    checkpoint.check(config.model.revision)
    if (drafting := config.assistant) is not None:
        assistant = find_profiled(drafting.path, drafting.revision)
        write_assistant(assistant, folder)
        assistant.check(drafting.revision)
    artifacts.write_json(folder / "server.json", config)
    owned.copy_file(plan_path, folder / "plan.json")
    return partial_checkpoint.seal(folder)


def _spare_experts(problem: Problem, plan: Plan) -> int:
    """Count the experts that fit the main function's CPU memory beside all that the plan puts there, less a reserve."""
    local = problem.spec.experts - sum(len(layer.remote) + len(layer.gpu) for layer in plan.layers)
    free_bytes = plan.main.memory_mb * MB * (1.0 - _RESERVED) - main_function.main_memory_bytes(problem, plan.main, local)
    return max(0, int((free_bytes - last_resort.ROOM_BYTES) // main_function.cpu_expert_bytes(problem, plan.main)))


def _start_usd(problem: Problem, memory_mb: int, storage_mb: float) -> tuple[float, float]:
    """Price the start of a function with so much memory and /tmp, and reading an expert then."""
    money, expert_bytes = prices.function_prices(problem.catalog), problem.spec.fetched_expert_bytes
    usd_per_s = float(prices.function_usd_per_s(money, memory_mb, storage_mb))
    seconds = [float(expert_functions.cold_s(problem, experts)) for experts in (0, 1)]
    reads = [float(prices.function_reads(problem.catalog, expert_bytes, experts)) for experts in (0, 1)]
    usd = [each_s * usd_per_s + count * money.usd_per_read for each_s, count in zip(seconds, reads, strict=True)]
    return usd[0], usd[1] - usd[0]


def _expert_rows(profile: Profile) -> float:
    """Return the work of calling one expert besides its rows, in rows.

    It is taken at one vCPU, as the planner does when it divides experts among replicas (plan/cost/expert_functions.py). Where rows cost
    next to nothing it is a million: then only the number of experts counts.
    """
    work_s = profile.record.latency.remote_expert.work_s
    one_s, many_s = float(work_s(1, 1.0)), float(work_s(65, 1.0))
    row_s = (many_s - one_s) / 64
    return min(max(one_s / row_s - 1, 0.0), _MOST_EXPERT_ROWS) if row_s > 0 else _MOST_EXPERT_ROWS
