"""Why a plan is as it is: where its money goes, which limits bind, and what remote experts cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function, prices
from remoe_cli.plan.cost.placement import busy_s, evaluate, layer_outcome, layer_outcomes
from remoe_cli.plan.cost.requests import longest_s
from remoe_cli.plan.document import MainKind, Plan, PredictedRouting
from remoe_cli.plan.explain.alternatives import BASELINE_TITLES
from remoe_cli.plan.explain.rows import Rows, scenario_rows
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.drafting import depth_of
from remoe_cli.plan.problem.problem import GB_MB, MB, Main, Placement, Problem
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns, weighed_functions
from remoe_cli.plan.solve.exact import multipliers
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.wording import figure, form_text, per_million, request_tokens
from remoe_cli.profile.record import Profile
from remoe_cli.units import size

BINDS = 1e-3  # a plan is at a limit of which less than this share is left
ROOMS = {"memory": "the main function's memory", "storage": "its /tmp", "gpu memory": "the GPU's memory, beside the rest of the model,"}
SECTIONS = {
    "inputs": "Where the figures come from",
    "money": "Where the money goes (a million requests)",
    "limits": "Limits, and what more of each would save",
    "layers": "Why experts are remote",
    "scenarios": "Other scenarios",
}


def explanation(plan: Plan, profile: Profile, catalog: Catalog, request: PlanRequest) -> dict[str, Rows]:
    """Explain a plan in rows of (name, text), by section; SECTIONS has the titles."""
    whole = make_problem(profile.in_form(plan.model.packed), catalog, request).with_drafts(depth_of(plan))
    problem = next(part for part in whole.parts if plan.main in part.menu)
    return {
        "inputs": tuple(input_rows(plan, profile, catalog)),
        "money": tuple(money_rows(problem, plan)),
        "limits": tuple(binding_rows(problem, request.aim, plan)),
        "layers": tuple(layer_reasons(problem, plan)),
        "scenarios": scenario_rows(plan),
    }


def input_rows(plan: Plan, profile: Profile, catalog: Catalog) -> Iterator[tuple[str, str]]:
    """List where routing, times, lengths and prices come from."""
    record, workload, latency = profile.record, plan.workload, profile.record.latency
    prompts, traced = len(profile.arrays["prompt_tokens"]), len(profile.arrays["trace_ids"])
    yield "routing", f"{record.routing.source}, {prompts} prompts of {record.dataset.source}, {traced} tokens traced"
    if workload.routing:
        yield "prompts", _predicted(workload.routing)
    yield "times", f"{latency.source}: {latency.machine}, {latency.measured_on}"
    yield from _forms(plan, profile)
    yield "call overhead", latency.invocation.target if latency.invocation else f"catalog {catalog.name}"
    traffic = "unknown" if workload.requests_per_hour is None else f"{figure(workload.requests_per_hour)} requests an hour"
    yield "requests", f"{request_tokens(workload.n_in, workload.n_out)}; traffic {traffic}; {workload.cold_share:.1%} cold"
    if plan.main.scales_to_zero and (waking := workload.waking):
        yield "main function", f"up {waking.up_share:.1%} of the time; {waking.wake_share:.1%} of the requests wake it"
    for name, baseline in plan.baselines.items():
        if baseline.assumed:
            yield BASELINE_TITLES[name], baseline.assumed
    for day, source, fields in sorted({(entry.date.isoformat(), entry.source, ", ".join(entry.of)) for entry in catalog.provenance}):
        yield f"catalog, {day}", f"{source.rstrip('.')}. It gives {fields}."


def _forms(plan: Plan, profile: Profile) -> Iterator[tuple[str, str]]:
    """Say what a quantised expert takes in each form that functions may compute, the plan's first."""
    found = {record.spec.is_packed: record for record in (profile.in_form(True).record, profile.record)}
    for text in form_text(plan):
        takes = [
            f"{'packed' if packed else 'ready'}, {size(record.spec.function_expert_bytes)} and "
            f"{float(record.latency.remote_expert.seconds(1, 1.0)) * 1e3:.3g} ms"
            for packed, record in sorted(found.items(), key=lambda pair: pair[0] != plan.model.packed)
        ]
        yield "expert form", f"{text}; in memory, and for a token on one vCPU, an expert takes: {'; '.join(takes)}"


def _predicted(routing: PredictedRouting) -> str:
    off = "unknown" if routing.validation_bits is None else f"{routing.validation_bits:.3f} bits"
    total = sum(routing.weights)
    most = sorted(zip(routing.weights, routing.recorded, strict=True), key=lambda pair: (-pair[0], pair[1]))[:3]
    return (
        f"{routing.count} of {routing.prompts.path} (sha256 {routing.prompts.sha256[:12]}), predicted by {routing.predictor}: divergence "
        f"on held-out prompts {off}. Priced as a mixture of {len(routing.recorded)} recorded prompts, {routing.mixture_bits:g} bits from "
        f"the prediction, mostly of prompts {', '.join(f'{prompt} ({weight / total:.0%})' for weight, prompt in most)}"
    )


_FIXED = {  # what a request costs however long it takes
    MainKind.BY_USE: "fee, log and reads of S3",
    MainKind.TO_ZERO: "rent of the hours that it is up, fee, log and reads of S3",
    MainKind.ALWAYS_ON: "rent of all its hours",
}


