"""How many further calls may be made: a token bucket that successes fill.

Retries and hedges make work. When many calls fail, or all are slow, they would make it worse. So each call that succeeds earns a share of a
further one, as gRPC has it: in the long run there are at most so many for each success, and a full bucket pays for a short fault.

Source: gRPC proposal A6, "gRPC Retry Design", throttling of retries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """Tokens for further calls; each takes one, and each success earns `share`, up to `most`.

    >>> budget = Budget(share=0.1, most=10.0, tokens=1.0)
    >>> budget.spent().allows, budget.spent().earned(10).allows
    (False, True)
    """

    share: float
    most: float
    tokens: float

    @property
    def allows(self) -> bool:
        """Tell whether there may be a further call now."""
        return self.tokens > 1 - 1e-9  # ten times 0.1 is a token

    def spent(self) -> Budget:
        """Return what is left after a further call."""
        return replace(self, tokens=self.tokens - 1)

    def earned(self, successes: int = 1) -> Budget:
        """Return what there is after so many successes."""
        return replace(self, tokens=min(self.most, self.tokens + self.share * successes))


# Of one function: 0.1 retries for each success, as in gRPC's example, and 10 at once.
RETRIES = Budget(share=0.1, most=10.0, tokens=10.0)
# Of all functions, beside the first: never more than 5% of the calls, from the first one on.
HEDGES = Budget(share=0.05, most=10.0, tokens=0.0)
