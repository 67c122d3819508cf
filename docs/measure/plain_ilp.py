"""The paper's programme as it stands, in x, y and w: an integer programme for HiGHS, to hold the planner's columns against.

Notation. Layers l, experts k, main specs v, memory specs u of the expert functions.

    N_lk, h_lk     prompt tokens of a request that use expert k; share of decode tokens that do;  n = tokens after the first
    a_v, A_vlk     one local expert: for one token, for N_lk tokens
    b_u, B_ulk     one remote expert, its rows on the wire included: for one token, for N_lk tokens;  r = t_rem
    P_v, p_u       price of a second of the main function (c_g M_g + c_c w), of an expert function (c_c y)
    C_v, m_u       experts that the main function holds beside the rest; memory of an expert function
    rest_1, rest   seconds of a first token, of a further token, besides experts

Variables. x_lk = 1 where the expert is remote, y_lu = 1 where layer l has a function of memory u (none without remote experts), w_v = 1 for
the main spec; binary. Continuous: f_l and d_l, prefill and decode of a layer; T, seconds of a request.

    min   sum_v P_v w_v T  +  sum_lu p_u y_lu ( r + sum_k x_lk ( B_ulk + n h_lk (b_u + r) ) )
    s.t.  sum_v w_v = 1;   sum_u y_lu <= 1
          f_l >= sum_v w_v sum_k (1 - x_lk) A_vlk;          f_l >= sum_u y_lu ( r + sum_k x_lk B_ulk )
          d_l >= sum_v w_v a_v sum_k (1 - x_lk) h_lk;       d_l >= sum_u y_lu (b_u + r) sum_k x_lk h_lk
          T = rest_1 + sum_l f_l + n ( rest + sum_l d_l );  limits on TTFT = rest_1 + sum f, TPOT = rest + sum d and T
          sum_lk (1 - x_lk) <= sum_v C_v w_v;   sum_k x_lk (mu + D N_lk) <= sum_u m_u y_lu;   sum_k x_lk N_lk D <= U

The maxima are auxiliary variables above both of their sides (the objective pushes them down). Products of variables are linearised after
McCormick, exactly, as one factor is binary:

    q_lku = x_lk y_lu          q_lku <= y_lu,   sum_u q_lku = x_lk
    s_lkv = (1 - x_lk) w_v     s_lkv <= w_v,    sum_v s_lkv = 1 - x_lk
    T_v   = T w_v              0 <= T_v <= (most T under v) w_v,   sum_v T_v = T

Not the planner's objective:
- Decode is the maximum of means where the planner has the mean of maxima, E[max]. In x that mean needs a variable and two rows for every
  distinct set of experts in the trace (28 a layer with top-2 of 8, thousands with top-6 of 64), each times the specs.
- Every remote expert that a token hits pays t_rem, the paper's equation 5. One call a layer costs t_rem times P(any hit), which is a
  coverage function of x and needs the same variables.
- One replica; no fee, no rounding of bills, one function a layer, non-expert modules on a GPU bought by memory: the paper's catalog.
So its plan is priced by cost/placement.py, and may then break a target that it kept here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.cost.placement import evaluate
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.problem.aim import Aim
from remoe_cli.plan.problem.problem import MB, Main, Placement, Problem, local_layers
from remoe_cli.plan.solve.master_lp import quiet_highs

Terms = list[tuple[Any, float]]


@dataclass(frozen=True)
class Plain:
    """`gap` is of its own objective, between `value_usd` and the solver's bound; without a plan both are None."""

    placement: Placement | None
    value_usd: float | None
    gap: float | None
    variables: int
    rows: int
    build_s: float
    solve_s: float


@dataclass(frozen=True)
class _Figures:
    """The constants of the docstring."""

    n: float
    h: np.ndarray
    a: np.ndarray
    A: np.ndarray
    b: np.ndarray
    B: np.ndarray
    r: float
    P: np.ndarray
    p: np.ndarray
    C: np.ndarray
    m: np.ndarray
    rest_first: float
    rest: float
    held: np.ndarray
    rows: np.ndarray


