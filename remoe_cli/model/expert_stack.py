"""Put the experts of a layer together from a tensor of each, with one copy.

transformers stacks the tensors of a parameter and then joins gate and up, so it copies each expert two or three times. Here a parameter is
what the fused layout of checkpoints has, one tensor with a row for each expert, and each expert's tensors are read into their place in it.
The numbers are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


class ExpertStack:
    """A parameter of a layer's experts, read when it is indexed.

    `parts` has for each expert the tensors whose rows follow each other in the parameter.

    Shapes: parts[expert][part] is [rows of this part, ...]; the parameter is [experts, rows of all parts, ...].
    """

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = parts

    @property
    def is_even(self) -> bool:
        """Whether all experts have parts of the same shapes and types, which fit each other."""
        kinds = [[(tuple(part.get_shape()), part.get_dtype()) for part in expert] for expert in self.parts]
        first = kinds[0]
        return all(kind == first for kind in kinds) and len({(shape[1:], dtype) for shape, dtype in first if shape}) == 1

    def get_shape(self) -> list[int]:
        shapes = [part.get_shape() for part in self.parts[0]]
        return [len(self.parts), sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def get_dtype(self) -> str:
        return str(self.parts[0][0].get_dtype())

    def __getitem__(self, key: Any) -> torch.Tensor:
        first = self.parts[0][0][...]
        stacked = torch.empty(self.get_shape(), dtype=first.dtype)
        # By numpy, which copies in this thread alone: torch would start OpenMP's threads for each of those that load.
        for row, parts in zip(stacked.view(torch.uint8).numpy(), self.parts, strict=True):
            end = 0
            for part in parts:
                read = part[...].view(torch.uint8).numpy()
                row[end : (end := end + len(read))] = read
        return stacked[key]


def stack(state: Mapping[str, Any], places: Mapping[str, tuple[str, str]], probe: PreTrainedModel) -> dict[str, Any]:
    """Put tensors of single experts together under the names of their parameters.

    Only where transformers would do no more with them. `places` has for the names of such tensors their parameter and their naming
    pattern. What does not fit is left to transformers, which says why.
    """
    mapping = get_model_conversion_mapping(probe)
    order = {pattern: each.source_patterns for each in mapping if _stacks(each) for pattern in each.source_patterns}
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    parameters = probe.state_dict()
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(places.keys() & state.keys(), key=dot_natural_key):
        target, pattern = places[name]
        groups[target][pattern].append(name)
    stacked = dict(state)
    for target, names in groups.items():
        patterns = order.get(next(iter(names)), [])
        if names.keys() != set(patterns) or len({len(of_pattern) for of_pattern in names.values()}) > 1:
            continue
        made = ExpertStack([[state[name] for name in of_expert] for of_expert in zip(*(names[each] for each in patterns), strict=True)])
        if made.is_even and rename_source_key(target, renamings, converters, probe.base_model_prefix, parameters) == (target, None):
            for name in (name for of_pattern in names.values() for name in of_pattern):
                del stacked[name]
            stacked[target] = made
    return stacked


def _stacks(converter: WeightTransform) -> bool:
    """Whether a converter stacks the tensors of all experts and joins their rows, and does nothing else."""
    if not isinstance(converter, WeightConverter):
        return False
    kinds = [(type(operation), operation.dim) for operation in converter.operations if type(operation) in (MergeModulelist, Concatenate)]
    alone = len(kinds) == len(converter.operations) and len(converter.target_patterns) == 1 and not converter.force_cpu
    joined = kinds == [(MergeModulelist, 0), (Concatenate, 1)]
    return alone and (joined or (kinds == [(MergeModulelist, 0)] and len(converter.source_patterns) == 1))
