"""Latency and cost of a whole placement: pure functions over main_function.py and expert_functions.py.

TPOT takes E[max(CPU, GPU, remote)] over the recorded tokens, not the max of the means. TTFT, TPOT and cost are means over the workload's
requests. Each instance serves as many requests at once as the problem says; where that is several, or answers have drafts, steps.py prices
a decode step.

Source: method.md, sections 3, 4, 11 and 12; the modules say where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.prompts import cold_wait_s, prefill_s
from remoe_cli.plan.cost.steps import layer_steps, step_times
from remoe_cli.plan.document import LayerPlan, MainSpec, Outcome
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU, owner_of
from remoe_cli.plan.problem.problem import Placement, Problem

__all__ = ["LayerOutcome", "Placement", "Priced", "Problem", "evaluate", "layer_outcome", "layer_outcomes", "total"]


@dataclass(frozen=True)
class Priced:
    """A placement and its cost and latency."""

    placement: Placement
    outcome: Outcome


@dataclass(frozen=True)
class LayerOutcome:
    """The part of one layer in a mean request.

    prefill_s, decode_s     of prefill, and of a decode step
    cold_s                  what cold starts add to TTFT
    usd                     its invocations
    function_bytes          for the limit of function memory, with the longest prompt
    calls_per_token         invocations of the decode steps for one token, by the requests that share them
    """

    prefill_s: float
    decode_s: float
    cold_s: float
    usd: float
    function_bytes: float
    calls_per_token: float


def evaluate(problem: Problem, placement: Placement) -> Outcome:
    """Compute cost and latency of a placement, whether or not it keeps the limits."""
    return total(problem, placement, layer_outcomes(problem, placement))


def turn_s(problem: Problem, placement: Placement) -> float:
    """Compute how long a prompt waits for its turn: a decode step of the others.

    It is 0 where requests are served one at a time.
    """
    problem = problem.at_main(placement.main)
    if problem.concurrency == 1:
        return 0.0
    return main_function.decode_rest_s(problem, placement.main) + sum(one.decode_s for one in layer_outcomes(problem, placement))


def layer_outcomes(problem: Problem, placement: Placement) -> list[LayerOutcome]:
    """Compute the part of each MoE layer, in order."""
    return [layer_outcome(problem, placement, index) for index in range(len(placement.layers))]


def total(problem: Problem, placement: Placement, layers: list[LayerOutcome]) -> Outcome:
    """Add up the parts of a placement."""
    problem = problem.at_main(placement.main)
    workload, main = problem.workload, placement.main
    rest_s = sum(kind.share * main_function.prefill_rest_s(problem, main, kind.n_in) for kind in workload.lengths)
    ttft = rest_s + (main_function.cold_rest_s(problem, main) + sum(layer.prefill_s + layer.cold_s for layer in layers))
    step = main_function.decode_rest_s(problem, main) + sum(layer.decode_s for layer in layers)
    ttft = main_function.first_token_s(problem, ttft, step)
    tpot = main_function.next_token_s(problem, rest_s + sum(layer.prefill_s for layer in layers), step)
    busy_s = main_function.busy_s(problem, ttft, tpot, cold_mean_s(problem, main, layers))
    main_usd = main_function.usd_per_s(problem, main) * busy_s + main_function.fixed_usd(problem, placement.bought)
    decided = None
    if (at := problem.ttft_at) is not None:
        own_s = float(prefill_s(problem, placement, np.array([at.n_in]))[0])
        decided = main_function.first_token_s(problem, own_s, step) + (cold_wait_s(problem, placement) if at.cold else 0.0)
    return Outcome(
        cost_usd_per_request=float(main_usd + sum(layer.usd for layer in layers)),
        ttft_s=float(ttft),
        tpot_s=float(tpot),
        ttft_percentile_s=decided,
    )


def cold_mean_s(problem: Problem, main: MainSpec, layers: list[LayerOutcome]) -> float:
    """Compute what cold starts add to the mean TTFT."""
    return main_function.cold_rest_s(problem, main) + sum(layer.cold_s for layer in layers)


def busy_s(problem: Problem, placement: Placement, outcome: Outcome, layers: list[LayerOutcome]) -> float:
    """Compute the time of the main function that a mean request takes of all that share it."""
    problem = problem.at_main(placement.main)
    return main_function.busy_s(problem, outcome.ttft_s, outcome.tpot_s, cold_mean_s(problem, placement.main, layers))


def layer_outcome(problem: Problem, placement: Placement, index: int) -> LayerOutcome:
    """Compute the part of the layer at `index` among the MoE layers."""
    problem = problem.at_main(placement.main)
    workload, main, layer = problem.workload, placement.main, placement.layers[index]
    prompts = [(kind.share, layer_prefill(problem, placement, index, kind.n_in)) for kind in workload.lengths]
    step = layer_step(problem, placement, index)
    usd = sum(share * prompt.usd for share, prompt in prompts)
    cold_s = main_function.cold_expert_s(problem, main) * (problem.spec.experts_per_layer - len(layer.remote))
    if layer.parts:
        biggest = _biggest(layer)
        usd += workload.n_out * problem.drafting.passes * step.usd
        usd += float(expert_functions.cold_usd(problem, [layer.memory_mb], biggest, len(layer.parts) * layer.replicas)[0, 0])
        late = main_function.late_functions(problem, main) * workload.cold_share
        cold_s += late * float(expert_functions.cold_s(problem, biggest)[0])
    most = workload.use[index] * main_function.most_rows(problem)
    held = [float(expert_functions.function_memory_bytes(problem, len(part), most[list(part)].sum())) for part in layer.parts]
    prefill_s = sum(share * prompt.seconds for share, prompt in prompts)
    return LayerOutcome(prefill_s, step.seconds, cold_s, usd, max(held, default=0.0), problem.drafting.passes * step.calls)


@dataclass(frozen=True)
class LayerPrefill:
    """The part of one layer in a prompt: its time, and the price of its invocations."""

    seconds: float
    usd: float


@dataclass(frozen=True)
class LayerStep:
    """The part of one layer in a decode step.

    seconds      its time
    usd, calls   price and number of its invocations, by the requests that share it
    """

    seconds: float
    usd: float
    calls: float


def layer_prefill(problem: Problem, placement: Placement, index: int, n_in: int) -> LayerPrefill:
    """Compute the part of one layer in a prompt of `n_in` tokens."""
    main, layer, tokens = placement.main, placement.layers[index], problem.workload.use[index] * n_in
    owner = owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu)
    local_s = float(main_function.expert_prefill_s(problem, main, tokens)[owner[0] == ON_CPU].sum())
    if layer.gpu:
        local_s = max(local_s, float(main_function.gpu_expert_prefill_s(problem, main, tokens)[owner[0] == ON_GPU].sum()))
    if not layer.parts:
        return LayerPrefill(local_s, 0.0)
    at = expert_functions.shared_out(problem, owner, tokens, layer.replicas)
    sent = expert_functions.prefill(problem, tokens, [layer.memory_mb], at, max(len(layer.parts), layer.replicas))
    usd = expert_functions.bill_usd(problem, [layer.memory_mb], _biggest(layer), sent.billed_s, sent.calls)
    return LayerPrefill(max(local_s, float(sent.zt_s[0, 0])), float(usd[0, 0]))


def layer_step(problem: Problem, placement: Placement, index: int) -> LayerStep:
    """Compute the part of one layer in a decode step of all requests that are served at once."""
    workload, main, layer = problem.workload, placement.main, placement.layers[index]
    step_s, parts = main_function.expert_step_s(problem, main), layer.parts
    owner = owner_of(problem.spec.experts_per_layer, parts, layer.gpu)
    several, decode_s = not problem.is_one_token, float(workload.decode_hits[index].sum()) * step_s
    if several:
        steps = layer_steps(problem, index, owner, layer.memory_mb, step_times(problem, main))
        decode_s = float(steps.seconds[0])
    elif parts or layer.gpu:
        hits = workload.hits.of_parts(index, parts, layer.gpu)
        waits_s = hits.local * step_s
        if hits.gpu is not None:
            waits_s = np.maximum(waits_s, hits.gpu * main_function.gpu_expert_step_s(problem, main))
        if parts:
            waits_s = np.maximum(waits_s, expert_functions.decode_wait_s(problem, layer.memory_mb, hits.busiest))
        decode_s = float(hits.shares[0] @ waits_s)
    if not parts:
        return LayerStep(decode_s, 0.0, 0.0)
    if several:
        calls = float(steps.calls[0, 0]) / problem.concurrency
        billed = steps.billed_s / problem.concurrency, steps.calls / problem.concurrency
    else:
        each = np.arange(hits.calls.shape[1]) if problem.invocations == "per-expert" else 1.0
        calls = float((hits.calls[0] * each).sum())
        billed = expert_functions.decode_billed(problem, [layer.memory_mb], hits)
    usd = float(expert_functions.bill_usd(problem, [layer.memory_mb], _biggest(layer), *billed)[0, 0])
    return LayerStep(decode_s, usd, calls)


def _biggest(layer: LayerPlan) -> Ints:
    return np.array([max(map(len, layer.parts), default=0)])
