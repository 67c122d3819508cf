"""A second opinion on a plan: everything it states, worked out again from profile and catalog.

This module imports nothing of the planner (no solver, cost model, workload) and is plain loops over experts and recorded
tokens on purpose: an error in the planner is not repeated here. Equations: Remoe (arXiv 2512.18674), sections 3 and 4 of
the method, with one invocation per layer and token, E[max] over the recorded tokens, and warm sequential requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from statistics import fmean

from remoe_cli.plan.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, MainSpec, Outcome, Plan
from remoe_cli.profile.latency_record import Timing
from remoe_cli.profile.record import Profile

TOLERANCE = 1e-9
ENOUGH_TOKENS = 200
WORTHWHILE = 1e-3  # a plan must be cheaper than all experts local by more than this share


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
    routed = _layers(plan, profile)
    return (*_limits(plan, profile, catalog, routed), *_numbers(plan, profile, catalog, routed))


def _same(field: str, stated: float, found: float) -> Iterator[Finding]:
    if not math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=1e-18):
        yield Finding(field, repr(stated), repr(found))


def _require(holds: bool, field: str, stated: object, found: object) -> Iterator[Finding]:
    if not holds:
        yield Finding(field, str(stated), str(found))


def _sources(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    yield from _require(plan.profile.sha256 == profile.sha256, "profile.sha256", plan.profile.sha256, profile.sha256)
    yield from _require(plan.catalog.sha256 == catalog.file.sha256, "catalog.sha256", plan.catalog.sha256, catalog.file.sha256)


def _structure(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[Finding]:
    """Menu membership, replicas, and one sound entry per MoE layer."""
    spec = profile.record.spec
    yield from _require(plan.main in catalog.main.menu, "main", plan.main, "not on the catalog's menu")
    yield from _require(min(plan.workload.n_in, plan.workload.n_out) >= 1, "workload", plan.workload, "lengths must be 1 or more")
    layers = tuple(layer.layer for layer in plan.layers)
    yield from _require(layers == spec.moe_layers, "layers", layers, spec.moe_layers)
    for index, layer in enumerate(plan.layers):
        name = f"layers[{index}]"
        sound = list(layer.remote) == sorted(set(layer.remote)) and all(0 <= e < spec.experts_per_layer for e in layer.remote)
        yield from _require(sound, f"{name}.remote", layer.remote, f"ids must ascend, from 0 to {spec.experts_per_layer - 1}")
        menu = catalog.function.memory_menu_mb if layer.remote else (0,)
        yield from _require(layer.memory_mb in menu, f"{name}.memory_mb", layer.memory_mb, f"menu {menu}")
        replicas = range(1, catalog.function.max_replicas + 1) if layer.remote else (0,)
        yield from _require(layer.replicas in replicas, f"{name}.replicas", layer.replicas, f"allowed {tuple(replicas)}")


@dataclass(frozen=True)
class _Layer:
    """One layer's expected prompt tokens and recorded decode choices: each set of experts, and how many tokens chose it."""

    tokens: list[float]
    choices: Counter[tuple[int, ...]]

    def hits(self, remote: Collection[int]) -> Counter[tuple[int, int]]:
        """How many tokens hit so many local and so many remote experts."""
        found: Counter[tuple[int, int]] = Counter()
        for chosen, tokens in self.choices.items():
            away = sum(e in remote for e in chosen)
            found[len(chosen) - away, away] += tokens
        return found


def _layers(plan: Plan, profile: Profile) -> list[_Layer]:
    counts, trace = profile.counts("prefill"), profile.arrays["trace_ids"]
    out = []
    for index in range(len(profile.record.spec.moe_layers)):
        totals = [int(counts[:, index, expert].sum()) for expert in range(profile.record.spec.experts_per_layer)]
        rows = plan.workload.n_in * profile.record.spec.top_k
        choices = Counter(tuple(sorted(e for e in token if e >= 0)) for token in trace[:, index].tolist())
        out.append(_Layer([rows * total / sum(totals) for total in totals], choices))
    return out


def _time_s(timing: Timing, tokens: float, vcpus: float) -> float:
    return float(timing.seconds(tokens, vcpus))


def _vcpus(catalog: Catalog, memory_mb: int) -> float:
    return min(catalog.function.max_useful_vcpus, memory_mb / catalog.function.mb_per_vcpu)


def _split(profile: Profile, catalog: Catalog, layer: LayerPlan, tokens: list[float]) -> list[list[int]]:
    """The experts of each replica: longest first, each to the replica with the least work so far."""
    parts: list[list[int]] = [[] for _ in range(layer.replicas)]
    work = [0.0] * layer.replicas
    for expert in sorted((e for e in layer.remote if tokens[e] > 0), key=lambda e: (-tokens[e], e)):
        least = work.index(min(work))
        parts[least].append(expert)
        work[least] += float(profile.record.latency.remote_expert.work_s(tokens[expert], _vcpus(catalog, layer.memory_mb)))
    return [part for part in parts if part]


