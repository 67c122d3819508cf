"""The receipt of one answer: times, calls and cost by function, and the plan's prediction. Pure.

Prices are those of the plan's catalog. Billed milliseconds are those of Lambda's REPORT lines, so the sums can be checked against a bill.
"""

from __future__ import annotations

from collections.abc import Sequence

from remoe_cli.artifacts import Part
from remoe_cli.plan.document import Outcome
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.invoke import Invocation


class Prices(Part):
    """The prices that a receipt needs from a catalog.

    main_gb   memory that the main function is billed for
    """

    catalog: str
    main_gb: float
    main_usd_per_gb_second: float
    function_usd_per_gb_second: float
    function_usd_per_request: float


class FunctionLine(Part):
    """All invocations of one expert function for an answer."""

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
    """Times in seconds and costs in USD of one answer.

    tpot_s        mean time of a token after the first; None for an answer of one token
    main_load_s   time to load the main function, if this request waited for it and it is billed; in the cost, in no other time
    predicted     what the plan predicts for this request; the client adds it (runtime/expected_cost.py)
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
    """Add up an answer's times, invocations and cost.

    >>> call = Invocation("f", 100, 100, 0.2, 150.0, billed_ms=200, billed_tries=1, memory_mb=1024, init_ms=None, retries=0)
    >>> answer = Generated((1, 2), (3, 4, 5), "three tokens", "length", token_times_s=(0.5, 0.6, 0.7), invocations=(call,))
    >>> prices = Prices(
    ...     catalog="example", main_gb=2.0, main_usd_per_gb_second=1e-5, function_usd_per_gb_second=2e-5, function_usd_per_request=2e-7
    ... )
    >>> receipt = make_receipt(answer, prices)
    >>> receipt.ttft_s, round(receipt.tpot_s, 3), round(receipt.cost.main_usd, 9), round(receipt.cost.functions_usd, 9)
    (0.5, 0.1, 1.4e-05, 4.2e-06)
    """
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
