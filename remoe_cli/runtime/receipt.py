"""The receipt: what one answer took and cost, by function, beside what the plan had predicted.

Pure functions over what was measured. Prices come from the plan's catalog; billed milliseconds from Lambda's own
REPORT lines, so the sums can be checked against a bill.
"""

from __future__ import annotations

from collections.abc import Sequence

from remoe_cli.artifacts import Part
from remoe_cli.plan.document import Outcome
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation


class Prices(Part):
    """What the receipt needs of a catalog. `main_gb` is the memory that the main function is billed for."""

    catalog: str
    main_gb: float
    main_usd_per_gb_second: float
    function_usd_per_gb_second: float
    function_usd_per_request: float


class FunctionLine(Part):
    """All calls of one function for this answer."""

    name: str
    memory_mb: int
    invocations: int
    cold_starts: int
    retries: int
    billed_ms: int
    cost_usd: float
    sent_bytes: int
    received_bytes: int


class Cost(Part):
    main_usd: float
    functions_usd: float
    total_usd: float


class Receipt(Part):
    """`tpot_s` is None for an answer of one token. `main_load_s` is what the main function took to load before, where it was not yet
    loaded and that is billed; it is in the cost and in no other time. `predicted` is the client's to fill in (runtime/expected_cost.py).
    """

    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    tpot_s: float | None
    total_s: float
    main_load_s: float = 0.0
    invocations: int
    cold_starts: int
    retries: int
    billed_ms: int
    sent_bytes: int
    received_bytes: int
    cost: Cost
    catalog: str
    functions: tuple[FunctionLine, ...]
    predicted: Outcome | None = None


def make_receipt(answer: Generated, prices: Prices, main_load_s: float = 0.0) -> Receipt:
    """Add an answer up."""
    names = sorted({i.function for i in answer.invocations})
    lines = tuple(_line(name, [i for i in answer.invocations if i.function == name], prices) for name in names)
    total_s = answer.token_times_s[-1]
    main_usd = (total_s + main_load_s) * prices.main_gb * prices.main_usd_per_gb_second
    functions_usd = sum(line.cost_usd for line in lines)
    return Receipt(
        prompt_tokens=len(answer.prompt_token_ids),
        generated_tokens=len(answer.token_ids),
        ttft_s=answer.ttft_s,
        tpot_s=answer.tpot_s,
        total_s=total_s,
        main_load_s=main_load_s,
        invocations=len(answer.invocations),
        cold_starts=sum(line.cold_starts for line in lines),
        retries=sum(line.retries for line in lines),
        billed_ms=sum(line.billed_ms for line in lines),
        sent_bytes=sum(line.sent_bytes for line in lines),
        received_bytes=sum(line.received_bytes for line in lines),
        cost=Cost(main_usd=main_usd, functions_usd=functions_usd, total_usd=main_usd + functions_usd),
        catalog=prices.catalog,
        functions=lines,
    )


def _line(name: str, calls: Sequence[Invocation], prices: Prices) -> FunctionLine:
    gb_seconds = sum(c.billed_ms / 1000 * c.memory_mb / 1024 for c in calls)
    return FunctionLine(
        name=name,
        memory_mb=calls[0].memory_mb,
        invocations=len(calls),
        cold_starts=sum(c.init_ms is not None for c in calls),
        retries=sum(c.retries for c in calls),
        billed_ms=sum(c.billed_ms for c in calls),
        cost_usd=gb_seconds * prices.function_usd_per_gb_second + sum(c.billed_tries for c in calls) * prices.function_usd_per_request,
        sent_bytes=sum(c.request_bytes for c in calls),
        received_bytes=sum(c.response_bytes for c in calls),
    )
