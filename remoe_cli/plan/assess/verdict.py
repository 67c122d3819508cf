"""Whether a plan is worth it: the verdict, what it is based on, and a sentence that says why.

`_basis` decides. `_sentence` words the decision for people; tests/plan/test_verdict.py holds its wording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.assess.baselines import Baselines
from remoe_cli.plan.document import Baseline, BaselineName, Basis, Method, Outcome, Verdict
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import GB_MB, MB, Placement, Problem
from remoe_cli.plan.solve.candidates import ENUMERATED_EXPERTS
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.wording import BASELINE_NAMES, bought, capitalized, millions, per_million

MIN_TRACE_TOKENS = 200  # below, a hit probability of 1% rests on fewer than two tokens
WORTHWHILE = 1e-3  # a plan must be cheaper than what it is compared with by more than this share
VERDICTS: dict[Basis, Verdict] = {
    Basis.TOO_FEW_TOKENS: "insufficient-evidence",
    Basis.MISSES_TARGET: "not-recommended",
    Basis.NOTHING_ELSE_FITS: "recommended",
    Basis.OTHERS_MISS_TARGETS: "recommended",
    Basis.CHEAPER: "recommended",
    Basis.DEARER_THAN_WHOLE_MODEL: "not-recommended",
    Basis.DEARER_THAN_ALL_LOCAL: "not-recommended",
    Basis.ALL_LOCAL_IS_CHEAPEST: "not-recommended",
}


@dataclass(frozen=True)
class Judgement:
    """The verdict, what it is based on, and a sentence that tells people why."""

    verdict: Verdict
    basis: Basis
    reason: str


def judge(problem: Problem, aim: Aim, placement: Placement, outcome: Outcome, others: Baselines) -> Judgement:
    """Recommend a plan only if it meets the targets and every alternative that meets them too costs more."""
    name = cheapest_rival(others.priced)
    basis = _basis(problem, aim, placement, outcome, others, name)
    return Judgement(VERDICTS[basis], basis, _sentence(basis, problem, placement, outcome, others, name))


def _basis(problem: Problem, aim: Aim, placement: Placement, outcome: Outcome, others: Baselines, rival: BaselineName | None) -> Basis:
    if len(problem.workload.trace) < MIN_TRACE_TOKENS:
        return Basis.TOO_FEW_TOKENS
    if not meets(aim, outcome):
        return Basis.MISSES_TARGET
    if rival is None:
        return Basis.OTHERS_MISS_TARGETS if BaselineName.ALL_LOCAL in others.priced else Basis.NOTHING_ELSE_FITS
    if outcome.cost_usd_per_request < others.priced[rival].cost_usd_per_request * (1 - WORTHWHILE):
        return Basis.CHEAPER
    if rival in (BaselineName.CPU, BaselineName.GPU, BaselineName.STORED_CPU, BaselineName.STORED_GPU):
        return Basis.DEARER_THAN_WHOLE_MODEL
    return Basis.DEARER_THAN_ALL_LOCAL if _remote_experts(placement) else Basis.ALL_LOCAL_IS_CHEAPEST


def _sentence(basis: Basis, problem: Problem, placement: Placement, outcome: Outcome, others: Baselines, name: BaselineName | None) -> str:
    """Say why the verdict is what it is. Nothing compares this text, so it may be reworded at any time."""
    usd = per_million(outcome.cost_usd_per_request)
    if basis == Basis.TOO_FEW_TOKENS:
        return (
            f"The profile traced {len(problem.workload.trace)} decode tokens; at least {MIN_TRACE_TOKENS} are needed to tell how often "
            "experts are used."
        )
    if basis == Basis.MISSES_TARGET:
        return f"It misses a target: its TTFT is {outcome.ttft_s:.4g} s, its TPOT {outcome.tpot_s:.4g} s, its cost {usd} requests."
    if name is None:
        local = others.priced.get(BaselineName.ALL_LOCAL)
        if local is None:
            return f"{capitalized(others.missing[BaselineName.ALL_LOCAL])}; this plan costs {usd} requests."
        return (
            f"With all experts local, no main function meets the targets (on {bought(local.spec, local.instances)}: "
            f"TTFT {local.ttft_s:.4g} s, TPOT {local.tpot_s:.4g} s); this plan costs {usd} requests."
        )
    rival = others.priced[name]
    rival_usd, on = per_million(rival.cost_usd_per_request), bought(rival.spec, rival.instances)
    change = outcome.cost_usd_per_request / rival.cost_usd_per_request - 1 if rival.cost_usd_per_request > 0 else 0.0
    if basis == Basis.CHEAPER:
        return f"It costs {usd} requests: {-change:.1%} less than {BASELINE_NAMES[name]} on {on} ({rival_usd}), the best alternative."
    if basis == Basis.DEARER_THAN_WHOLE_MODEL:
        return f"{capitalized(BASELINE_NAMES[name])}, {on}, is cheaper: {rival_usd} requests against {usd}."
    if basis == Basis.DEARER_THAN_ALL_LOCAL:
        start = (
            f"With {_remote_experts(placement)} experts remote, it costs {usd} requests: {change:+.1%} against {BASELINE_NAMES[name]} "
            f"on {on} ({rival_usd})."
        )
    else:
        start = f"Keeping all experts local, on {placement.main.name}, is the cheapest plan: {usd} requests."
    if others.all_local is not None and others.all_local.placement.main.usd_per_hour is not None:
        return f"{start} Memory that is rented by the hour costs the same whether experts are in it or not."
    return f"{start} {_cheapest_remote_expert(problem, others.priced.get(BaselineName.ALL_LOCAL, rival))}"


def _remote_experts(placement: Placement) -> int:
    return sum(len(layer.remote) for layer in placement.layers)


def cheapest_rival(priced: dict[BaselineName, Baseline]) -> BaselineName | None:
    """Name the cheapest baseline that can be bought and meets the targets.

    Of equals, all experts local goes first.
    """
    order = [BaselineName.ALL_LOCAL, *(name for name in priced if name != BaselineName.ALL_LOCAL)]
    able = {name: priced[name].cost_usd_per_request for name in order if name in priced and priced[name].meets and not priced[name].ideal}
    least = min(able.values(), default=0.0)
    return next((name for name, usd in able.items() if usd <= least * (1 + SLACK)), None)


def notes(problem: Problem, placement: Placement, method: Method, gain: float) -> Iterator[str]:
    """Say in sentences what was assumed, and what the figures leave out."""
    workload, catalog = problem.workload, problem.catalog
    if method in ("exact", "forced") and problem.spec.experts_per_layer > ENUMERATED_EXPERTS:
        searched = f"; exchanging single experts then saves {gain:.2%} more" if method == "exact" else ""
        yield f"The lower bound is for plans that make each layer's least used experts remote{searched}."
    yield from workload.assumptions
    if (stored := problem.spec.stored_as) is not None:
        yield f"{stored} So this plan is for the copy; whole quantised models are among the alternatives."
    latency = problem.latency_of(placement.main)
    if latency is not problem.latency:
        yield f"Times of {placement.main.name} are those of the description '{latency.machine}', not measured."
    elif latency.source == "described":
        yield f"Times are those of the description '{latency.machine}', not measured."
    if problem.latency.invocation is None and any(layer.remote for layer in placement.layers):
        yield "The call overhead is the catalog's, not measured; 'remoe profile measure' measures it."
    if workload.requests_per_hour is None:
        hours = " and the idle hours of rented instances" if any(spec.usd_per_hour is not None for spec in catalog.main.menu) else ""
        cold = (
            ""
            if workload.cold_share
            else f"Cold starts{hours} are not in the cost, because the traffic is unknown: give --requests-per-hour."
        )
        yield cold or f"The plan assumes that {workload.cold_share:.1%} of the requests are cold."
    else:
        yield (
            f"At {workload.requests_per_hour:.4g} requests an hour, {workload.cold_share:.1%} of them wait for a cold start "
            f"(a function is gone after {catalog.function.idle_ttl_s:g} s without a call)."
        )
    if catalog.storage.usd_per_gb_month:
        month = catalog.storage.usd_per_gb_month * (problem.spec.nonexpert_bytes + problem.spec.routed_bytes) / 2**30
        yield f"Storing the model costs another ${month:.2f} a month."


def _cheapest_remote_expert(problem: Problem, local: Baseline) -> str:
    """Compare what one remote expert saves in memory with what its invocations cost."""
    seconds = local.ttft_s + problem.workload.n_out * local.tpot_s
    saved = seconds * problem.catalog.main_usd_per_gb_second * problem.spec.expert_bytes / (GB_MB * MB)
    experts = problem.spec.experts_per_layer
    columns = build_columns(problem, (np.eye(experts, dtype=bool),) * len(problem.spec.moe_layers))
    if not len(columns.count):
        return "No expert fits an expert function."
    best = int(columns.bill_usd.argmin())
    layer, index = problem.spec.moe_layers[columns.layer[best]], int(columns.layer[best])
    expert = int(np.flatnonzero(columns.members[columns.at_set[best]])[0])
    share = float(problem.workload.decode_hits[index, expert])
    return (
        f"Moving one expert out saves {millions(saved)} of main memory in a million requests; its calls cost at least "
        f"{millions(float(columns.bill_usd[best]))} (the cheapest: layer {layer}, used by {share:.1%} of decode tokens), and each call "
        "takes time."
    )
