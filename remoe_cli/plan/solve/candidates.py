"""Remote sets that the solvers weigh."""

from __future__ import annotations

import numpy as np

from remoe_cli.plan.arrays import Bools
from remoe_cli.plan.problem.workload import Workload

ENUMERATED_EXPERTS = 8  # up to here all 2**E remote sets of a layer are weighed  # up to here all 2**E remote sets of a layer are weighed


def candidate_sets(workload: Workload) -> tuple[Bools, ...]:
    """Remote sets that the exact planner weighs, per layer bool [S, E], by rising size.

    All subsets up to 8 experts a layer; above, the prefixes of the utility order, which is optimal only among such
    plans (planning study, section 1: measured loss 0 to 0.27% at full size).
    """
    layers, experts = workload.use.shape
    if experts <= ENUMERATED_EXPERTS:
        members = (np.arange(2**experts)[:, None] >> np.arange(experts)) & 1 == 1
        by_size: Bools = members[np.argsort(members.sum(axis=1), kind="stable")]
        return tuple(by_size for _ in range(layers))
    return prefix_sets(workload, tuple(range(experts + 1)))


def prefix_sets(workload: Workload, sizes: tuple[int, ...]) -> tuple[Bools, ...]:
    """Per layer bool [S, E]: the least used experts, so many of them as `sizes` says, by rising size."""
    every: Bools = np.array(sizes)[:, None] > workload.ranks[:, None, :]
    return tuple(sets for sets in every)
