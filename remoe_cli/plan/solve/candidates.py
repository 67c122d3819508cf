"""The sets that the solvers weigh for each layer: which experts are remote, and which are on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.arrays import Bools, Ints
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.workload import Workload

ENUMERATED_EXPERTS = 8  # up to so many experts, all 2**E remote sets of a layer are weighed
GPU_SIZES = 8  # at most so many sizes of what is on the GPU are weighed beside a remote set,
GPU_SHARE = 8  # up to so many times what each layer has there if all have the same
REMOTE_SIZES = 17  # above ENUMERATED_EXPERTS, experts are on the GPU beside remote sets of so many sizes
ON_CPU, REMOTE, ON_GPU = 0, 1, 2
Sets = npt.NDArray[Any]  # [S, E]: ON_CPU, REMOTE or ON_GPU, of each expert of each set; int8, or bool where none is on the GPU


def candidate_sets(problem: Problem) -> tuple[Sets, ...]:
    """List the sets that the exact planner weighs for each layer.

    Remote sets come first, by rising size, then those with experts on the GPU.

    Up to 8 experts a layer, all subsets may be remote. Above, the prefixes of the order of utility may: the planner is then optimal only
    among plans that move each layer's least used experts out. `with_gpu` says what may be on the GPU.

    Shapes: per layer [S, E].
    Source: planning.md, section 'Prefixes of the order of use' (measured loss: 0 to 0.27% at full size).
    """
    layers, experts = problem.workload.use.shape
    if experts <= ENUMERATED_EXPERTS:
        members = (np.arange(2**experts)[:, None] >> np.arange(experts)) & 1 == 1
        by_size: Bools = members[np.argsort(members.sum(axis=1), kind="stable")]
        return with_gpu(problem, tuple(by_size for _ in range(layers)))
    beside = remote_sizes_beside_gpu(experts)
    return with_gpu(problem, prefix_sets(problem.workload, tuple(range(experts + 1))), beside)


def remote_sizes_beside_gpu(experts: int) -> tuple[int, ...]:
    """List the sizes of the remote sets beside which experts are on the GPU."""
    return tuple(sorted({round(float(size)) for size in np.linspace(0, experts, min(experts + 1, REMOTE_SIZES))}))


def gpu_sizes(experts: int, layers: int, most: int) -> tuple[int, ...]:
    """List how many experts of a layer may be on a GPU with `most` places.

    It is a geometric grid, as the first expert there is worth most. Beside these sizes, all of a layer's experts that are not remote are
    weighed.
    """
    if not most:
        return ()
    if experts <= ENUMERATED_EXPERTS:
        return tuple(range(1, experts + 1))
    largest = min(experts, most, GPU_SHARE * -(-most // layers))
    return tuple(sorted({round(float(size)) for size in np.geomspace(1, largest, GPU_SIZES)}))


def with_gpu(
    problem: Problem, sets: tuple[Sets, ...], beside: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None
) -> tuple[Sets, ...]:
    """Add to each layer's remote sets the same with its most used other experts on the GPU.

    Nothing is added where no main function can have any there.

    beside   sizes of remote sets for which that is done; by default all
    sizes    how many experts are on the GPU; by default those of `gpu_sizes`, or all that are not remote

    Shapes: per layer [S, E].
    """
    experts = problem.spec.experts_per_layer
    most = main_function.most_gpu_experts(problem)
    if not most:
        return sets
    numbers = gpu_sizes(experts, len(sets), most) if sizes is None else tuple(size for size in sizes if 0 < size <= most)
    return tuple(_with_gpu(some, rank, beside, numbers, most) for some, rank in zip(sets, problem.workload.ranks, strict=True))


def _with_gpu(sets: Sets, rank: Ints, beside: tuple[int, ...] | None, sizes: tuple[int, ...], most: int) -> Sets:
    local = sets == ON_CPU
    counts = local.sum(axis=1)
    if beside is not None:
        counts = np.where(np.isin(len(rank) - counts, beside), counts, 0)
    by_use = np.argsort(-rank)
    place = np.empty(sets.shape, dtype=np.int64)  # of each local expert in the order of falling use
    place[:, by_use] = np.cumsum(local[:, by_use], axis=1) - 1
    added = [sets.astype(np.int8)]
    for index in np.flatnonzero(counts):
        numbers = sorted({*(size for size in sizes if size < counts[index]), min(int(counts[index]), most)})
        here = local[index] & (place[index] < np.array(numbers)[:, None])
        added.append(np.where(here, ON_GPU, sets[index]).astype(np.int8))
    return np.concatenate(added)


def prefix_sets(workload: Workload, sizes: tuple[int, ...]) -> tuple[Bools, ...]:
    """List, for each layer, its least used experts in the numbers `sizes`.

    Shapes: per layer bool [S, E].
    """
    every: Bools = np.array(sizes)[:, None] > workload.ranks[:, None, :]
    return tuple(sets for sets in every)
