"""A second opinion on a plan: everything it states, worked out again from profile and catalog by reprice.py.

Neither module imports anything of the planner (no solver, cost model, workload), so that an error there is not repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from remoe_cli.plan.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, Outcome, Plan, PlannedModel, WorkloadRef
from remoe_cli.plan.reprice import (
    TOLERANCE,
    Books,
    main_bytes,
    open_books,
    outcome,
    outcome_and_costs,
    prompt_rows,
    request_bytes,
)
from remoe_cli.profile.record import Profile

ENOUGH_TOKENS = 200
WORTHWHILE = 1e-3  # a plan must be cheaper than what it is compared with by more than this share
IDEAL = {"fetch"}  # baselines that nobody can buy
NAMES = {"all-local", "mix", "cpu", "gpu", "fetch"}


@dataclass(frozen=True)
class Finding:
    """One statement of the plan that does not hold. `field` is its name in the plan, values are as text."""

    field: str
    stated: str
    found: str


def verify(plan: Plan, profile: Profile, catalog: Catalog) -> tuple[Finding, ...]:
    """All findings against the plan; empty when it agrees to 1e-9 relative with what is worked out here."""
    structure = (*_sources(plan, profile, catalog), *_structure(plan, profile, catalog))
    if structure:  # numbers of a plan that is not well formed mean nothing
        return structure
    books = open_books(plan, profile, catalog)
    return (*_limits(books), *_numbers(books))


def _same(field: str, stated: float, found: float) -> Iterator[Finding]:
    if not math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-18):
        yield Finding(field, repr(stated), repr(found))


def _require(holds: bool, field: str, stated: object, found: object) -> Iterator[Finding]:
    if not holds:
        yield Finding(field, str(stated), str(found))


def _sources(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    yield from _require(plan.profile.sha256 == profile.sha256, "profile.sha256", plan.profile.sha256, profile.sha256)
    yield from _require(plan.catalog.sha256 == catalog.file.sha256, "catalog.sha256", plan.catalog.sha256, catalog.file.sha256)
    model, spec = profile.record.model, profile.record.spec
    profiled = PlannedModel(
        name=model.path,
        revision=model.revision,
        experts_per_layer=spec.experts_per_layer,
        expert_bytes=spec.expert_bytes,
        nonexpert_bytes=spec.nonexpert_bytes,
    )
    for field, found in profiled:
        stated = getattr(plan.model, field)
        yield from _require(stated == found, f"model.{field}", stated, found)


def _structure(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    """Menu membership, lengths, replicas, and one sound entry per MoE layer."""
    spec, workload = profile.record.spec, plan.workload
    yield from _require(plan.main in catalog.main.menu, "main", plan.main, "not on the catalog's menu")
    rented = plan.main.usd_per_hour is not None and workload.requests_per_hour is not None
    yield from _require(
        plan.instances >= 1 and (rented or plan.instances == 1), "instances", plan.instances, "only rented ones are counted"
    )
    yield from _workload(workload)
    layers = tuple(layer.layer for layer in plan.layers)
    yield from _require(layers == spec.moe_layers, "layers", layers, spec.moe_layers)
    for index, layer in enumerate(plan.layers):
        name = f"layers[{index}]"
        sound = list(layer.remote) == sorted(set(layer.remote)) and all(0 <= e < spec.experts_per_layer for e in layer.remote)
        yield from _require(sound, f"{name}.remote", layer.remote, f"ids must ascend, from 0 to {spec.experts_per_layer - 1}")
        menu = catalog.function.memory_menu_mb if layer.remote else (0,)
        yield from _require(layer.memory_mb in menu, f"{name}.memory_mb", layer.memory_mb, f"menu {menu}")
        replicas = (0,) if not layer.remote else (1,) if layer.functions else range(1, catalog.function.max_replicas + 1)
        yield from _require(layer.replicas in replicas, f"{name}.replicas", layer.replicas, f"allowed {tuple(replicas)}")
        if layer.functions:
            whole = sorted(e for part in layer.functions for e in part) == list(layer.remote) and all(layer.functions)
            counted = 2 <= len(layer.functions) <= catalog.function.max_functions
            yield from _require(whole and counted, f"{name}.functions", layer.functions, "the remote experts, each in one of 2 or more")


def _workload(workload: WorkloadRef) -> Iterator[Finding]:
    kinds = workload.lengths
    sound = all(kind.n_in >= 1 and kind.n_out >= 1 and kind.share > 0 for kind in kinds) and math.isclose(sum(k.share for k in kinds), 1)
    name = "workload.kinds" if workload.kinds else "workload"
    yield from _require(sound, name, kinds, "lengths of 1 or more, shares above 0 that sum to 1")
    for name in ("n_in", "n_out"):
        stated, mean = getattr(workload, name), sum(kind.share * getattr(kind, name) for kind in kinds)
        yield from _require(math.isclose(stated, mean), f"workload.{name}", stated, f"mean {mean}")
    yield from _require(0 <= workload.cold_share <= 1, "workload.cold_share", workload.cold_share, "not within 0 and 1")
    per_hour = workload.requests_per_hour
    yield from _require(per_hour is None or per_hour > 0, "workload.requests_per_hour", per_hour, "not above 0")


def _limits(books: Books) -> Iterator[Finding]:
    """Memory of main and expert functions, payload, working instances, time."""
    plan, catalog, spec = books.plan, books.catalog, books.profile.record.spec
    side, main = catalog.function, plan.main
    need = main_bytes(books, main, sum(spec.experts_per_layer - len(layer.remote) for layer in plan.layers))
    yield from _require(need <= main.memory_mb * 2**20, "main.memory_mb", main.memory_mb, f"needs {need / 2**20:.3f}")
    if main.gpu_memory_mb is not None:
        need = request_bytes(books)
        yield from _require(need <= main.gpu_memory_mb * 2**20, "main.gpu_memory_mb", main.gpu_memory_mb, f"needs {need / 2**20:.3f}")
    working = sum(len(layer.parts) * layer.replicas for layer in plan.layers)
    yield from _require(working <= side.concurrency_limit, "layers", f"{working} instances of functions", side.concurrency_limit)
    for index, layer in enumerate(plan.layers):
        routed = books.layers[index]
        for kind in books.kinds:
            for part in layer.parts:
                rows = sum(routed.use[e] * kind.n_in for e in part)
                need = side.runtime_memory_mb * 2**20 + len(part) * spec.expert_bytes * side.expert_memory_factor
                need += rows * spec.hidden_state_bytes
                fits = need <= layer.memory_mb * 2**20 * (1 + TOLERANCE)
                yield from _require(fits, f"layers[{index}].memory_mb", layer.memory_mb, f"needs {need / 2**20:.3f}")
            for sent in prompt_rows(books, layer, routed, kind.n_in):
                payload = sum(sent) * spec.hidden_state_bytes * side.wire_expansion
                fits = payload <= side.payload_limit_bytes * (1 + TOLERANCE)
                found = f"payload {payload:.0f} of {side.payload_limit_bytes} bytes"
                yield from _require(fits, f"layers[{index}].replicas", layer.replicas, found)


def _missed(plan: Plan, found: Outcome) -> Iterator[Finding]:
    """The targets that an outcome misses."""
    values = {"ttft_s": found.ttft_s, "tpot_s": found.tpot_s, "budget_usd": found.cost_usd_per_request}
    for name, target in plan.targets:
        yield from _require(target is None or values[name] <= target * (1 + 2 * TOLERANCE), f"targets.{name}", target, values[name])


def _meets(plan: Plan, found: Outcome) -> bool:
    return not any(_missed(plan, found))


def _in_time(books: Books, found: Outcome, plan: Plan) -> bool:
    """Whether a mean request is answered before the function's timeout, or before the rented instances have the next one to do."""
    request_s = found.ttft_s + books.n_out * found.tpot_s
    if plan.main.usd_per_hour is None:
        return request_s <= books.catalog.main.timeout_s * (1 + 2 * TOLERANCE)
    per_hour = plan.workload.requests_per_hour
    return per_hour is None or request_s * per_hour <= 3600 * plan.instances * (1 + 2 * TOLERANCE)


