"""Count which experts served requests use, without any of their text. Imports no torch.

The hook into a model's experts (model/experts.py) sees the ids of the experts that every token chose. They are counted for each answer by
phase: the tokens of its prompt are its prefill, and those after it its decode (sequence.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
PREFILL, DECODE = 0, 1


_FEW = 128  # ids; of few, as in a decode step, plain numbers are counted faster


@dataclass
class Hits:
    """How often the tokens of one request chose each expert.

    layers   the hidden layers that have experts, ascending

    >>> hits = Hits((3, 5), experts=4)
    >>> hits.add(PREFILL, 5, np.array([[0, 2], [2, 4]]))  # an id of 4 means no expert
    >>> hits.counts[PREFILL].tolist()
    [[0, 0, 0, 0], [1, 0, 2, 0]]
    """

    layers: Sequence[int]
    experts: int

    def __post_init__(self) -> None:
        self._rows = {(phase, layer): [0] * self.experts for phase in (PREFILL, DECODE) for layer in self.layers}

    @property
    def counts(self) -> Ints:
        """The counts by phase and layer. Shapes: int64 [2, L, E]."""
        return np.array([[self._rows[phase, layer] for layer in self.layers] for phase in (PREFILL, DECODE)], dtype=np.int64)

    def add(self, phase: int, layer: int, ids: npt.NDArray[np.integer]) -> None:
        """Count the choices of some tokens. Shapes: ids [T, k]; an id that is no expert's counts for nothing."""
        row, experts = self._rows[phase, layer], self.experts
        if ids.size <= _FEW:
            for expert in ids.ravel().tolist():
                if 0 <= expert < experts:
                    row[expert] += 1
            return
        counts = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts).tolist()
        self._rows[phase, layer] = [a + b for a, b in zip(row, counts, strict=True)]