def _invocation(profile: Profile, catalog: Catalog, memory_mb: int, rows: tuple[float, ...]) -> tuple[float, float]:
    """Seconds waited for one invocation with so many rows for each of its experts, and what it costs.

    A live target's overhead, where the profile has it, goes before the catalog's. Only time in the function is billed; of an overhead
    with a spread, each of the equally likely values is rounded up by itself.
    """
    side, timing, measured = catalog.function, profile.record.latency.remote_expert, profile.record.latency.invocation
    vcpus = _vcpus(catalog, memory_mb)
    rate = measured.bytes_per_s if measured else side.network_bytes_per_s
    outside_s = fmean(measured.unbilled_s.tenths) if measured else side.warm_unbilled_s
    inside_s = float(timing.elapsed_s(sum(float(timing.work_s(n, vcpus)) for n in rows), vcpus))
    inside_s += 2 * sum(rows) * profile.record.spec.hidden_state_bytes * side.wire_expansion / rate
    durations_s = [overhead_s + inside_s for overhead_s in (measured.billed_s.tenths if measured else (side.warm_billed_s,))]
    billed_ms = fmean(math.ceil(d * 1000 / side.billing_granularity_ms - 1e-6) * side.billing_granularity_ms for d in durations_s)
    usd = billed_ms / 1000 * memory_mb / 1024 * side.usd_per_gb_second + side.usd_per_request
    return outside_s + fmean(durations_s), usd


def _accelerated(catalog: Catalog) -> bool:
    return catalog.main.usd_per_accelerator_gb_second > 0


def _request_bytes(plan: Plan, profile: Profile) -> int:
    """Non-expert modules, and KV cache and hidden states of the request."""
    spec, tokens = profile.record.spec, plan.workload.n_in + plan.workload.n_out
    kv = sum(layer.bytes_per_token * (tokens if layer.window is None else min(tokens, layer.window)) for layer in spec.kv_layers)
    return spec.nonexpert_bytes + kv + tokens * spec.hidden_state_bytes


@dataclass(frozen=True)
class _Placed:
    """One layer of a placement: `hits` counts tokens by local and remote experts hit."""

    plan: LayerPlan
    tokens: list[float]
    hits: Counter[tuple[int, int]]


def _placed(layers: tuple[LayerPlan, ...], routed: list[_Layer]) -> list[_Placed]:
    return [_Placed(plan, layer.tokens, layer.hits(set(plan.remote))) for plan, layer in zip(layers, routed, strict=True)]


def _price(plan: Plan, profile: Profile, catalog: Catalog, main: MainSpec, layers: list[_Placed]) -> Outcome:
    latency, workload = profile.record.latency, plan.workload
    speed = 1.0 if main.vcpus is None else min(1.0, main.vcpus / latency.main_vcpus)
    beside = 1.0 if _accelerated(catalog) else speed
    slower = (latency.serving.prefill, latency.serving.decode) if latency.serving else (1.0, 1.0)
    ttft = float(latency.nonexpert_prefill.seconds(workload.n_in)) * slower[0] / beside + 2 * len(layers) * float(
        latency.copy_s.seconds(workload.n_in)
    )
    tpot = latency.nonexpert_decode_s * slower[1] / beside + 2 * len(layers) * float(latency.copy_s.seconds(1))
    step_s = _time_s(latency.local_expert, 1, latency.main_vcpus) * slower[1] / speed
    remote_usd = 0.0
    for placed in layers:
        layer, remote = placed.plan, set(placed.plan.remote)
        local_s = sum(_time_s(latency.local_expert, n, latency.main_vcpus) for e, n in enumerate(placed.tokens) if e not in remote)
        longest = 0.0
        for part in _split(profile, catalog, layer, placed.tokens):
            call_s, usd = _invocation(profile, catalog, layer.memory_mb, tuple(placed.tokens[e] for e in part))
            longest = max(longest, call_s)
            remote_usd += usd
        ttft += max(local_s * slower[0] / speed, longest)
        calls = {0: (0.0, 0.0)} | {
            h: _invocation(profile, catalog, layer.memory_mb, (1.0,) * h) for h in range(1, profile.record.spec.top_k + 1) if remote
        }
        counted = list(placed.hits.values())
        tpot += fmean((max(local * step_s, calls[away][0]) for local, away in placed.hits), counted)
        remote_usd += workload.n_out * fmean((calls[away][1] for _, away in placed.hits), counted)
    side = catalog.main
    rate = side.usd_per_gb_second * main.memory_mb / 1024 + side.usd_per_accelerator_gb_second * _request_bytes(plan, profile) / 2**30
    return Outcome(cost_usd_per_request=rate * (ttft + workload.n_out * tpot) + remote_usd, ttft_s=ttft, tpot_s=tpot)


def _main_bytes(plan: Plan, profile: Profile, catalog: Catalog, layers: tuple[LayerPlan, ...]) -> float:
    spec = profile.record.spec
    local = sum(spec.experts_per_layer - len(layer.remote) for layer in layers)
    held = plan.workload.n_out * spec.hidden_state_bytes if _accelerated(catalog) else _request_bytes(plan, profile)
    return catalog.main.runtime_memory_mb * 2**20 + held + local * spec.expert_bytes


