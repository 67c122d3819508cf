"""Prefill of single prompts under a placement, for many lengths at once.

Shapes: P prompts, E experts.
Source: method.md, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU, owner_of
from remoe_cli.plan.problem.problem import Placement, Problem

_AT_ONCE = 2**20  # figures in one table of prompts and experts


@dataclass(frozen=True)
class Sent:
    """What the experts of one layer take of each prompt.

    layer_s        [P], seconds of the layer
    call_s, rows   [P], seconds and rows of its largest invocations
    """

    layer_s: Floats
    call_s: Floats
    rows: Floats


def prefill_s(problem: Problem, placement: Placement, prompts: Ints) -> Floats:
    """Compute prefill of prompts of these lengths, of warm requests.

    Shapes: int64 [P]; [P].
    """
    seconds = np.array([main_function.prefill_rest_s(problem, placement.main, float(n_in)) for n_in in prompts.tolist()])
    for index in range(len(placement.layers)):
        seconds = seconds + sent(problem, placement, index, prompts).layer_s
    return seconds


def cold_wait_s(problem: Problem, placement: Placement) -> float:
    """Compute what a request that finds everything cold waits beside that.

    Beside a main function that is up, its expert functions start one after the other; where it starts itself, they do so meanwhile.
    """
    if placement.main.starts:
        local = sum(problem.spec.experts_per_layer - len(layer.remote) for layer in placement.layers)
        return main_function.start_s(problem, placement.main, local)
    return functions_wait_s(problem, placement)


def longest_wait_s(problem: Problem, placement: Placement) -> float:
    """Compute what no request waits longer than, for limits that hold for every one.

    Beside a main function that scales to zero, expert functions may take longer to start than the main function: the sum is no less.
    """
    wait_s = cold_wait_s(problem, placement)
    if placement.main.scales_to_zero and problem.workload.cold_share > 0:
        wait_s += functions_wait_s(problem, placement)
    return wait_s


def waits(problem: Problem, placement: Placement) -> tuple[tuple[float, float], ...]:
    """List shares of the requests with how long they wait to find all warm.

    They wait for nothing, for expert functions, or for the main function.
    """
    cold, main_share = problem.workload.cold_share, main_function.cold_share(problem, placement.main)
    late = main_function.late_functions(problem, placement.main) * cold
    return (
        (1 - late - main_share, 0.0),
        (late, functions_wait_s(problem, placement)),
        (main_share, cold_wait_s(problem, placement) if placement.main.starts else 0.0),
    )


def functions_wait_s(problem: Problem, placement: Placement) -> float:
    """Compute how long the expert functions of all layers take to start, one layer after the other."""
    biggest = [np.array(max(map(len, layer.parts))) for layer in placement.layers if layer.parts]
    return sum(float(expert_functions.cold_s(problem, experts)) for experts in biggest)


def sent(problem: Problem, placement: Placement, index: int, prompts: Ints) -> Sent:
    """Price one layer for prompts of many lengths, a limited number at a time."""
    step = max(1, _AT_ONCE // problem.spec.experts_per_layer)
    pieces = [_piece(problem, placement, index, prompts[at : at + step]) for at in range(0, len(prompts), step)]
    return Sent(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("layer_s", "call_s", "rows")))


def _piece(problem: Problem, placement: Placement, index: int, prompts: Ints) -> Sent:
    layer, tokens = placement.layers[index], problem.workload.use[index] * prompts[:, None]
    owner = owner_of(problem.spec.experts_per_layer, layer.parts, layer.gpu)[0]
    local_s = main_function.expert_prefill_s(problem, placement.main, tokens)[:, owner == ON_CPU].sum(axis=1)
    if layer.gpu:
        gpu_s = main_function.gpu_expert_prefill_s(problem, placement.main, tokens)[:, owner == ON_GPU].sum(axis=1)
        local_s = np.maximum(local_s, gpu_s)
    if not layer.parts:
        nothing = np.zeros(len(prompts))
        return Sent(local_s, nothing, nothing)
    work_s = expert_functions.expert_work_s(problem, layer.memory_mb, tokens)
    group = _shared_out(problem, owner, tokens, layer.replicas)
    call_s = largest = np.zeros(len(prompts))
    for number in range(max(len(layer.parts), layer.replicas)):
        here = group == number
        rows = np.where(here, tokens, 0.0).sum(axis=1)
        inside_s = expert_functions.inside_s(problem, layer.memory_mb, np.where(here, work_s, 0.0).sum(axis=1), rows)
        call_s = np.maximum(call_s, np.where(rows > 0, expert_functions.warm(problem).elapsed_s + inside_s, 0.0))
        largest = np.maximum(largest, rows)
    return Sent(np.maximum(local_s, call_s), call_s, largest)


def _shared_out(problem: Problem, owner: Ints, tokens: Floats, replicas: int) -> Ints:
    """Do what `shared_out` does, for many prompts at once.

    Shapes: `owner` [E], `tokens` [P, E]; int64 [P, E].
    """
    if replicas <= 1:
        return np.broadcast_to(owner, tokens.shape)
    work_s = np.where(owner >= 0, expert_functions.expert_work_s(problem, problem.catalog.function.mb_per_vcpu, tokens), 0.0)
    group, load, rows = np.full(tokens.shape, -1), np.zeros((len(tokens), replicas)), np.arange(len(tokens))
    for expert in np.argsort(-work_s, axis=1, kind="stable").T:
        added = work_s[rows, expert]
        least = load.argmin(axis=1)
        load[rows, least] += added
        group[rows, expert] = np.where(added > 0, least, -1)
    return group
