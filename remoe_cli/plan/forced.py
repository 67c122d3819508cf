"""A forced placement: `--remote-share F` sends the least used share F of every layer's experts away."""

from __future__ import annotations

from remoe_cli.errors import UsageError
from remoe_cli.plan.workload import Bools, Workload, least_used_sets


def forced_sets(workload: Workload, remote_share: float) -> tuple[Bools, ...]:
    """Per layer bool [1, E]: the round(F * E) experts of least utility; the exact planner sizes the rest around them.

    Raises UsageError unless 0 <= F <= 1.
    """
    if not 0 <= remote_share <= 1:
        raise UsageError(f"A remote share of {remote_share:g} is not between 0 and 1.", "Give a share such as 0.5.")
    return least_used_sets(workload, int(remote_share * workload.prefill_tokens.shape[1] + 0.5))