def money_rows(problem: Problem, plan: Plan) -> Iterator[tuple[str, str]]:
    """List what a million requests pay for."""
    placement = Placement(plan.main, plan.layers, plan.instances)
    outcome = evaluate(problem, placement)
    rate, n_out = main_function.usd_per_s(problem, plan.main), problem.workload.n_out
    functions = [layer_outcome(problem, placement, index) for index in range(len(plan.layers))]
    decode = rate * n_out * outcome.tpot_s / problem.at_main(plan.main).concurrency
    prefill = rate * busy_s(problem, placement, outcome, functions) - decode
    yield "main function, until the first token", per_million(prefill)
    yield "main function, for further tokens", per_million(decode)
    if fixed := main_function.fixed_usd(problem, placement.bought):
        yield f"main function, {_FIXED[plan.main.kind]}", per_million(fixed)
    fees = n_out * sum(layer.calls_per_token for layer in functions) * prices.function_prices(problem.catalog).usd_per_call
    yield "expert functions", per_million(sum(layer.usd for layer in functions))
    calls = sum(layer.calls_per_token for layer in functions)
    yield "  of this, fees and logs of calls during decode", f"{per_million(fees)} ({calls:.1f} calls for each token)"


def binding_rows(problem: Problem, aim: Aim, plan: Plan) -> Iterator[tuple[str, str]]:
    """List the limits with what is used of them, and what more of each would save.

    Savings come from the duals of the relaxation at this main spec.
    """
    main = Main(plan.main, plan.instances)
    columns = build_columns(problem, candidate_sets(problem), functions=weighed_functions(problem, aim))
    prices = multipliers(Task(problem, columns, aim), main)
    outcome = plan.outcome
    placement = Placement(plan.main, plan.layers, plan.instances)
    request_s = busy_s(problem, placement, outcome, layer_outcomes(problem, placement))
    longest = float(longest_s(problem, placement, outcome.tpot_s, problem.workload.front).max())
    gpu = sum(len(layer.gpu) for layer in plan.layers)
    local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in plan.layers) - gpu
    limits = {
        "memory": (
            float(local),
            float(main_function.local_capacity(problem, plan.main)),
            "experts in CPU memory" if gpu else "local experts",
            "1 GB",
            GB_MB * MB / main_function.cpu_expert_bytes(problem, plan.main),
        ),
        "storage": (
            float(local + gpu),
            main_function.fetch_capacity(problem, plan.main),
            "local experts",
            "1 GB",
            GB_MB * MB / problem.spec.read_expert_bytes,
        ),
        "gpu memory": (
            float(gpu),
            float(main_function.gpu_capacity(problem, plan.main)) or None,
            "experts on the GPU",
            "1 GB",
            GB_MB * MB / problem.spec.expert_bytes,
        ),
        "ttft": (outcome.ttft_s * 1e3, None if aim.ttft_s is None else aim.ttft_s * 1e3, "TTFT, ms", "1 ms", 1e-3),
        "tpot": (outcome.tpot_s * 1e3, None if aim.tpot_s is None else aim.tpot_s * 1e3, "TPOT, ms", "1 ms", 1e-3),
        "budget": (
            outcome.cost_usd_per_request * 1e6,
            None if aim.budget_usd is None else aim.budget_usd * 1e6,
            "USD per million",
            "$1",
            1e-6,
        ),
        "time": (request_s, main_function.longest_mean_s(problem, main), "seconds of a mean request", "1 s", 1.0),
        "longest": (longest, main_function.longest_request_s(problem, plan.main), "seconds of the longest request", "1 s", 1.0),
    }
    for name, (used, limit, what, unit, step) in limits.items():
        if limit is None or not np.isfinite(limit):
            continue
        binds = limit - used <= BINDS * abs(limit) or (name in ROOMS and limit - used < 1)
        worth = prices.get(name, 0.0) * step
        share = f"{used:.5g}; {ROOMS[name]} holds {limit:.5g}" if name in ROOMS else f"{used:.5g} of {limit:.5g}"
        text = share + (", at the limit" if binds else "")
        if aim.objective == "cost" and worth > 0:
            text += f"; {unit} more saves about {per_million(worth)}"
        elif worth > 0:
            text += f"; {unit} more saves about {worth * 1e3:.3g} ms"
        yield what, text


def layer_reasons(problem: Problem, plan: Plan) -> Iterator[tuple[str, str]]:
    """Compare, for each layer, what remote experts cost with the main memory that they free."""
    placement = Placement(plan.main, plan.layers, plan.instances)
    request_s = busy_s(problem, placement, plan.outcome, layer_outcomes(problem, placement))
    freed_usd = request_s * problem.catalog.main_usd_per_gb_second * problem.spec.expert_bytes / (GB_MB * MB)
    for index, layer in enumerate(plan.layers):
        if not layer.remote:
            continue
        part = layer_outcome(problem, placement, index)
        hits = problem.workload.decode_hits[index][list(layer.remote)]
        yield (
            f"layer {layer.layer}",
            f"{len(layer.remote)} experts, each used by {hits.min():.1%} to {hits.max():.1%} of tokens; "
            f"{part.calls_per_token:.2f} calls for each token cost {per_million(part.usd)}; "
            f"their memory in the main function would cost {per_million(freed_usd * len(layer.remote))}",
        )
    if not any(layer.remote for layer in plan.layers):
        yield "no expert is remote", plan.reason