def _figures(problem: Problem, mains: list[Any]) -> _Figures:
    workload, side = problem.workload, problem.catalog.function
    if len(workload.lengths) != 1 or workload.cold_share or side.max_functions != 1 or not main_function.on_gpu(problem, mains[0]):
        raise ValueError("one length, warm requests, one function a layer, and a GPU bought by its memory are needed")
    menu = np.array(side.memory_menu_mb, dtype=np.float64)
    tokens = workload.use * workload.lengths[0].n_in
    away_s = [expert_functions.inside_s(problem, mb, expert_functions.expert_work_s(problem, mb, tokens), tokens) for mb in menu]
    return _Figures(
        n=workload.n_out,
        h=workload.decode_hits,
        a=np.array([main_function.expert_step_s(problem, spec) for spec in mains]),
        A=np.array([main_function.expert_prefill_s(problem, spec, tokens) for spec in mains]),
        b=expert_functions.decode_inside_s(problem, menu, 1),
        B=np.array(away_s),
        r=expert_functions.warm(problem).elapsed_s,
        P=np.array([main_function.usd_per_s(problem, spec) for spec in mains]),
        p=expert_functions.function_usd_per_s(problem, menu, 0),
        C=np.array([main_function.local_capacity(problem, spec) for spec in mains], dtype=np.float64),
        m=menu - side.runtime_memory_mb,
        rest_first=main_function.prefill_rest_s(problem, mains[0], workload.n_in),
        rest=main_function.decode_rest_s(problem, mains[0]),
        held=(problem.spec.expert_bytes * side.expert_memory_factor + problem.spec.hidden_state_bytes * tokens) / MB,
        rows=expert_functions.payload_bytes(problem, tokens) / side.payload_limit_bytes,
    )


