"""Decode steps of several rows, of requests at once or of drafts: time, and what is billed.

Both are means over drawn steps (problem/batches.py).
The rows that all requests have for a function go there in one invocation. A layer ends with the slowest of CPU, GPU and functions.

Shapes: S sets of one layer, E experts, M drawn steps, n rows of all requests at most.
Source: method.md, sections 11 and 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    seconds    [S], mean time of the layer
    billed_s   [S, 1], mean billed time of all its invocations
    calls      [S, 1], how many there are in the mean
    """

    seconds: Floats
    billed_s: Floats
    calls: Floats


def step_times(problem: Problem, spec: MainSpec) -> StepTimes:
    """Look up how fast a main spec is; specs with the same times are alike."""
    on_cpu, on_gpu = main_function.expert_steps_s(problem, spec), main_function.gpu_expert_steps_s(problem, spec)
    return tuple(on_cpu.tolist()), tuple(on_gpu.tolist())


def least_times(several: Sequence[StepTimes]) -> tuple[StepTimes, ...]:
    """Leave out times that others are nowhere slower than: a step takes no less time with them."""
    different = tuple(dict.fromkeys(several))
    return tuple(one for one in different if not any(other is not one and _nowhere_slower(other, one) for other in different))


def _nowhere_slower(one: StepTimes, other: StepTimes) -> bool:
    return all(a <= b for devices in zip(one, other, strict=True) for a, b in zip(*devices, strict=True))


@dataclass(frozen=True)
class Sent:
    """What drawn decode steps of one layer send to functions of one memory spec, for each set.

    wait_s     [S, M], time of the slowest invocation
    billed_s   [S], mean billed time of all invocations
    """

    wait_s: Floats
    billed_s: Floats


def sent_of(problem: Problem, layer: int, owner: Ints, memory_mb: float) -> Sent:
    """Price what the steps of the sets `owner` [S, E] of one layer send."""
    rows = problem.step_rows(layer)
    elapsed_s = expert_functions.warm(problem).elapsed_s
    wait_s, billed_s = np.zeros((len(owner), rows.shape[1])), np.zeros(len(owner))
    for here, here_rows in _divided(owner, rows):
        work_s = expert_functions.expert_work_s(problem, memory_mb, np.arange(problem.step_tokens + 1))[rows]
        inside_s = expert_functions.inside_s(problem, memory_mb, here @ work_s, here_rows)
        wait_s = np.maximum(wait_s, np.where(here_rows > 0, elapsed_s + inside_s, 0.0))
        billed_s += np.where(here_rows > 0, expert_functions.billed_s(problem, inside_s), 0.0).mean(axis=1)
    return Sent(wait_s, billed_s)


def calls_of(problem: Problem, layer: int, owner: Ints) -> Floats:
    """Count the mean invocations of the steps of some sets.

    Shapes: `owner` [S, E]; [S, 1].
    """
    calls = np.zeros(len(owner))
    for _, here_rows in _divided(owner, problem.step_rows(layer)):
        calls += (here_rows > 0).mean(axis=1)
    return calls[:, None]


def _divided(owner: Ints, rows: npt.NDArray[np.int16]) -> Iterator[tuple[Floats, Floats]]:
    """Iterate over the functions: their experts [S, E], and the rows that steps send them [S, M]."""
    for function in range(int(owner.max(initial=ON_CPU)) + 1):
        here = (owner == function).astype(np.float64)
        yield here, here @ rows


def layer_steps(problem: Problem, layer: int, owner: Ints, memory_mb: float, times: StepTimes) -> Steps:
    """Price decode steps of the sets `owner` [S, E] of a layer, beside a main function of these times."""
    own_s = own_step_s(owner, problem.step_rows(layer), times)
    sent = sent_of(problem, layer, owner, memory_mb)
    return Steps(np.maximum(own_s, sent.wait_s).mean(axis=1), sent.billed_s[:, None], calls_of(problem, layer, owner))


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
