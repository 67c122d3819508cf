"""For the verifier: whether a placement is well formed, and keeps its limits.

These are memory, context, time and working instances.
"""

from __future__ import annotations

from collections.abc import Iterator

from remoe_cli.model.spec import MoeSpec
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Outcome, Plan
from remoe_cli.plan.verify import waking
from remoe_cli.plan.verify.baselines import busy_s, cold_mean_s
from remoe_cli.plan.verify.cost import (
    TOLERANCE,
    gpu_room_bytes,
    gpu_tier,
    gpu_work_bytes,
    largest_pass,
    main_bytes,
    read_bytes,
    request_bytes,
)
from remoe_cli.plan.verify.finding import Finding, require
from remoe_cli.plan.verify.inputs import VerifierInputs
from remoe_cli.plan.verify.steps import at_once
from remoe_cli.profile.record import Profile


def placement(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    """Check menu membership, instances, replicas, and one sound entry per MoE layer."""
    spec, workload = profile.record.spec, plan.workload
    yield from require(plan.main in catalog.main.menu, "main", plan.main, "not on the catalog's menu")
    buyable = plan.main.usd_per_hour is None or workload.requests_per_hour is not None
    yield from require(buyable, "main", plan.main.name, "rented by the hour, so no request has a price without traffic")
    rented = plan.main.usd_per_hour is not None and workload.requests_per_hour is not None
    yield from require(plan.instances >= 1 and (rented or plan.instances == 1), "instances", plan.instances, "only rented ones are counted")
    layers = tuple(layer.layer for layer in plan.layers)
    yield from require(layers == spec.moe_layers, "layers", layers, spec.moe_layers)
    for index, layer in enumerate(plan.layers):
        name = f"layers[{index}]"
        sound = list(layer.remote) == sorted(set(layer.remote)) and all(0 <= e < spec.experts_per_layer for e in layer.remote)
        yield from require(sound, f"{name}.remote", layer.remote, f"ids must ascend, from 0 to {spec.experts_per_layer - 1}")
        sound = list(layer.gpu) == sorted(set(layer.gpu) - set(layer.remote)) and all(0 <= e < spec.experts_per_layer for e in layer.gpu)
        yield from require(sound, f"{name}.gpu", layer.gpu, f"ids that ascend, to {spec.experts_per_layer - 1}, and are not remote")
        menu = catalog.function.memory_menu_mb if layer.remote else (0,)
        yield from require(layer.memory_mb in menu, f"{name}.memory_mb", layer.memory_mb, f"menu {menu}")
        replicas = (0,) if not layer.remote else (1,) if layer.functions else range(1, catalog.function.max_replicas + 1)
        yield from require(layer.replicas in replicas, f"{name}.replicas", layer.replicas, f"allowed {tuple(replicas)}")
        if layer.functions:
            whole = sorted(e for part in layer.functions for e in part) == list(layer.remote) and all(layer.functions)
            counted = 2 <= len(layer.functions) <= catalog.function.max_functions
            yield from require(whole and counted, f"{name}.functions", layer.functions, "the remote experts, each in one of 2 or more")


def limits(inputs: VerifierInputs) -> Iterator[Finding]:
    """Check memory of main and expert functions, and working instances."""
    plan, catalog, spec = inputs.plan, inputs.catalog, inputs.profile.record.spec
    side, main = catalog.function, plan.main
    local = sum(spec.experts_per_layer - len(layer.remote) for layer in plan.layers)
    on_gpu = sum(len(layer.gpu) for layer in plan.layers)
    nonexpert_bytes, expert_bytes = read_bytes(inputs)
    served = at_once(catalog, plan.workload, main)
    yield from require(plan.concurrency == served, "concurrency", plan.concurrency, served)
    need, fetched = main_bytes(inputs, main, local - on_gpu), nonexpert_bytes + local * expert_bytes
    yield from require(waking.holds(catalog, main, fetched), "main", main.name, f"its /tmp does not hold {fetched} bytes")
    yield from require(need <= main.memory_mb * 2**20, "main.memory_mb", main.memory_mb, f"needs {need / 2**20:.3f}")
    if main.gpu_memory_mb is not None:
        need, room = request_bytes(inputs, main) + on_gpu * spec.expert_bytes, gpu_room_bytes(inputs, main)
        need += gpu_work_bytes(inputs, main) if on_gpu else 0
        yield from require(need <= room, "main.gpu_memory_mb", f"{room / 2**20:.3f} usable", f"needs {need / 2**20:.3f}")
    yield from require(not on_gpu or gpu_tier(inputs, main), "layers", f"{on_gpu} experts on a GPU", "none can be there")
    tokens = 1 + max(n_in + n_out for n_in, n_out in inputs.longest)
    fits = spec.context_tokens is None or tokens <= spec.context_tokens
    yield from require(fits, "workload.longest", f"a request of {tokens} tokens", f"the model has {spec.context_tokens} positions")
    working = sum(len(layer.parts) * layer.replicas for layer in plan.layers)
    yield from require(working <= side.concurrency_limit, "layers", f"{working} instances of functions", side.concurrency_limit)
    for index, layer in enumerate(plan.layers):
        routed = inputs.layers[index]
        longest = largest_pass(inputs, main)
        for part in layer.parts:
            rows = sum(routed.use[e] * longest for e in part)
            each, beside = _function_bytes(spec)
            need = side.runtime_memory_mb * 2**20 + len(part) * each * side.expert_memory_factor + beside
            need += rows * spec.hidden_state_bytes
            fits = need <= layer.memory_mb * 2**20 * (1 + TOLERANCE)
            yield from require(fits, f"layers[{index}].memory_mb", layer.memory_mb, f"needs {need / 2**20:.3f}")


def _function_bytes(spec: MoeSpec) -> tuple[int, int]:
    """Return the memory that a function needs for each expert, and beside them for one that is being dequantised."""
    if spec.stored is None or not spec.stored.served:
        return spec.expert_bytes, 0
    return (spec.stored.expert_bytes, 0) if spec.stored.packed else (spec.expert_bytes, spec.expert_bytes)


def in_time(inputs: VerifierInputs, found: Outcome) -> bool:
    """Tell whether the instances have the time for all requests."""
    plan = inputs.plan
    per_hour, request_s = plan.workload.requests_per_hour, busy_s(inputs, plan.main, found, cold_mean_s(inputs, plan.main, plan.layers))
    return plan.main.usd_per_hour is None or per_hour is None or request_s * per_hour <= 3600 * plan.instances * (1 + 2 * TOLERANCE)
