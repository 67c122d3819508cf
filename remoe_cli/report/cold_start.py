"""What a cold start consists of: its steps, as the profile measured them or as the catalog says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remoe_cli.plan.cost import expert_functions, main_function
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.profile.latency_record import ColdStart

# Kinds of steps, in the order in which they are drawn.
STARTING, LIBRARIES, READING, FIRST = "start of the instance", "imports of libraries", "reading of weights", "first result"
STEPS = (STARTING, LIBRARIES, READING, FIRST)


@dataclass(frozen=True)
class Start:
    """A cold start: what starts, and the seconds of each kind of step."""

    what: str
    steps_s: dict[str, float]

    @property
    def total_s(self) -> float:
        """The whole wait."""
        return sum(self.steps_s.values())


def starts_of(plan: Plan, problem: Problem) -> tuple[Start, ...]:
    """List the cold starts of a plan.

    They are those of its main function, if that starts, and of its expert function with most experts.
    """
    found: list[Start] = []
    if plan.main.starts:
        local = sum(plan.model.experts_per_layer - len(layer.remote) for layer in plan.layers)
        whole_s, empty_s = main_function.start_s(problem, plan.main, local), main_function.start_s(problem, plan.main, 0)
        rest_s = main_function.rest_read_bytes(problem) / main_function.load_bytes_per_s(problem, plan.main)
        steps = {STARTING: empty_s - rest_s, READING: rest_s + whole_s - empty_s}
        found.append(Start(f"main function on {plan.main.name}", steps))
    experts = max((len(part) for layer in plan.layers for part in layer.parts), default=0)
    if experts:
        whole_s = float(expert_functions.cold_s(problem, np.array([experts]))[0])
        before_s = float(expert_functions.cold_s(problem, np.array([0]))[0])
        measured = problem.latency.cold_start
        steps = {STARTING: before_s} if measured is None else _measured(measured)
        steps[READING] = steps.get(READING, 0.0) + whole_s - before_s
        found.append(Start(f"expert function with {experts} expert{'' if experts == 1 else 's'}", steps))
    return tuple(found)


def measured_start(measured: ColdStart | None) -> tuple[Start, ...]:
    """List the cold start that a profile measured on a deployment."""
    if measured is None:
        return ()
    return (Start(f"expert function (median of {measured.starts} starts)", _measured(measured)),)


def _measured(start: ColdStart) -> dict[str, float]:
    """Divide a measured start into steps; what no step has is the instance's own."""
    steps = {LIBRARIES: start.imports_s, READING: start.weights_s, FIRST: start.first_result_s}
    return {STARTING: max(0.0, start.total_s - sum(steps.values()))} | steps
