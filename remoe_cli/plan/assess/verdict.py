"""Whether a plan is worth it, in words: against everything that could be bought instead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from remoe_cli.plan.assess.baselines import ALL_LOCAL, Baselines
from remoe_cli.plan.document import Baseline, Method, Outcome, Verdict
from remoe_cli.plan.problem.aim import SLACK, Aim, meets
from remoe_cli.plan.problem.problem import GB_MB, MB, Placement, Problem
from remoe_cli.plan.solve.candidates import ENUMERATED_EXPERTS
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.wording import per_million

MIN_TRACE_TOKENS = 200  # below, a hit probability of 1% rests on fewer than two tokens
WORTHWHILE = 1e-3  # a plan must be cheaper than what it is compared with by more than this share
NAMES = {"all-local": "all experts local", "mix": "all experts local", "cpu": "the whole model on CPUs", "gpu": "the whole model on a GPU"}


def verdict(problem: Problem, aim: Aim, placement: Placement, outcome: Outcome, others: Baselines) -> tuple[Verdict, str]:
    """Recommended only if it meets the limits and everything that can be bought and meets them too is dearer."""
    tokens, usd = len(problem.workload.trace), outcome.cost_usd_per_request
    if tokens < MIN_TRACE_TOKENS:
        return "insufficient evidence", (
            f"The profile traced {tokens} decode tokens; at least {MIN_TRACE_TOKENS} are needed to tell how often experts are used."
        )
    if not meets(aim, outcome):
        return (
            "not recommended",
            f"It misses a target: TTFT {outcome.ttft_s:.4g} s, TPOT {outcome.tpot_s:.4g} s, {per_million(usd)} requests.",
        )
    name, rival = cheapest_rival(others.priced)
    local = others.priced.get(ALL_LOCAL)
    if name is None or rival is None:
        if local is None:
            said = others.missing[ALL_LOCAL]
            return "recommended", f"{said[0].upper()}{said[1:]}; this plan costs {per_million(usd)} requests."
        return "recommended", (
            f"With all experts local no main spec meets the targets (on {local.spec}: TTFT {local.ttft_s:.4g} s, "
            f"TPOT {local.tpot_s:.4g} s); this plan costs {per_million(usd)} requests."
        )
    rival_usd = rival.cost_usd_per_request
    change = usd / rival_usd - 1 if rival_usd > 0 else 0.0
    against = f"{NAMES[name]} on {rival.spec} ({per_million(rival_usd)})"
    if usd < rival_usd * (1 - WORTHWHILE):
        return "recommended", f"It costs {per_million(usd)} requests: {-change:.1%} less than {against}, the next best."
    if name in ("cpu", "gpu"):
        start = f"{NAMES[name][0].upper()}{NAMES[name][1:]}, {rival.spec}, is cheaper"
        return "not recommended", f"{start}: {per_million(rival_usd)} requests against {per_million(usd)}."
    remote = sum(len(layer.remote) for layer in placement.layers)
    if remote:
        start = f"With {remote} experts remote it costs {per_million(usd)} requests, against {against} ({change:+.1%})."
    else:
        start = f"Keeping all experts local, on {placement.main.name}, is the cheapest plan: {per_million(usd)} requests."
    if others.all_local is not None and others.all_local.placement.main.usd_per_hour is not None:
        return "not recommended", f"{start} Memory that is rented by the hour is paid whether experts are in it or not."
    return "not recommended", f"{start} {_break_even(problem, local or rival)}"


def cheapest_rival(priced: dict[str, Baseline]) -> tuple[str | None, Baseline | None]:
    """The cheapest baseline that can be bought and meets the targets; the first named of equals, all experts local before others."""
    order = [ALL_LOCAL, *(name for name in priced if name != ALL_LOCAL)]
    able = [(name, priced[name]) for name in order if name in priced and priced[name].meets and not priced[name].ideal]
    least = min((baseline.cost_usd_per_request for _, baseline in able), default=0.0)
    return next(((name, b) for name, b in able if b.cost_usd_per_request <= least * (1 + SLACK)), (None, None))


def notes(problem: Problem, placement: Placement, method: Method, gain: float) -> Iterator[str]:
    """What was assumed, and what the numbers leave out, in whole sentences."""
    workload, catalog = problem.workload, problem.catalog
    if method in ("exact", "forced") and problem.spec.experts_per_layer > ENUMERATED_EXPERTS:
        searched = f"; exchanging single experts gains {gain:.2%} more" if method == "exact" else ""
        yield f"The bound is for plans that send each layer's least used experts away{searched}."
    yield from workload.assumptions
    latency = problem.latency_of(placement.main)
    if latency is not problem.latency:
        yield f"Times of {placement.main.name} are those of the description '{latency.machine}', not measured."
    elif latency.source == "described":
        yield f"Times are those of the description '{latency.machine}', not measured."
    if problem.latency.invocation is None and any(layer.remote for layer in placement.layers):
        yield "The time of a warm invocation is the catalog's; 'remoe profile --target' measures it."
    if workload.requests_per_hour is None:
        hours = " and the idle hours of rented instances" if any(spec.usd_per_hour is not None for spec in catalog.main.menu) else ""
        cold = "" if workload.cold_share else f"Cold starts{hours} are not priced, as the traffic is not known (--requests-per-hour)."
        yield cold or f"{workload.cold_share:.1%} of requests are taken to be cold."
    else:
        yield (
            f"At {workload.requests_per_hour:.4g} requests an hour {workload.cold_share:.1%} find their functions cold "
            f"(gone after {catalog.function.idle_ttl_s:g} s without a call)."
        )
    if catalog.storage.usd_per_gb_month:
        month = catalog.storage.usd_per_gb_month * (problem.spec.nonexpert_bytes + problem.spec.routed_bytes) / 2**30
        yield f"Storing the model costs ${month:.2f} a month besides."


def _break_even(problem: Problem, local: Baseline) -> str:
    """The best single expert to send away: what its memory costs in the main function against what its invocations cost."""
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
        f"A remote expert saves {per_million(saved)} requests in main memory; the cheapest to send away (layer {layer}, "
        f"hit by {share:.1%} of decode tokens) would cost {per_million(float(columns.bill_usd[best]))} in invocations, "
        f"before what waiting for it adds."
    )
