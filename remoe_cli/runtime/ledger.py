"""What a main function has had expert functions billed."""

from __future__ import annotations

from dataclasses import dataclass, field

from remoe_cli.runtime.receipt import Receipt


@dataclass
class Spent:
    """What expert functions were billed for one purpose: calls, milliseconds and USD."""

    invocations: int = 0
    billed_ms: int = 0
    usd: float = 0.0

    def add(self, receipt: Receipt) -> None:
        """Add what a receipt says."""
        self.invocations += receipt.invocations
        self.billed_ms += receipt.billed_ms
        self.usd += receipt.cost.functions_usd if receipt.cost else 0.0


@dataclass(frozen=True)
class Ledger:
    """What a main function has had expert functions billed since it began to load.

    loading     until it was ready; in no receipt, unless it was loaded for a request
    answers     for requests whose client took the receipt, answered or not
    cancelled   for requests whose client went away before that, or that the server's end cut off
    """

    loading: Spent = field(default_factory=Spent)
    answers: Spent = field(default_factory=Spent)
    cancelled: Spent = field(default_factory=Spent)
