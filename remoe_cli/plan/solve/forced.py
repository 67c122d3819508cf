"""A forced placement: `--remote-share F` makes the least used share F of the model's experts remote.

What of the others is on the GPU, the exact planner chooses, as it sizes the functions.
"""

from __future__ import annotations

import numpy as np

from remoe_cli.errors import UsageError
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.solve.candidates import Sets, with_gpu


def forced_sets(problem: Problem, remote_share: float) -> tuple[Sets, ...]:
    """Choose round(F * L * E) experts of all layers together; the exact planner sizes their functions.

    Every layer gives its floor(F * E) experts of least utility. The rest of the share comes from the layers whose next expert is used
    least.

    Shapes: per layer [S, E].
    Raises: UsageError unless 0 <= F <= 1.
    """
    if not 0 <= remote_share <= 1:
        raise UsageError(f"A remote share of {remote_share:g} is not between 0 and 1.", "Give a share such as 0.5.")
    workload = problem.workload
    layers, experts = workload.use.shape
    total = int(remote_share * layers * experts + 0.5)
    sizes = np.full(layers, total // layers)
    if extra := total % layers:
        next_utility = np.sort(workload.utility, axis=1)[:, sizes[0]]
        sizes[np.argsort(next_utility, kind="stable")[:extra]] += 1
    return with_gpu(problem, tuple((rank < size)[None, :] for rank, size in zip(workload.ranks, sizes, strict=True)))
