"""HiGHS prints a banner on the process's stdout when its first instance is made, before any option can stop it."""

from __future__ import annotations

import os
import sys
from functools import cache

import highspy


@cache
def quiet_highs() -> None:
    """Make that first instance where nobody sees it, so that stdout stays what the caller wrote."""
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
