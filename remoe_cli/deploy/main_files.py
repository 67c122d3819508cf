"""The files of a main function, the same on every target: its configuration and its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remoe_cli import artifacts, owned
from remoe_cli.model.checkpoint import find_profiled
from remoe_cli.model.draft import Speculate
from remoe_cli.package import partial_checkpoint
from remoe_cli.package.bundle import FunctionEntry, Manifest
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function, prices
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import Main
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import Profile
from remoe_cli.runtime.expected_cost import planned_costs
from remoe_cli.runtime.receipt import Prices
from remoe_cli.runtime.server_config import ServedFunction, ServerConfig

_MOST_EXPERT_ROWS = 1e6


def server_config(
    plan: Plan,
    profile: Profile,
    catalog: Catalog,
    bundle: Manifest,
    invoked: Callable[[str], str],
    stored: Callable[[FunctionEntry], str] = lambda entry: entry.shard,
    speculate: Speculate | None = None,
) -> ServerConfig:
    """Make the document server.json.

    `invoked` maps a bundle entry to the name of its function, `stored` to where its shard is, below the place of all shards. `speculate`
    is by default the plan's.
    """
    expert_rows = _expert_rows(profile.in_form(plan.model.packed))
    # All functions of a layer have the /tmp that the fullest needs, as the plan is priced.
    problem, storage_mb = problem_of(plan, profile, catalog).at_main(plan.main), dict[int, float]()
    for f in bundle.functions:
        own_mb = float(prices.function_storage_mb(catalog, bundle.spec.fetched_expert_bytes, len(f.experts)))
        storage_mb[f.layer] = max(storage_mb.get(f.layer, 0.0), own_mb)
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
            )
            for f in bundle.functions
        ),
        prices=Prices(
            catalog=catalog.name,
            main=main_function.prices_of(problem, Main(plan.main, plan.instances)),
            function=prices.function_prices(catalog),
            storage_mb={invoked(f.name): storage_mb[f.layer] for f in bundle.functions},
        ),
        gpu=main_function.on_gpu(problem, plan.main),
        gpu_experts={layer.layer: layer.gpu for layer in plan.layers if layer.gpu},
        served=plan.workload.served,
        concurrency=plan.concurrency,
        speculate=plan.speculate if speculate is None else speculate,
        planned=planned_costs(plan, profile, catalog),
    )


def write_main_files(
    config: ServerConfig, plan_path: Path, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> partial_checkpoint.MainManifest:
    """Write the main function's weights, server.json, plan.json and their manifest into `folder`.

    `progress` is called with the bytes of weights done and their total.

    Raises: ModelError for a model that is missing or incomplete, ArtifactError for one that has changed since it was profiled.
    """
    remote: dict[int, tuple[int, ...]] = {}
    for function in config.functions:
        remote[function.layer] = (*remote.get(function.layer, ()), *function.experts)
    checkpoint = find_profiled(config.model.path, config.model.revision)
    partial_checkpoint.write_partial_checkpoint(checkpoint, config.spec.local_experts(remote), folder, progress)
    checkpoint.check(config.model.revision)
    artifacts.write_json(folder / "server.json", config)
    owned.copy_file(plan_path, folder / "plan.json")
    return partial_checkpoint.seal(folder)


def _expert_rows(profile: Profile) -> float:
    """Return the work of calling one expert besides its rows, in rows.

    It is taken at one vCPU, as the planner does when it divides experts among replicas (plan/cost/expert_functions.py). Where rows cost
    next to nothing it is a million: then only the number of experts counts.
    """
    work_s = profile.record.latency.remote_expert.work_s
    one_s, many_s = float(work_s(1, 1.0)), float(work_s(65, 1.0))
    row_s = (many_s - one_s) / 64
    return min(max(one_s / row_s - 1, 0.0), _MOST_EXPERT_ROWS) if row_s > 0 else _MOST_EXPERT_ROWS
