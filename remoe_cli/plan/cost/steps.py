"""Decode steps of several rows, of several requests at once or of drafts: time, and what functions are billed.

Both are means over drawn steps (problem/batches.py).
The rows that all requests have for a function go there in one invocation. A layer ends with the slowest of CPU, GPU and functions.

Shapes: S sets of one layer, E experts, M drawn steps, V memory specs, K main specs, n rows of all requests at most.
Source: method.md, sections 11 and 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Floats, Ints
from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.document import MainSpec
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU
from remoe_cli.plan.problem.problem import Problem

StepTimes = tuple[tuple[float, ...], tuple[float, ...]]  # of an expert by its rows, from 0 to n: on the CPU, and on the GPU


@dataclass(frozen=True)
class Steps:
    """What decode steps of one layer take, for each set.

    seconds    [K, S, V], mean time of the layer
    billed_s   [S, V], mean billed time of all its invocations
    calls      [S, 1], how many there are in the mean

    V is 1 where nothing is remote.
    """

    seconds: Floats
    billed_s: Floats
    calls: Floats


def step_times(problem: Problem, spec: MainSpec) -> StepTimes:
    """Look up how fast a main spec is; specs with the same times are alike."""
    on_cpu, on_gpu = main_function.expert_steps_s(problem, spec), main_function.gpu_expert_steps_s(problem, spec)
    return tuple(on_cpu.tolist()), tuple(on_gpu.tolist())


def different_times(problem: Problem) -> tuple[StepTimes, ...]:
    """List the different times of the menu's main specs."""
    return tuple(dict.fromkeys(step_times(problem, spec) for spec in problem.menu))


def layer_steps(problem: Problem, layer: int, owner: Ints, memory_mb: npt.ArrayLike, mains: Sequence[StepTimes]) -> Steps:
    """Price the decode steps of the sets `owner` [S, E] of one layer, beside each of some main specs.

    Shapes: `memory_mb` [V], of each function.
    """
    rows = problem.step_rows(layer)
    own_s = [own_step_s(owner, rows, times) for times in mains]
    functions, specs_mb = int(owner.max(initial=ON_CPU)) + 1, np.asarray(memory_mb, dtype=np.float64)
    if functions <= 0:
        none = np.zeros((len(owner), 1))
        return Steps(np.array([seconds.mean(axis=1)[:, None] for seconds in own_s]), none, none)
    members = [(owner == function).astype(np.float64) for function in range(functions)]
    sent = [here @ rows for here in members]
    seconds, billed_s = np.empty((len(mains), len(owner), len(specs_mb))), np.zeros((len(owner), len(specs_mb)))
    elapsed_s = expert_functions.warm(problem).elapsed_s
    for place, each_mb in enumerate(specs_mb):
        work_s = expert_functions.expert_work_s(problem, each_mb, np.arange(problem.step_tokens + 1))[rows]
        wait_s = np.zeros(sent[0].shape)
        for here, here_rows in zip(members, sent, strict=True):
            inside_s = expert_functions.inside_s(problem, each_mb, here @ work_s, here_rows)
            wait_s = np.maximum(wait_s, np.where(here_rows > 0, elapsed_s + inside_s, 0.0))
            billed_s[:, place] += np.where(here_rows > 0, expert_functions.billed_s(problem, inside_s), 0.0).mean(axis=1)
        for main, own in enumerate(own_s):
            seconds[main, :, place] = np.maximum(own, wait_s).mean(axis=1)
    calls = np.sum([(here_rows > 0).mean(axis=1) for here_rows in sent], axis=0)
    return Steps(seconds, billed_s, calls[:, None])


def own_step_s(owner: Ints, rows: npt.NDArray[np.int16], times: StepTimes) -> Floats:
    """Compute the time of the main function's own experts in each step: CPU and GPU work at the same time.

    Shapes: [S, M].
    """
    cpu_s, gpu_s = np.array(times[0]), np.array(times[1])
    own_s: Floats = (owner == ON_CPU).astype(np.float64) @ cpu_s[rows]
    there = np.flatnonzero((owner == ON_GPU).any(axis=1))
    if len(there) and not np.isfinite(gpu_s[1:]).all():
        own_s[there] = np.inf
    elif len(there):
        own_s[there] = np.maximum(own_s[there], (owner[there] == ON_GPU).astype(np.float64) @ gpu_s[rows])
    return own_s
