"""The receipt of one request: times, calls and cost by function, and the plan's prediction. Pure.

It has everything that was billed for the request, whether or not it was answered: calls that failed, all tries of a call, and what expert
functions billed while a main function was loaded for it. The sums of all receipts are what Lambda's meter says. Prices are those of the
price model (plan/cost/prices.py), with which the plan was made.

Requests that are answered at the same time share calls and the main function's time; each receipt has its own part of both (shares.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import Field

from remoe_cli.artifacts import Part, is_zero
from remoe_cli.plan.cost import prices as model
from remoe_cli.plan.cost.prices import FunctionPrices, MainPrices
from remoe_cli.plan.document import Outcome
from remoe_cli.runtime.answer import Generated
from remoe_cli.runtime.device import Device
from remoe_cli.runtime.invoke import Invocation, Report

# report: time that a REPORT line of Lambda bills. measured: time that was measured here. Both at the catalog's list price.
Basis = Literal["report", "measured"]


class Prices(Part):
    """The prices that a receipt needs.

    storage_mb   /tmp of each expert function, by name
    """

    catalog: str
    main: MainPrices
    function: FunctionPrices
    storage_mb: dict[str, float] = Field(default_factory=dict)


class FunctionLine(Part):
    """All invocations of one expert function for a request.

    invocations    as Lambda counts them: each try that ran
    retries        tries after the first of each call
    unreported     tries of which it was not known in time whether they were billed: their answer was lost, or came after the request
                   ended, and then a later receipt has them; in no other figure of this one
    loading_ms     part of `billed_ms` that was billed while the main function was loaded for this request
    reads          of S3
    hedges         second calls of the same rows, made because the first took long; they are in `invocations` where they ran
    fallbacks      calls whose rows the main function computed itself, from the function's shard
    starts_ahead   calls that only started an instance, before rows came; they are in `invocations` where they ran
    """

    name: str
    memory_mb: int
    basis: Basis = "report"
    invocations: int
    cold_starts: int
    retries: int
    unreported: int
    billed_ms: int
    loading_ms: int
    reads: int
    cost_usd: float
    sent_bytes: int
    received_bytes: int
    hedges: int = Field(default=0, exclude_if=is_zero)
    fallbacks: int = Field(default=0, exclude_if=is_zero)
    starts_ahead: int = Field(default=0, exclude_if=is_zero)


class MainLine(Part):
    """What the main function was billed for a request.

    basis         report: a main function on Lambda, whose REPORT line the client has read; measured: everything else
    seconds       the time that is paid for
    invocations, billed_ms, cold_starts    of the REPORT line; 0 without one
    reads         of S3, to load the model for this request
    prices        what it is paid for; None where the request ended before they were known
    device        where everything but the experts was computed; None where nothing was answered
    """

    basis: Basis
    seconds: float
    invocations: int = 0
    billed_ms: int = 0
    cold_starts: int = 0
    reads: int = 0
    prices: MainPrices | None = None
    device: Device | None = None


class Cost(Part):
    """Costs in USD.

    main_usd      busy, idle and fees: its time, the idle part of its share of rented hours, and fee, log and reads of S3
    loading_usd   part of `functions_usd`, of what was billed while the main function was loaded for this request
    """

    main_usd: float
    main_busy_usd: float
    main_idle_usd: float
    main_fees_usd: float
    functions_usd: float
    loading_usd: float
    total_usd: float


class Receipt(Part):
    """Times in seconds and costs in USD of one request.

    answered      whether it was answered to its end
    ttft_s        None where no token came
    tpot_s        mean time of a token after the first; None for an answer of one token
    main_load_s   time to load the main function, if this request waited for it and it is billed; in the cost, in no other time
    invocations, cold_starts, retries, billed_ms   of expert functions
    hedges, fallbacks, starts_ahead   of all functions
    cost          None where the request ended before prices were known
    drafts, draft_tokens, accepted_tokens   passes that tried a draft, the tokens of all drafts, and those that the answer took over
    assistant_drafts, assistant_draft_tokens, assistant_accepted_tokens   those of them that an assistant drafted; others were found in the
                  text
    saved_calls, saved_usd   calls that were not made as their experts were in memory (expert_cache.py), and what they would have cost
    predicted     what the plan predicts for this request, once it is answered (expected_cost.py)
    """

    prompt_tokens: int
    generated_tokens: int
    answered: bool = True
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    main_load_s: float = 0.0
    invocations: int
    cold_starts: int
    retries: int
    unreported: int
    billed_ms: int
    sent_bytes: int
    received_bytes: int
    main: MainLine
    cost: Cost | None
    catalog: str
    functions: tuple[FunctionLine, ...]
    predicted: Outcome | None = None
    hedges: int = Field(default=0, exclude_if=is_zero)
    fallbacks: int = Field(default=0, exclude_if=is_zero)
    starts_ahead: int = Field(default=0, exclude_if=is_zero)
    drafts: int = Field(default=0, exclude_if=is_zero)
    draft_tokens: int = Field(default=0, exclude_if=is_zero)
    saved_calls: int = Field(default=0, exclude_if=is_zero)
    saved_usd: float = Field(default=0.0, exclude_if=is_zero)
    accepted_tokens: int = Field(default=0, exclude_if=is_zero)
    assistant_drafts: int = Field(default=0, exclude_if=is_zero)
    assistant_draft_tokens: int = Field(default=0, exclude_if=is_zero)
    assistant_accepted_tokens: int = Field(default=0, exclude_if=is_zero)


class Loading(Part):
    """How a main function was loaded for a request that pays for it: seconds, and reads of S3."""

    seconds: float = 0.0
    reads: int = 0


NOT_LOADED = Loading()


def make_receipt(answer: Generated, prices: Prices, loading: Loading = NOT_LOADED, calls: Sequence[Invocation] = ()) -> Receipt:
    """Add up an answer's times, invocations and cost.

    `calls` are those of loading the main function for it.

    >>> call = Invocation("f", 100, 100, 0.2, 150.0, billed_ms=200, billed_tries=1, memory_mb=1024, init_ms=None, retries=0)
    >>> answer = Generated((1, 2), (3, 4, 5), "three tokens", "length", token_times_s=(0.5, 0.6, 0.7), invocations=(call,))
    >>> main = MainPrices(rented=False, usd_per_s=2e-5, usd_per_request=0.0, usd_per_read=0.0)
    >>> function = FunctionPrices(
    ...     usd_per_gb_second=2e-5, usd_per_storage_gb_second=0.0, storage_free_mb=512.0, usd_per_call=2e-7, usd_per_read=0.0
    ... )
    >>> receipt = make_receipt(answer, Prices(catalog="example", main=main, function=function))
    >>> receipt.ttft_s, round(receipt.tpot_s, 3), round(receipt.cost.main_usd, 9), round(receipt.cost.functions_usd, 9)
    (0.5, 0.1, 1.4e-05, 4.2e-06)
    """
    prompt_tokens, seconds = len(answer.prompt_token_ids), answer.token_times_s[-1]
    receipt = failed_receipt(prices, seconds, answer.billed, loading, calls, prompt_tokens, answer.paid_s)
    figures = {"generated_tokens": len(answer.token_ids), "answered": True, "ttft_s": answer.ttft_s, "tpot_s": answer.tpot_s}
    names = ("drafts", "draft_tokens", "accepted_tokens", "assistant_drafts", "assistant_draft_tokens", "assistant_accepted_tokens")
    figures |= dict(zip(names, answer.drafted, strict=True))
    figures |= {"saved_calls": answer.saved.calls, "saved_usd": answer.saved.usd}
    return receipt.model_copy(update=figures)


def failed_receipt(
    prices: Prices,
    seconds: float,
    calls: Sequence[Invocation],
    loading: Loading = NOT_LOADED,
    loading_calls: Sequence[Invocation] = (),
    prompt_tokens: int = 0,
    paid_s: float | None = None,
) -> Receipt:
    """Add up what a request cost that was not answered.

    `seconds` passed until it failed. It pays for `paid_s` of the main function's time; None: for all of them.
    """
    every = [*loading_calls, *calls]
    lines = tuple(_line(name, every, loading_calls, prices) for name in sorted({call.function for call in every}))
    busy_s = seconds if paid_s is None else paid_s
    main = MainLine(basis="measured", seconds=busy_s + loading.seconds, reads=loading.reads, prices=prices.main)
    return Receipt(
        prompt_tokens=prompt_tokens,
        generated_tokens=0,
        answered=False,
        ttft_s=None,
        tpot_s=None,
        total_s=seconds,
        main_load_s=loading.seconds,
        invocations=sum(line.invocations for line in lines),
        cold_starts=sum(line.cold_starts for line in lines),
        retries=sum(line.retries for line in lines),
        unreported=sum(line.unreported for line in lines),
        billed_ms=sum(line.billed_ms for line in lines),
        sent_bytes=sum(line.sent_bytes for line in lines),
        received_bytes=sum(line.received_bytes for line in lines),
        main=main,
        cost=_cost(main, sum(line.cost_usd for line in lines), sum(_usd(call, prices) for call in loading_calls)),
        catalog=prices.catalog,
        functions=lines,
        hedges=sum(line.hedges for line in lines),
        fallbacks=sum(line.fallbacks for line in lines),
        starts_ahead=sum(line.starts_ahead for line in lines),
    )


def unpriced_receipt(report: Report, seconds: float) -> Receipt:
    """Make the receipt of a request of which nothing is known but the REPORT line of the main function."""
    figures = ("invocations", "cold_starts", "retries", "unreported", "billed_ms", "sent_bytes", "received_bytes")
    nothing: dict[str, Any] = dict.fromkeys(("prompt_tokens", "generated_tokens", *figures), 0)
    main = MainLine(basis="measured", seconds=seconds)
    empty = Receipt(**nothing, answered=False, ttft_s=None, tpot_s=None, total_s=seconds, main=main, cost=None, catalog="", functions=())
    return with_report(empty, report)


def with_report(receipt: Receipt, report: Report) -> Receipt:
    """Bill the main function by its REPORT line, in place of the time that it measured itself."""
    cold = int(report.init_ms is not None)
    figures = {"basis": "report", "seconds": report.billed_ms / 1000, "billed_ms": report.billed_ms, "invocations": 1, "cold_starts": cold}
    if (prices := receipt.main.prices) and prices.memory_mb:
        figures |= {"prices": model.with_memory(prices, report.memory_mb)}
    main = receipt.main.model_copy(update=figures)
    cost = receipt.cost and _cost(main, receipt.cost.functions_usd, receipt.cost.loading_usd)
    return receipt.model_copy(update={"main": main, "cost": cost})


def _cost(main: MainLine, functions_usd: float, loading_usd: float) -> Cost:
    assert main.prices is not None
    cost = model.main_cost(main.prices, main.seconds, main.reads)
    return Cost(
        main_usd=cost.usd,
        main_busy_usd=cost.busy_usd,
        main_idle_usd=cost.idle_usd,
        main_fees_usd=cost.fees_usd,
        functions_usd=functions_usd,
        loading_usd=loading_usd,
        total_usd=cost.usd + functions_usd,
    )


def _usd(call: Invocation, prices: Prices) -> float:
    storage_mb = prices.storage_mb.get(call.function, 0.0)
    return model.calls_usd(prices.function, call.memory_mb, storage_mb, [call.billed_ms], call.billed_tries, call.reads)


def _line(name: str, every: Sequence[Invocation], loading: Sequence[Invocation], prices: Prices) -> FunctionLine:
    calls = [call for call in every if call.function == name]
    return FunctionLine(
        name=name,
        memory_mb=max(c.memory_mb for c in calls),
        invocations=sum(c.billed_tries for c in calls),
        cold_starts=sum(c.cold_tries for c in calls),
        retries=sum(c.retries for c in calls),
        unreported=sum(c.unreported for c in calls),
        billed_ms=sum(c.billed_ms for c in calls),
        loading_ms=sum(c.billed_ms for c in loading if c.function == name),
        reads=sum(c.reads for c in calls),
        cost_usd=sum(_usd(c, prices) for c in calls),
        sent_bytes=sum(c.request_bytes for c in calls),
        received_bytes=sum(c.response_bytes for c in calls),
        hedges=sum(c.hedges for c in calls),
        fallbacks=sum(c.fallbacks for c in calls),
        starts_ahead=sum(c.starts_ahead for c in calls),
    )


def attach(error: Exception, receipt: Receipt) -> None:
    """Let an error carry the receipt of the request that failed with it."""
    cast("Any", error).receipt = receipt


def receipt_of(error: Exception) -> Receipt | None:
    """Return the receipt that an error carries, if any."""
    return getattr(error, "receipt", None)
