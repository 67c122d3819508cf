"""The linear programme of column generation, in HiGHS itself: PuLP would build it anew each time."""

from __future__ import annotations

import os
import sys
from functools import cache

import highspy
import numpy as np

from remoe_cli import interrupts
from remoe_cli.plan.arrays import Floats, Ints


class RestrictedMaster:
    """The restricted master of column generation: a linear programme whose columns are added step by step.

        min c x + penalty over,   rows x - over <= 1,   the columns of each layer sum to 1,   x, over >= 0

    The rows are elastic (`over`), so that one column of each layer is enough for a solution. Each solution starts from the last one's
    basis.
    """

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
        """Add columns.

        Shapes: costs [N], rows [R, N], layers [N].
        """
        at = np.tile(np.arange(self.rows + 1), (len(c), 1))
        at[:, -1] += layer
        self._add(c, at, np.concatenate([rows, np.ones((1, len(c)))]).T)

    def _add(self, c: Floats, at: Ints, values: Floats) -> None:
        starts, most = np.arange(len(c)) * at.shape[1], np.full(len(c), highspy.kHighsInf)
        self.highs.addCols(len(c), c, np.zeros(len(c)), most, at.size, starts, at.ravel(), values.ravel())

    def solve(self) -> tuple[float, Floats, Floats] | None:
        """Find the least value, the duals of the rows, and the value of each column; None without an optimum.

        Shapes: duals [R]; columns [N], in the order in which they were added.
        """
        interrupts.check()
        self.highs.run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution = self.highs.getSolution()
        duals = np.maximum(0.0, -np.array(solution.row_dual[: self.rows]))
        return self.highs.getInfo().objective_function_value, duals, np.array(solution.col_value[self.rows :])


@cache
def quiet_highs() -> None:
    """Make the first HiGHS instance of this process while stdout leads nowhere.

    It prints a banner before any option can stop it, and stdout belongs to the caller.
    """
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
