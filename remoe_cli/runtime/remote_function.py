"""What a main function knows of an expert function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from remoe_cli.lambda_limits import MAX_TIMEOUT_S
from remoe_cli.plan.arrays import Floats
from remoe_cli.runtime.last_resort import ShardPlace


@dataclass(frozen=True)
class RemoteFunction:
    """An expert function of one MoE layer. No other function holds its `experts`.

    replicas      instances of it that may run at once
    expert_rows   the work of calling an expert besides its rows (mostly reading its weights), in rows
    timeout_s     after which the platform ends a call
    shard         where its experts are; answers must come from a function with that shard. None: nobody knows
    use           of each expert: the share of prompt tokens of the plan's requests that need it; empty where nobody knows
    start_usd     what starting an instance costs
    expert_usd    what reading an expert then costs
    """

    name: str
    experts: tuple[int, ...]
    replicas: int
    expert_rows: float
    timeout_s: int = MAX_TIMEOUT_S
    shard: ShardPlace | None = None
    use: tuple[float, ...] = ()
    start_usd: float = 0.0
    expert_usd: float = 0.0

    @cached_property
    def not_used(self) -> Floats:
        """The share of prompt tokens that does not need each expert."""
        return 1.0 - np.asarray(self.use, dtype=np.float64)
