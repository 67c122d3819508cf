"""The paper's own heuristic, step by step, as a plan to compare with the exact one.

1. MMP (mmp.py; method.md, section 6) gives the ratio b of remote experts, the same in all layers, and the main spec, for the worst case.
2. The b K experts of least utility are remote in each layer (`Workload.ranks`; method.md, section 7).
3. Memory of the functions (lagrange.py; method.md, section 8): the continuous optimum of P2 under the TPOT target, rounded up to the
   menu. T is fitted to one expert's time for one token in the function, with its hidden state on the wire, at every spec of the menu;
   s_l is what the decode tokens of the trace hit of layer l's remote experts. t_rem is paid once for each layer, or once for each
   expert that is hit with `invocations="per-expert"`.
4. Replicas (replicas.py; method.md, section 9).

Each step simplifies (uniform routing, the remote path as the slower one, a fitted T), so a plan may break targets that its steps take
for met. It is therefore priced like any other plan (cost/). If it breaks a target, b is lowered further: a plan that is returned meets
every target. The heuristic lowers cost, whatever the aim's objective. It proves nothing, so its lower bound is 0.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.plan.arrays import Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.placement import layer_outcome, total
from remoe_cli.plan.cost.requests import first_broken
from remoe_cli.plan.document import LayerPlan, Outcome
from remoe_cli.plan.paper import lagrange, replicas
from remoe_cli.plan.paper.bound import TokenBound, paper_bound
from remoe_cli.plan.paper.lagrange import Decay, MemoryProblem
from remoe_cli.plan.paper.mmp import Allocation, allocations, least_memory_mb, meets
from remoe_cli.plan.problem.aim import SLACK, Aim
from remoe_cli.plan.problem.problem import GB_MB, MB, Main, Placement, Problem, local_layers
from remoe_cli.plan.solve.exact import Solution


def paper_plan(problem: Problem, aim: Aim, bound: TokenBound | None = None) -> Solution | None:
    """Run the heuristic, by default with the paper's bound; None where it finds no plan."""
    bound = bound or paper_bound(problem)
    decay = fitted(problem)
    for allocation in allocations(problem, aim, bound):
        layers = _layers(problem, aim, bound, allocation, decay)
        if layers is None:
            continue
        outcome = _checked(problem, aim, Placement(allocation.main, layers))
        if outcome is not None:
            return Solution(Main(allocation.main), layers, aim.value(outcome), 0.0, False)
    return None


def fitted(problem: Problem) -> Decay:
    """Fit T(y), with y in GB."""
    menu = np.array(problem.catalog.function.memory_menu_mb, dtype=np.float64)
    return lagrange.fit(menu / GB_MB, expert_functions.decode_inside_s(problem, menu, 1))


def memory_problem(problem: Problem, aim: Aim, allocation: Allocation, decay: Decay) -> MemoryProblem:
    """Pose P2 for an allocation with remote experts."""
    workload, spec = problem.workload, allocation.main
    hits = np.where(workload.ranks < allocation.remote, workload.decode_hits, 0.0).sum(axis=1)
    overhead_s = expert_functions.warm(problem).elapsed_s * (hits if problem.invocations == "per-expert" else np.ones(len(hits)))
    return MemoryProblem(
        decay=decay,
        hits=hits,
        overhead_s=overhead_s,
        main_usd_per_s=main_function.usd_per_s(problem, spec),
        usd_per_gb_s=problem.catalog.function_usd_per_gb_second,
        low=least_memory_mb(problem, allocation.remote) / GB_MB,
        high=problem.catalog.function.memory_menu_mb[-1] / GB_MB,
        budget_s=None if aim.tpot_s is None else aim.tpot_s - main_function.decode_rest_s(problem, spec),
    )


def _layers(problem: Problem, aim: Aim, bound: TokenBound, allocation: Allocation, decay: Decay) -> tuple[LayerPlan, ...] | None:
    if allocation.remote == 0:
        return local_layers(problem)
    relaxed = memory_problem(problem, aim, allocation, decay)
    asked_mb = np.maximum(relaxed.low, lagrange.solve(relaxed).y * (1 - SLACK)) * GB_MB
    menu = np.array(problem.catalog.function.memory_menu_mb)
    memory_mb: Ints = menu[np.searchsorted(menu, asked_mb)]
    z = replicas.choose(problem, aim.ttft_s, bound, allocation, memory_mb)
    if z is None:
        return None
    remote = problem.workload.ranks < allocation.remote
    return tuple(
        LayerPlan(layer=layer, remote=tuple(np.flatnonzero(remote[i]).tolist()), memory_mb=int(memory_mb[i]), replicas=int(z[i]))
        for i, layer in enumerate(problem.spec.moe_layers)
    )


def _checked(problem: Problem, aim: Aim, placement: Placement) -> Outcome | None:
    """Price the placement; None if it breaks a limit."""
    parts = [layer_outcome(problem, placement, index) for index in range(len(placement.layers))]
    outcome = total(problem, placement, parts)
    if not meets(problem, aim, placement.main, outcome.held_ttft_s, outcome.tpot_s):
        return None
    if aim.budget_usd is not None and outcome.cost_usd_per_request > aim.budget_usd * (1 + SLACK):
        return None
    if any(part.function_bytes > layer.memory_mb * MB for part, layer in zip(parts, placement.layers, strict=True)):
        return None
    return None if first_broken(problem, placement) else outcome