def _numbers(books: Books) -> Iterator[Finding]:
    """Cost and latency, bound and gap, the baseline, and the verdict that follows from them."""
    plan = books.plan
    found, costs = outcome_and_costs(books, plan.main, plan.instances, plan.layers)
    yield from _same("costs.main_usd", plan.costs.main_usd, costs.main_usd)
    if len(plan.costs.layers_usd) != len(costs.layers_usd):
        yield Finding("costs.layers_usd", f"{len(plan.costs.layers_usd)} layers", f"{len(costs.layers_usd)}")
    for index, (stated_usd, usd) in enumerate(zip(plan.costs.layers_usd, costs.layers_usd, strict=False)):
        yield from _same(f"costs.layers_usd[{index}]", stated_usd, usd)
    for field in ("cost_usd_per_request", "ttft_s", "tpot_s"):
        yield from _same(field, getattr(plan, field), getattr(found, field))
    if plan.placement != "given":
        yield from _missed(plan, found)
    bought, stated = ("main", plan.main) if plan.main.usd_per_hour is None else ("instances", plan.instances)
    yield from _require(_in_time(books, found, plan), bought, stated, f"a request takes {found.ttft_s + books.n_out * found.tpot_s} s")
    yield from _bound(plan, found)
    baseline = _all_local(books)
    local = plan.baselines.get("all-local")
    if baseline is None or local is None:
        yield from _require(baseline is local, "baselines", local, baseline)
    else:
        for field, value in baseline:
            yield from _same(f"baselines.all-local.{field}", getattr(local, field), value)
    yield from _require(plan.baselines.keys() | plan.missing.keys() == NAMES, "baselines", sorted(plan.baselines), f"{sorted(NAMES)}")
    for name, other in plan.baselines.items():
        yield from _require(other.meets == _meets(plan, other), f"baselines.{name}.meets", other.meets, not other.meets)
        yield from _require(other.ideal == (name in IDEAL), f"baselines.{name}.ideal", other.ideal, not other.ideal)
    able = [b.cost_usd_per_request for name, b in plan.baselines.items() if name not in IDEAL and _meets(plan, b)]
    verdict = "not recommended"
    if len(books.profile.arrays["trace_ids"]) < ENOUGH_TOKENS:
        verdict = "insufficient evidence"
    elif _meets(plan, found) and found.cost_usd_per_request < min(able, default=math.inf) * (1 - WORTHWHILE):
        verdict = "recommended"
    yield from _require(plan.verdict == verdict, "verdict", plan.verdict, verdict)


