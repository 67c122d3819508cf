"""The order of a batch's rows: by expert to compute them, by token to add them up.

transformers' eager loop adds the outputs of one expert after the other to the sums of their tokens. So a token's sum takes its outputs by
ascending expert, and this order decides how it is rounded. All sums here keep it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
# With so few, as in decode steps, one gather of all rows takes less than a sum for each expert; with many it takes more.
_FEW_ROWS = 512


@dataclass(frozen=True)
class Grouping:
    """The rows of T tokens with k slots each, ascending by expert; rows without an expert are last.

    groups   expert, its first row and the end of its rows, for each expert with rows
    tokens   [T k] the token of each row; within an expert by slot, then by token, as in eager
    flat     [T k] its place among the slots [T, k], token after token
    again    whether a token names an expert more than once
    """

    groups: tuple[tuple[int, int, int], ...]
    tokens: Ints
    flat: Ints
    again: bool

    def divided(self, experts: Collection[int]) -> tuple[Grouping, Grouping]:
        """Divide the groups into those of some experts and the others."""
        ours, others = (tuple(group for group in self.groups if (group[0] in experts) == which) for which in (True, False))
        return replace(self, groups=ours), replace(self, groups=others)

    def on_device(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `tokens` and `flat` where the index is; nothing is copied."""
        tokens, slots = index.shape
        order = index.t().reshape(-1).argsort(stable=True)
        return order % tokens, order % tokens * slots + order.div(tokens, rounding_mode="floor")

    @property
    def places(self) -> Ints:
        """The places of the groups' rows among the slots, one group after the other."""
        return np.concatenate([self.flat[start:end] for _, start, end in self.groups])


def by_expert(index: npt.NDArray[np.integer], experts: int) -> Grouping:
    """Group rows by expert.

    Ids of `experts` and above mean "no expert" in some families.

    Shapes: index [T, k].
    """
    tokens, slots = index.shape
    by_slot = index.T.reshape(-1)
    order = by_slot.argsort(kind="stable")
    ids = by_slot[order]
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)] if len(ids) else [0]
    held = [(int(ids[start]), start, end) for start, end in itertools.pairwise(starts)]
    groups = tuple(group for group in held if group[0] < experts)
    slot, token = np.divmod(order, tokens) if tokens > 1 else (order, np.zeros_like(order))
    sorted_ids = np.sort(index, axis=1)
    again = ((sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] < experts)).any()
    return Grouping(groups, token, token * slots + slot, bool(again))


def rows_of(hidden: Tensor, grouping: Grouping, start: int, end: int) -> Tensor:
    """Gather the hidden states of some rows: [T, H] gives [end - start, H]."""
    if len(hidden) == end - start == 1:
        return hidden
    return hidden[torch.from_numpy(grouping.tokens[start:end])]


def weighted_sum(outputs: list[Tensor], hidden: Tensor, weights: Tensor, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """Weight outputs, and add up those of each token in eager's order and in `dtype`.

    Shapes: outputs [n, H] of each group; hidden [T, H]; weights [T, k]; returns [T, H].
    """
    of_rows = weights.reshape(-1)[torch.from_numpy(grouping.flat)].unsqueeze(1)
    held = grouping.groups[-1][2] if grouping.groups else 0
    if 0 < held <= _FEW_ROWS and not grouping.again:  # eager rounds otherwise where an expert has two rows of one token
        out = (torch.cat(outputs) * of_rows[:held]).to(dtype)
        return add_slots(_by_token(out, len(of_rows), grouping.flat, weights.shape[1]))
    tokens, total = torch.from_numpy(grouping.tokens), torch.zeros_like(hidden, dtype=dtype)
    for out, (_, start, end) in zip(outputs, grouping.groups, strict=True):
        total.index_add_(0, tokens[start:end], (out * of_rows[start:end]).to(dtype))
    return total


def _by_token(rows: Tensor, count: int, flat: Ints, slots: int) -> Tensor:
    """Put rows in the order of their tokens, those of each token ascending by expert: [held, H] gives [T, k, H].

    Rows without an expert are zeros.
    """
    if len(rows) < count:
        rows = torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
    if slots == count:  # one token: its rows are in order
        return rows.unsqueeze(0)
    place = np.empty(count, dtype=np.int64)
    place[flat] = np.arange(count)
    place = np.sort(place.reshape(-1, slots), axis=1)
    return rows[torch.from_numpy(place.reshape(-1))].view(*place.shape, -1)


def device_sum(outputs: Tensor, index: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what `weighted_sum` does on a device, without waiting for it.

    Shapes: outputs [T k, H], the slots of one token after those of another, zeros for those without an expert; index and weights [T, k].
    """
    order = index.argsort(dim=1, stable=True)
    weighted = (outputs.view(*index.shape, outputs.shape[1]) * weights.unsqueeze(2)).to(dtype)
    return add_slots(weighted.take_along_dim(order.unsqueeze(2), 1))


def add_slots(outputs: Tensor) -> Tensor:
    """Add up the slots of each token one after the other: [T, k, H] gives [T, H]."""
    total = outputs[:, 0].clone()
    for slot in range(1, outputs.shape[1]):
        total += outputs[:, slot]
    return total
