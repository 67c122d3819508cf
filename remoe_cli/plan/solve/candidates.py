"""The remote sets that the solvers weigh."""

from __future__ import annotations

import numpy as np

from remoe_cli.plan.arrays import Bools
from remoe_cli.plan.problem.workload import Workload

ENUMERATED_EXPERTS = 8  # up to so many experts, all 2**E remote sets of a layer are weighed


def candidate_sets(workload: Workload) -> tuple[Bools, ...]:
    """List the remote sets that the exact planner weighs for each layer, by rising size.

    Up to 8 experts a layer, these are all subsets. Above, they are the prefixes of the order of utility: the planner is then optimal only
    among plans that move each layer's least used experts out.

    Shapes: per layer bool [S, E].
    Source: planning.md, section 'Prefixes of the order of use' (measured loss: 0 to 0.27% at full size).
    """
    layers, experts = workload.use.shape
    if experts <= ENUMERATED_EXPERTS:
        members = (np.arange(2**experts)[:, None] >> np.arange(experts)) & 1 == 1
        by_size: Bools = members[np.argsort(members.sum(axis=1), kind="stable")]
        return tuple(by_size for _ in range(layers))
    return prefix_sets(workload, tuple(range(experts + 1)))


def prefix_sets(workload: Workload, sizes: tuple[int, ...]) -> tuple[Bools, ...]:
    """List, for each layer, its least used experts in the numbers `sizes`.

    Shapes: per layer bool [S, E].
    """
    every: Bools = np.array(sizes)[:, None] > workload.ranks[:, None, :]
    return tuple(sets for sets in every)
