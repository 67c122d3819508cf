"""What a plan shall have least of, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass

from remoe_cli.plan.document import Objective, Outcome

SLACK = 1e-9  # relative tolerance at which a limit counts as met


@dataclass(frozen=True)
class Aim:
    """Make `objective` least, under the limits that are not None.

    ttft_s, tpot_s   seconds to the first token, and for each further token
    ttft_percentile  per cent of the requests whose TTFT shall be within `ttft_s`; None: the mean TTFT shall be
    budget_usd       USD a request
    """

    objective: Objective = "cost"
    ttft_s: float | None = None
    tpot_s: float | None = None
    budget_usd: float | None = None
    ttft_percentile: float | None = None

    @property
    def is_for_tpot(self) -> bool:
        """Tell whether TPOT is the objective or has a limit."""
        return self.objective == "tpot" or self.tpot_s is not None

    def value(self, outcome: Outcome) -> float:
        """Read the objective from an outcome, in USD or seconds.

        >>> Aim("tpot").value(Outcome(cost_usd_per_request=0.002, ttft_s=1.5, tpot_s=0.08))
        0.08
        """
        return {"cost": outcome.cost_usd_per_request, "ttft": outcome.held_ttft_s, "tpot": outcome.tpot_s}[self.objective]


def meets(aim: Aim, outcome: Outcome) -> bool:
    """Tell whether an outcome keeps every limit of the aim."""
    pairs = ((outcome.held_ttft_s, aim.ttft_s), (outcome.tpot_s, aim.tpot_s), (outcome.cost_usd_per_request, aim.budget_usd))
    return all(limit is None or value <= limit * (1 + SLACK) for value, limit in pairs)
