"""Why a plan is as it is: where its money goes, which limits bind and what more of each is worth, and what each layer's experts cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from remoe_cli.plan.cost import main_function
from remoe_cli.plan.cost.placement import evaluate, layer_outcome
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import GB_MB, MB, Main, Placement, Problem
from remoe_cli.plan.solve.candidates import candidate_sets
from remoe_cli.plan.solve.columns import build_columns
from remoe_cli.plan.solve.exact import multipliers
from remoe_cli.plan.solve.node import Task
from remoe_cli.plan.wording import per_million

BINDS = 1e-3  # a limit of which less than this share is left


def money_rows(problem: Problem, plan: Plan) -> Iterator[tuple[str, str]]:
    placement = Placement(plan.main, plan.layers, plan.instances)
    outcome = evaluate(problem, placement)
    rate, n_out = main_function.usd_per_s(problem, plan.main), problem.workload.n_out
    functions = [layer_outcome(problem, placement, index) for index in range(len(plan.layers))]
    prefill, decode = rate * outcome.ttft_s, rate * n_out * outcome.tpot_s
    yield "main function, to the first token", per_million(prefill)
    yield "main function, further tokens", per_million(decode)
    if fixed := main_function.fixed_usd(problem, placement.bought):
        yield "main function, whatever the time", per_million(fixed)
    fees = n_out * sum(layer.calls_per_token for layer in functions) * problem.catalog.function.usd_per_request
    yield "expert functions", per_million(sum(layer.usd for layer in functions))
    yield "  of it fees of decode invocations", f"{per_million(fees)} ({sum(layer.calls_per_token for layer in functions):.1f} a token)"


def binding_rows(problem: Problem, aim: Aim, plan: Plan) -> Iterator[tuple[str, str]]:
    """Limits with what is used of them; for cost, the price of a little more from the relaxation's multipliers at this main spec."""
    main = Main(plan.main, plan.instances)
    prices = multipliers(Task(problem, build_columns(problem, candidate_sets(problem.workload)), aim), main)
    outcome = plan.outcome
    request_s = outcome.ttft_s + problem.workload.n_out * outcome.tpot_s
    local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in plan.layers)
    limits = {
        "memory": (
            float(local),
            float(main_function.local_capacity(problem, plan.main)),
            "experts in main memory",
            "GB",
            _experts_per_gb(problem),
        ),
        "ttft": (outcome.ttft_s * 1e3, None if aim.ttft_s is None else aim.ttft_s * 1e3, "TTFT, ms", "ms", 1e-3),
        "tpot": (outcome.tpot_s * 1e3, None if aim.tpot_s is None else aim.tpot_s * 1e3, "TPOT, ms", "ms", 1e-3),
        "budget": (
            outcome.cost_usd_per_request * 1e6,
            None if aim.budget_usd is None else aim.budget_usd * 1e6,
            "USD a million",
            "$1",
            1e-6,
        ),
        "time": (request_s, main_function.longest_mean_s(problem, main), "seconds a request", "s", 1.0),
    }
    for name, (used, limit, what, unit, step) in limits.items():
        if limit is None or not np.isfinite(limit):
            continue
        binds = limit - used <= BINDS * abs(limit) or (name == "memory" and limit - used < 1)
        worth = prices.get(name, 0.0) * step
        text = f"{used:.5g} of {limit:.5g}" + (", binds" if binds else "")
        if aim.objective == "cost" and worth > 0:
            text += f"; one {unit} more saves about {per_million(worth)}"
        elif worth > 0:
            text += f"; one {unit} more saves about {worth * 1e3:.3g} ms"
        yield what, text


def _experts_per_gb(problem: Problem) -> float:
    return GB_MB * MB / problem.spec.expert_bytes


def layer_reasons(problem: Problem, plan: Plan) -> Iterator[tuple[str, str]]:
    """Of each layer with remote experts: how often they are hit, and what they cost against the main memory that they free."""
    placement = Placement(plan.main, plan.layers, plan.instances)
    request_s = plan.ttft_s + problem.workload.n_out * plan.tpot_s
    freed_usd = request_s * problem.catalog.main_usd_per_gb_second * problem.spec.expert_bytes / (GB_MB * MB)
    for index, layer in enumerate(plan.layers):
        if not layer.remote:
            continue
        part = layer_outcome(problem, placement, index)
        hits = problem.workload.decode_hits[index][list(layer.remote)]
        yield (
            f"layer {layer.layer}",
            f"{len(layer.remote)} experts hit by {hits.min():.1%} to {hits.max():.1%} of tokens; "
            f"{part.calls_per_token:.2f} calls a token cost {per_million(part.usd)}; "
            f"memory for them in the main function would cost {per_million(freed_usd * len(layer.remote))}",
        )
    if not any(layer.remote for layer in plan.layers):
        yield "none did", plan.reason