def _limits(plan: Plan, profile: Profile, catalog: Catalog, routed: list[_Layer]) -> Iterator[Finding]:
    """Memory of main and expert functions, payload, targets."""
    spec, side = profile.record.spec, catalog.function
    need = _main_bytes(plan, profile, catalog, plan.layers)
    yield from _require(need <= plan.main.memory_mb * 2**20, "main.memory_mb", plan.main.memory_mb, f"needs {need / 2**20:.3f}")
    for index, placed in enumerate(_placed(plan.layers, routed)):
        layer, tokens = placed.plan, placed.tokens
        if layer.remote:
            rows = sum(tokens[e] for e in layer.remote)
            need = side.runtime_memory_mb * 2**20 + len(layer.remote) * spec.expert_bytes * side.expert_memory_factor
            need += rows * spec.hidden_state_bytes
            fits = need <= layer.memory_mb * 2**20 * (1 + TOLERANCE)
            yield from _require(fits, f"layers[{index}].memory_mb", layer.memory_mb, f"needs {need / 2**20:.3f}")
        for part in _split(profile, catalog, layer, tokens):
            payload = sum(tokens[e] for e in part) * spec.hidden_state_bytes * side.wire_expansion
            fits = payload <= side.payload_limit_bytes * (1 + TOLERANCE)
            found = f"payload {payload:.0f} of {side.payload_limit_bytes} bytes"
            yield from _require(fits, f"layers[{index}].replicas", layer.replicas, found)


def _meets(plan: Plan, outcome: Outcome) -> bool:
    pairs = ((outcome.ttft_s, plan.targets.ttft_s), (outcome.tpot_s, plan.targets.tpot_s))
    return all(target is None or value <= target * (1 + 2 * TOLERANCE) for value, target in pairs)


def _numbers(plan: Plan, profile: Profile, catalog: Catalog, routed: list[_Layer]) -> Iterator[Finding]:
    """Cost and latency, bound and gap, the baseline, and the verdict that follows from them."""
    outcome = _price(plan, profile, catalog, plan.main, _placed(plan.layers, routed))
    cost = outcome.cost_usd_per_request
    yield from _same("cost_usd_per_request", plan.cost_usd_per_request, cost)
    yield from _same("ttft_s", plan.ttft_s, outcome.ttft_s)
    yield from _same("tpot_s", plan.tpot_s, outcome.tpot_s)
    yield from _require(_meets(plan, outcome), "targets", plan.targets, f"TTFT {outcome.ttft_s} s, TPOT {outcome.tpot_s} s")
    yield from _require(0 <= plan.lower_bound_usd <= cost * (1 + TOLERANCE), "lower_bound_usd", plan.lower_bound_usd, f"cost is {cost}")
    gap = (cost - plan.lower_bound_usd) / cost if cost > 0 else 0.0
    yield from _require(abs(plan.gap - gap) <= TOLERANCE, "gap", plan.gap, gap)
    statuses: dict[str, Callable[[], bool]] = {
        "optimal": lambda: plan.placement == "exact" and gap <= 2 * TOLERANCE,
        "within-gap": lambda: plan.placement == "exact" and gap <= WORTHWHILE + TOLERANCE,
        "time-limit": lambda: plan.placement == "exact",
        "forced": lambda: plan.placement == "forced",
    }
    yield from _require(statuses[plan.status](), "status", plan.status, f"gap {gap}, placement {plan.placement}")
    baseline = _all_local(plan, profile, catalog, routed)
    stated = plan.baselines.get("all-local")
    if baseline is None or stated is None:
        yield from _require(baseline is stated, "baselines", stated, baseline)
    else:
        for field, value in baseline:
            yield from _same(f"baselines.all-local.{field}", getattr(stated, field), value)
    verdict = "not recommended"
    if len(profile.arrays["trace_ids"]) < ENOUGH_TOKENS:
        verdict = "insufficient evidence"
    elif baseline is None or not _meets(plan, baseline) or cost < baseline.cost_usd_per_request * (1 - WORTHWHILE):
        verdict = "recommended"
    yield from _require(plan.verdict == verdict, "verdict", plan.verdict, verdict)


def _all_local(plan: Plan, profile: Profile, catalog: Catalog, routed: list[_Layer]) -> Outcome | None:
    """All experts local on the cheapest main spec that meets the targets, else on the cheapest that holds them (fastest of equals)."""
    layers = tuple(LayerPlan(layer=layer, remote=(), memory_mb=0, replicas=0) for layer in profile.record.spec.moe_layers)
    holding = [main for main in catalog.main.menu if _main_bytes(plan, profile, catalog, layers) <= main.memory_mb * 2**20]
    placed = _placed(layers, routed)
    outcomes = [_price(plan, profile, catalog, main, placed) for main in holding]
    pool = [outcome for outcome in outcomes if _meets(plan, outcome)] or outcomes
    least = min((outcome.cost_usd_per_request for outcome in pool), default=0.0)
    equals = [outcome for outcome in pool if outcome.cost_usd_per_request <= least * (1 + TOLERANCE)]
    return min(equals, key=lambda outcome: outcome.ttft_s, default=None)
