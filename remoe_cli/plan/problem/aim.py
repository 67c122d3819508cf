"""What a plan shall be best at, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass

from remoe_cli.plan.document import Objective, Outcome

SLACK = 1e-9  # relative tolerance at which a limit counts as met  # relative tolerance at which a limit counts as met


@dataclass(frozen=True)
class Aim:
    """Least `objective` under the limits that are not None; `budget_usd` is a request's."""

    objective: Objective = "cost"
    ttft_s: float | None = None
    tpot_s: float | None = None
    budget_usd: float | None = None

    def value(self, outcome: Outcome) -> float:
        """The objective's, in USD or seconds."""
        return {"cost": outcome.cost_usd_per_request, "ttft": outcome.ttft_s, "tpot": outcome.tpot_s}[self.objective]


def meets(aim: Aim, outcome: Outcome) -> bool:
    pairs = ((outcome.ttft_s, aim.ttft_s), (outcome.tpot_s, aim.tpot_s), (outcome.cost_usd_per_request, aim.budget_usd))
    return all(limit is None or value <= limit * (1 + SLACK) for value, limit in pairs)
