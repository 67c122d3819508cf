"""Add up the receipts of a deployment: by day, by user, or by function. Pure.

What functions were billed is what their REPORT lines say, so the sums are those of Lambda's meter. The time of a main function that is
rented is priced by the hour: each request pays the time that it took, and the rest is idle time. (A receipt itself shares out the hours of
the plan's traffic instead, as it cannot know how many requests come.)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from math import fsum

from remoe_cli.artifacts import Part
from remoe_cli.plan.cost.prices import MainPrices
from remoe_cli.plan.wording import HOURS_PER_MONTH
from remoe_cli.runtime.kept import KeptReceipt
from remoe_cli.runtime.receipt import FunctionLine
from remoe_cli.usage.by import By

MAIN = "main function"
_GB_MB = 1024
_OPEN_GAPS = 1000  # idle times of which a request may still have paid a part: more than are answered at once


class CostRow(Part):
    """The sums of some requests.

    of              a day (UTC), a user, or a function; "" for requests without a user
    requests        that took part in it: answered, failed and cancelled ones, and not the loading of a main server
    billed_ms       of expert functions; `gb_seconds` too
    main_s          of the main function, loading included
    unpriced        requests whose prices were not known when they ended
    idle_s, idle_usd   of rented main functions, between requests; of all instances together
    """

    of: str
    requests: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    invocations: int = 0
    cold_starts: int = 0
    retries: int = 0
    unreported: int = 0
    unpriced: int = 0
    billed_ms: int = 0
    gb_seconds: float = 0.0
    functions_usd: float = 0.0
    main_s: float = 0.0
    main_usd: float = 0.0
    idle_s: float = 0.0
    idle_usd: float = 0.0

    @property
    def usd(self) -> float:
        """Everything that the row costs."""
        return self.functions_usd + self.main_usd + self.idle_usd


class Stored(Part):
    """What is kept in storage: the weights of the expert functions."""

    stored_bytes: int
    usd_per_gb_month: float


@dataclass(frozen=True)
class Standing:
    """What of a deployment costs money by existing, until `until`.

    instances   of a rented main function
    """

    until: datetime
    instances: int = 1
    stored: Stored | None = None


class CostReport(Part):
    """The sums of a period.

    begin, end    of the period; None where nothing was kept
    rows          by what was asked for
    total         of all requests, with idle time
    loading_ms    part of `total.billed_ms` that was billed while main servers were loaded
    loading_usd   part of the total's cost: of that, and of the main servers meanwhile
    storage_usd   None where the deployment does not stand any more, so that nobody knows what it stored
    usd           of everything
    """

    begin: datetime | None
    end: datetime | None
    by: By
    rows: tuple[CostRow, ...]
    total: CostRow
    loading_ms: int
    loading_usd: float
    storage_usd: float | None
    usd: float


def report(kept: Iterable[KeptReceipt], by: By, since: datetime | None = None, standing: Standing | None = None) -> CostReport:
    """Add up the receipts that ended since then, in the order in which they were kept.

    Receipts before that tell since when a rented main function has been idle. `standing` is None for a deployment that is gone: then the
    period ends with its last receipt.
    """
    rows: dict[str, Counter[str]] = {}
    total, loading, idle = Counter[str](), Counter[str](), _Idle(since, standing.instances if standing else 1)
    first: datetime | None = None
    last: datetime | None = None

    def count_idle(spans: Iterable[tuple[str, float, float]]) -> None:
        for day, seconds, usd in spans:
            figures = {"idle_s": seconds, "idle_usd": usd}
            total.update(figures)
            if by is not By.user:
                rows.setdefault(day if by is By.day else MAIN, Counter()).update(figures)

    for line in kept:
        count_idle(idle.until(line))
        if since is not None and line.ended < since:
            continue
        total.update(figures := _figures(line))
        if line.kind == "loading":
            loading.update(figures)
        for of, part in _parts(line, by, figures):
            rows.setdefault(of, Counter()).update(part)
        took_s = max(line.receipt.total_s, line.receipt.main.seconds)  # the second is less where others were answered meanwhile
        begun = line.ended - timedelta(seconds=took_s)
        first, last = min(first or begun, begun), max(last or line.ended, line.ended)
    count_idle(idle.until_now(standing.until if standing else None))
    begin = max(first, since or first) if first else None
    end = standing.until if standing and last else last
    storage_usd = None
    if standing and standing.stored and begin and end:
        months = (end - begin).total_seconds() / 3600 / HOURS_PER_MONTH
        storage_usd = standing.stored.stored_bytes / 2**30 * standing.stored.usd_per_gb_month * months
    whole = _row("", total)
    return CostReport(
        begin=begin,
        end=end,
        by=by,
        rows=tuple(_row(of, rows[of]) for of in sorted(rows)),
        total=whole,
        loading_ms=loading["billed_ms"],
        loading_usd=_row("", loading).usd,
        storage_usd=storage_usd,
        usd=whole.usd + (storage_usd or 0.0),
    )


def _row(of: str, figures: Mapping[str, float]) -> CostRow:
    return CostRow.model_validate({"of": of, **figures})


def _parts(line: KeptReceipt, by: By, whole: Mapping[str, float]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield the parts of a receipt that belong to rows, with their figures; `whole` are those of all."""
    match by:
        case By.day:
            yield line.ended.astimezone(UTC).date().isoformat(), whole
        case By.user:
            yield line.user or "", whole
        case By.function:
            of_main = ("requests", "answered", "failed", "cancelled", "prompt_tokens", "generated_tokens", "main_s", "main_usd", "unpriced")
            yield MAIN, {name: whole[name] for name in of_main if name in whole}
            for function in line.receipt.functions:
                yield function.name, _of_functions([function]) | {"requests": int(line.kind != "loading")}


