"""HiGHS without PuLP between, for the linear programme that column generation solves again and again: in PuLP each would be built anew."""

from __future__ import annotations

import os
import sys
from functools import cache

import highspy
import numpy as np

from remoe_cli.plan.arrays import Floats, Ints


class RestrictedMaster:
    """min c x + penalty over, rows x - over <= 1, the columns of each layer sum to 1; x, over >= 0. The rows are elastic, so that columns
    of every layer are enough for a solution. Each solution starts from the last one's basis."""

    def __init__(self, rows: int, layers: int, penalty: float) -> None:
        quiet_highs()
        self.rows = rows
        self.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", 1)
        least = np.concatenate([np.full(rows, -highspy.kHighsInf), np.ones(layers)])
        self.highs.addRows(rows + layers, least, np.ones(rows + layers), 0, [], [], [])
        self._add(np.full(rows, penalty), np.arange(rows)[:, None], np.full((rows, 1), -1.0))

    def add(self, c: Floats, rows: Floats, layer: Ints) -> None:
        """Columns with costs [N], rows [R, N] and layers [N]."""
        at = np.tile(np.arange(self.rows + 1), (len(c), 1))
        at[:, -1] += layer
        self._add(c, at, np.concatenate([rows, np.ones((1, len(c)))]).T)

    def _add(self, c: Floats, at: Ints, values: Floats) -> None:
        starts, most = np.arange(len(c)) * at.shape[1], np.full(len(c), highspy.kHighsInf)
        self.highs.addCols(len(c), c, np.zeros(len(c)), most, at.size, starts, at.ravel(), values.ravel())

    def solve(self) -> tuple[float, Floats, Floats] | None:
        """The least value, the rows' multipliers [R] and the columns' values [N], in the order they were added; None without an optimum."""
        self.highs.run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution = self.highs.getSolution()
        duals = np.maximum(0.0, -np.array(solution.row_dual[: self.rows]))
        return self.highs.getInfo().objective_function_value, duals, np.array(solution.col_value[self.rows :])


@cache
def quiet_highs() -> None:
    """HiGHS prints a banner on the process's stdout when its first instance is made, before any option can stop it: make that one where
    nobody sees it, so that stdout stays what the caller wrote."""
    sys.stdout.flush()
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()  # type: ignore[no-untyped-call]
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