def _bound(plan: Plan, found: Outcome) -> Iterator[Finding]:
    value = {"cost": found.cost_usd_per_request, "ttft": found.ttft_s, "tpot": found.tpot_s}[plan.objective]
    name = "lower_bound_usd" if plan.objective == "cost" else "lower_bound_s"
    bound = getattr(plan, name)
    certified = plan.placement in ("exact", "forced") and bound is not None
    if certified:
        yield from _require(0 <= bound <= value * (1 + TOLERANCE), name, bound, f"value is {value}")
        gap = (value - bound) / value if value > 0 else 0.0
        yield from _require(plan.gap is not None and abs(plan.gap - gap) <= TOLERANCE, "gap", plan.gap, gap)
    else:
        yield from _require(bound is None and plan.gap is None, "gap", plan.gap, "no bound")
    gap = plan.gap if plan.gap is not None else math.inf
    statuses: dict[str, Callable[[], bool]] = {
        "optimal": lambda: plan.placement == "exact" and gap <= 2 * TOLERANCE,
        "within-gap": lambda: plan.placement == "exact" and gap <= WORTHWHILE + TOLERANCE,
        "time-limit": lambda: plan.placement == "exact" and certified,
        "forced": lambda: plan.placement == "forced",
        "given": lambda: plan.placement == "given",
        "heuristic": lambda: plan.placement in ("scan", "paper"),
    }
    yield from _require(statuses[plan.status](), "status", plan.status, f"gap {plan.gap}, placement {plan.placement}")


def _all_local(books: Books) -> Outcome | None:
    """All experts local on the cheapest main spec that meets the targets, else on the cheapest that holds them (fastest of equals)."""
    plan, spec = books.plan, books.profile.record.spec
    layers = tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in spec.moe_layers)
    per_hour, outcomes = plan.workload.requests_per_hour, []
    for main in books.catalog.main.menu:
        room = main_bytes(books, main, spec.experts_per_layer * len(layers)) <= main.memory_mb * 2**20
        if not room or (main.gpu_memory_mb is not None and request_bytes(books) > main.gpu_memory_mb * 2**20):
            continue
        found = outcome(books, main, 1, layers)
        request_s = found.ttft_s + books.n_out * found.tpot_s
        if main.usd_per_hour is not None and per_hour is not None:
            found = outcome(books, main, max(1, math.ceil(request_s * per_hour / 3600 - 1e-9)), layers)
        elif main.usd_per_hour is None and request_s > books.catalog.main.timeout_s * (1 + TOLERANCE):
            continue
        outcomes.append(found)
    pool = [found for found in outcomes if _meets(plan, found)] or outcomes
    least = min((found.cost_usd_per_request for found in pool), default=0.0)
    equals = [found for found in pool if found.cost_usd_per_request <= least * (1 + TOLERANCE)]
    return min(equals, key=lambda found: found.ttft_s, default=None)