def _figures(line: KeptReceipt) -> dict[str, float]:
    receipt, is_request = line.receipt, line.kind != "loading"
    figures: dict[str, float] = _of_functions(receipt.functions) | {"main_s": receipt.main.seconds, "main_usd": _main_usd(line)}
    figures["unpriced"] = int(receipt.main.prices is None)
    if is_request:
        figures |= {"requests": 1, line.kind: 1}
        figures |= {"prompt_tokens": receipt.prompt_tokens, "generated_tokens": receipt.generated_tokens}
    return figures


def _of_functions(lines: Sequence[FunctionLine]) -> dict[str, float]:
    counted = ("invocations", "cold_starts", "retries", "unreported", "billed_ms")
    sums: dict[str, float] = {name: sum(getattr(line, name) for line in lines) for name in counted}
    sums["gb_seconds"] = fsum(line.memory_mb / _GB_MB * line.billed_ms / 1000 for line in lines)
    return sums | {"functions_usd": fsum(line.cost_usd for line in lines)}


def _main_usd(line: KeptReceipt) -> float:
    """Price the time of the main function, its fee, and what it read to load the model.

    Its loading is billed too, as Lambda does since August 2025, but it is no invocation.
    """
    main = line.receipt.main
    if (prices := main.prices) is None:
        return 0.0
    fee_usd = 0.0 if line.kind == "loading" else prices.usd_per_request
    return prices.usd_per_s * main.seconds + prices.usd_per_read * main.reads + fee_usd


Span = tuple[str, float, float]  # a day, seconds of it, and their USD


@dataclass(frozen=True)
class _Gap:
    """A time in which rented main functions were idle, as far as is known."""

    begin: datetime
    end: datetime
    prices: MainPrices


@dataclass
class _Idle:
    """The idle times of rented main functions, from one receipt to the next.

    It is the time between two receipts that the later one does not pay. Requests that are answered together end one after the other, and
    each pays a part: so the first of them leaves too much, and what the others pay is taken off again.

    Before a main server was loaded nobody knows whether there was one, so that is no idle time.
    """

    since: datetime | None
    instances: int
    _end: datetime | None = None
    _prices: MainPrices | None = None
    _gaps: deque[_Gap] = field(default_factory=deque)

    def until(self, line: KeptReceipt) -> Iterator[Span]:
        """Count the idle time before a request; yield that which no later request can have paid, by day."""
        main, end = line.receipt.main, line.ended if self._end is None else max(self._end, line.ended)
        if line.kind != "loading":
            self._pay(end, main.seconds / self.instances)
        self._end, self._prices = end, main.prices or self._prices
        while len(self._gaps) > _OPEN_GAPS:
            yield from self._spans(self._gaps.popleft())

    def until_now(self, now: datetime | None) -> Iterator[Span]:
        """Yield the other idle times by day: with `now`, also that after the last request."""
        if now is not None:
            self._pay(now, 0.0)
        while self._gaps:
            yield from self._spans(self._gaps.popleft())

    def _pay(self, end: datetime, seconds: float) -> None:
        """Note the time up to `end`, of which the last `seconds` are paid.

        Where more is paid than has passed, the rest was paid of gaps before. What was paid before all gaps is no time that was counted.
        """
        if self._end is None or self._prices is None or not self._prices.rented:
            return
        free = end - self._end - timedelta(seconds=seconds)
        if free > timedelta():
            self._gaps.append(_Gap(self._end, self._end + free, self._prices))
        while free < timedelta() and self._gaps:
            last = self._gaps.pop()
            free += last.end - last.begin
            if free > timedelta():
                self._gaps.append(replace(last, end=last.begin + free))

    def _spans(self, gap: _Gap) -> Iterator[Span]:
        begin, end, prices = gap.begin, gap.end, gap.prices
        if prices.idle_s is not None:  # then the instance was given back
            end = min(end, begin + timedelta(seconds=prices.idle_s))
        begin, end = max(begin, self.since or begin).astimezone(UTC), end.astimezone(UTC)
        while begin < end:
            midnight = datetime(begin.year, begin.month, begin.day, tzinfo=UTC) + timedelta(days=1)
            seconds = (min(end, midnight) - begin).total_seconds()
            yield begin.date().isoformat(), seconds * self.instances, seconds * prices.usd_per_s * self.instances
            begin = min(end, midnight)