def plain_plan(problem: Problem, aim: Aim, gap: float = 1e-3, time_limit_s: float = 60.0) -> Plain:
    """The least cost under the aim's limits on TTFT and TPOT, by HiGHS on one thread."""
    start = time.process_time()
    mains = [spec for spec in problem.catalog.main.menu if main_function.local_capacity(problem, spec) >= 0]
    c = _figures(problem, mains)
    scale = evaluate(
        problem, Placement(mains[-1], local_layers(problem))
    ).cost_usd_per_request  # costs near 1: HiGHS has absolute tolerances
    (layers, experts), V, U = c.h.shape, range(len(mains)), range(len(c.m))
    L, K = range(layers), range(experts)
    lp = pulp.LpProblem("plain", pulp.LpMinimize)

    def total(terms: Terms) -> Any:
        return pulp.LpAffineExpression(terms)

    # Variables, and the products of two as variables of their own.
    x = [[lp.add_variable(f"x_{i}_{k}", cat=pulp.LpBinary) for k in K] for i in L]
    y = [[lp.add_variable(f"y_{i}_{u}", cat=pulp.LpBinary) for u in U] for i in L]
    w = [lp.add_variable(f"w_{v}", cat=pulp.LpBinary) for v in V]
    q = [[[lp.add_variable(f"q_{i}_{k}_{u}", 0) for u in U] for k in K] for i in L]
    s = [[[lp.add_variable(f"s_{i}_{k}_{v}", 0) for v in V] for k in K] for i in L]
    f = [lp.add_variable(f"f_{i}", 0) for i in L]
    d = [lp.add_variable(f"d_{i}", 0) for i in L]
    T = [lp.add_variable(f"T_{v}", 0) for v in V]

    # Objective.
    main = [(T[v], c.P[v] / scale) for v in V]
    calls = [(y[i][u], c.p[u] * c.r / scale) for i in L for u in U]
    work = [(q[i][k][u], c.p[u] * (c.B[u, i, k] + c.n * c.h[i, k] * (c.b[u] + c.r)) / scale) for i in L for k in K for u in U]
    lp += total(main + calls + work)

    # One spec each, and the products.
    lp += total([(w[v], 1.0) for v in V]) == 1
    for i in L:
        lp += total([(y[i][u], 1.0) for u in U]) <= 1
        for k in K:
            lp += total([(q[i][k][u], 1.0) for u in U] + [(x[i][k], -1.0)]) == 0
            lp += total([(s[i][k][v], 1.0) for v in V] + [(x[i][k], 1.0)]) == 1
            for u in U:
                lp += total([(q[i][k][u], 1.0), (y[i][u], -1.0)]) <= 0
            for v in V:
                lp += total([(s[i][k][v], 1.0), (w[v], -1.0)]) <= 0

    # Maxima of a layer: local side, remote side.
    for i in L:
        lp += total([(f[i], 1.0)] + [(s[i][k][v], -c.A[v, i, k]) for k in K for v in V]) >= 0
        lp += total([(f[i], 1.0)] + [(y[i][u], -c.r) for u in U] + [(q[i][k][u], -c.B[u, i, k]) for k in K for u in U]) >= 0
        lp += total([(d[i], 1.0)] + [(s[i][k][v], -c.a[v] * c.h[i, k]) for k in K for v in V]) >= 0
        lp += total([(d[i], 1.0)] + [(q[i][k][u], -(c.b[u] + c.r) * c.h[i, k]) for k in K for u in U]) >= 0

    # Seconds of a request, and its price's product.
    most = _most_seconds(c)
    spent = [(f[i], 1.0) for i in L] + [(d[i], c.n) for i in L]
    lp += total([(T[v], 1.0) for v in V] + [(variable, -factor) for variable, factor in spent]) == c.rest_first + c.n * c.rest
    for v in V:
        lp += total([(T[v], 1.0), (w[v], -most[v])]) <= 0

    # Limits.
    lp += total(spent) <= main_function.longest_mean_s(problem, Main(mains[0])) - c.rest_first - c.n * c.rest
    if aim.ttft_s is not None:
        lp += total([(f[i], 1.0) for i in L]) <= aim.ttft_s - c.rest_first
    if aim.tpot_s is not None:
        lp += total([(d[i], 1.0) for i in L]) <= aim.tpot_s - c.rest
    lp += total([(x[i][k], -1.0) for i in L for k in K] + [(w[v], -c.C[v]) for v in V]) <= -layers * experts
    for i in L:
        lp += total([(x[i][k], c.held[i, k] / 1024) for k in K] + [(y[i][u], -c.m[u] / 1024) for u in U]) <= 0  # in GB
        lp += total([(x[i][k], c.rows[i, k]) for k in K]) <= 1

    quiet_highs()
    built = time.process_time()
    lp.solve(pulp.HiGHS(msg=False, threads=1, gapRel=gap, gapAbs=0.0, timeLimit=time_limit_s))
    made = (len(lp.variables()), len(lp.constraints), built - start, time.process_time() - built)
    # PuLP says "Optimal" of a time limit: sol_status tells whether there is a plan, and the bound how good it is.
    if lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Plain(None, None, None, *made)
    value, bound = float(pulp.value(lp.objective)), float(lp.solverModel.getInfo().mip_dual_bound)
    spec = mains[int(np.argmax([w[v].varValue for v in V]))]
    chosen = tuple(_layer(problem, i, x[i], y[i]) for i in L)
    return Plain(Placement(spec, chosen), value * scale, (value - bound) / value, *made)


def _layer(problem: Problem, index: int, x: list[Any], y: list[Any]) -> LayerPlan:
    remote = tuple(k for k, variable in enumerate(x) if variable.varValue > 0.5)
    memory_mb = problem.catalog.function.memory_menu_mb[int(np.argmax([variable.varValue for variable in y]))]
    return LayerPlan(layer=problem.spec.moe_layers[index], remote=remote, memory_mb=memory_mb if remote else 0, replicas=int(bool(remote)))


def _most_seconds(c: _Figures) -> np.ndarray:
    """[V]: no request takes longer under a main spec, wherever its experts are."""
    remote_first = c.r + c.B.sum(axis=2).max(axis=0)
    remote_step = ((c.b.max() + c.r) * c.h).sum(axis=1)
    first = np.maximum(c.A.sum(axis=2), remote_first).sum(axis=1)
    step = np.maximum(np.outer(c.a, c.h.sum(axis=1)), remote_step).sum(axis=1)
    return c.rest_first + first + c.n * (c.rest + step)
