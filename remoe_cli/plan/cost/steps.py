"""Decode steps of several rows, of requests at once or of drafts: time, and what is billed.

Both are means over drawn steps (problem/batches.py).
The rows that all requests have for a function go there in one invocation. A layer ends with the slowest of CPU, GPU and functions.

Shapes: S sets of one layer, E experts, M drawn steps, n rows of all requests at most.
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
from remoe_cli.plan.problem.hits import ON_CPU, ON_GPU, Few
from remoe_cli.plan.problem.problem import Problem

_SAME = 1e-12  # relative difference up to which each further row of an expert takes as long as the others
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
class Load:
    """What drawn decode steps send to one function of a layer, for each set.

    here         [S, E], 1 for its experts
    rows, hits   [S, M], rows that a step sends, and experts that they are for
    """

    here: Floats
    rows: Floats
    hits: Floats

    def work_s(self, each_s: Floats, step_rows: npt.NDArray[np.int16]) -> Floats:
        """Add up the work of a step's experts, from that of an expert with 0, 1, 2, .. rows.

        Shapes: `step_rows` [E, M]; [S, M].
        """
        further_s = np.diff(each_s[1:])
        if not len(further_s) or np.abs(further_s - further_s[0]).max() <= _SAME * each_s[1]:
            row_s = float(further_s[0]) if len(further_s) else 0.0
            added: Floats = (each_s[1] - row_s) * self.hits + row_s * self.rows
            return added
        work_s: Floats = self.here @ each_s[step_rows]
        return work_s


def loads_of(problem: Problem, layer: int, owner: Ints | Few) -> tuple[Load, ...]:
    """Count what the steps of the sets `owner` [S, E] of one layer send to each function."""
    rows, loads = problem.step_rows(layer), []
    for function in range(int(owner.max(initial=ON_CPU)) + 1):
        here = (owner == function).astype(np.float64)
        loads.append(Load(here, here @ rows, here @ (rows > 0)))
    return tuple(loads)


def insides_s(problem: Problem, layer: int, loads: Sequence[Load], memory_mb: float) -> list[Floats]:
    """Compute the time of each function's invocation inside it, without its overhead.

    Shapes: for each function [S, M].
    """
    if not loads:
        return []
    each_s, rows = expert_functions.expert_work_s(problem, memory_mb, np.arange(problem.step_tokens + 1)), problem.step_rows(layer)
    return [expert_functions.inside_s(problem, memory_mb, load.work_s(each_s, rows), load.rows) for load in loads]


def wait_s(problem: Problem, loads: Sequence[Load], inside_s: Sequence[Floats]) -> Floats:
    """Compute the time of the slowest invocation of each step, for each set.

    Shapes: [S, M]; 0 without functions.
    """
    elapsed_s, longest_s = expert_functions.warm(problem).elapsed_s, np.zeros(1)
    for load, seconds in zip(loads, inside_s, strict=True):
        longest_s = np.maximum(longest_s, np.where(load.rows > 0, elapsed_s + seconds, 0.0))
    return longest_s


def billed_s(problem: Problem, loads: Sequence[Load], inside_s: Sequence[Floats], sets: int) -> Floats:
    """Compute the mean billed time of all invocations of a step, for each set.

    Shapes: [S].
    """
    billed = np.zeros(sets)
    for load, seconds in zip(loads, inside_s, strict=True):
        billed += np.where(load.rows > 0, expert_functions.billed_s(problem, seconds), 0.0).mean(axis=1)
    return billed


def calls_of(loads: Sequence[Load], sets: int) -> Floats:
    """Count the mean invocations of a step of each set.

    Shapes: [S, 1].
    """
    calls: Floats = sum(((load.rows > 0).mean(axis=1) for load in loads), np.zeros(sets))[:, None]
    return calls


def layer_steps(problem: Problem, layer: int, owner: Ints | Few, memory_mb: float, times: StepTimes) -> Steps:
    """Price decode steps of the sets `owner` [S, E] of a layer, beside a main function of these times."""
    own_s, loads = own_step_s(owner, problem.step_rows(layer), times), loads_of(problem, layer, owner)
    inside_s = insides_s(problem, layer, loads, memory_mb)
    seconds = np.maximum(own_s, wait_s(problem, loads, inside_s)).mean(axis=1)
    return Steps(seconds, billed_s(problem, loads, inside_s, len(owner))[:, None], calls_of(loads, len(owner)))


def own_step_s(owner: Ints | Few, rows: npt.NDArray[np.int16], times: StepTimes) -> Floats:
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
