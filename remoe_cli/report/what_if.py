"""The planner's formulas for one placement as a table, which a page evaluates for other settings.

A page has no planner. What a placement costs is a sum of few kinds of terms in the price of expert functions, the overhead of a call and
the traffic. terms.py works the numbers of these terms out with the planner's own functions, and `evaluate` adds the terms up. page.js
does the same sums over the same numbers.

- A wait is a constant and the sum of weight * max(0, overhead - slack): a layer ends with its slower side, and slack is what the main
  function's own experts take longer than the rest of the call.
- A bill is the sum of weight * (overhead inside the function + work), each rounded up to the billing granularity.
- A machine costs its seconds, its hours divided by the requests, or the hours in which it is up.
- Cold starts are a share of the requests, which depends on the traffic.
- Requests that are served at once share a machine's time and its decode steps, but not what cold starts add. Each number of them has a
  table of its own, as other experts meet in a step.
- With draft tokens, an answer has fewer decode steps than tokens.

Source: method.md, sections 3, 4, 10, 11 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from remoe_cli.artifacts import Part
from remoe_cli.plan.document import MainKind

THIS_PLAN = "this plan"


class Wait(Part):
    """A time that depends on the overhead of a call.

    It is constant_s and, for each term (weight, slack_s), weight * max(0, overhead - slack_s).
    """

    constant_s: float
    terms: tuple[tuple[float, float], ...]


class Bill(Part):
    """What the calls of expert functions cost in a request.

    terms        (USD a second, seconds inside) of calls; a weight of calls is in the USD
    calls        how many there are
    cold_usd     the starts of all instances, if all are cold, at the price of functions
    reads_usd    what these starts read from S3, which has a price of its own
    """

    terms: tuple[tuple[float, float], ...]
    calls: float
    cold_usd: float
    reads_usd: float


class Machine(Part):
    """A main function, or what a baseline runs on.

    ttft_s, tpot_s   of a warm request; None for the plan's own main function, whose times depend on calls
    start_s          what a request waits that finds it cold, and is billed for where it is paid by use
    reads_usd        what a start reads from S3
    at_once          requests that each instance serves at once; they share its time
    """

    title: str
    spec: str
    kind: MainKind
    ideal: bool = False
    ttft_s: float | None = None
    tpot_s: float | None = None
    usd_per_s: float
    usd_per_hour: float
    fee_usd: float
    reads_usd: float
    start_s: float
    at_once: int = 1


class Table(Part):
    """Everything that `evaluate` needs.

    concurrency    requests at once that the table is for; a main function that is paid by use may serve fewer (`Machine.at_once`)
    overhead_s     of a warm call (t_rem), as planned
    billed_s       part of it inside the function, as equally likely values
    call_usd       fee of a call at the price of functions; log_usd is what is logged of it, which has a price of its own
    per_hour       the plan's traffic; None where it is unknown
    cold_share     the plan's; `cold_after_s` is the idle time after which instances are gone, None where the share does not follow from
                   the traffic alone
    waking         (share that wakes an instance, share of the time that it is up) of the plan; `wake` is (idle_s, wake_s), from which both
                   follow; None likewise
    ttft           what a mean warm prompt takes by itself
    step           a decode step of all requests that are served at once
    passes         decode steps for a token of an answer; 1 without drafts
    functions_wait_s   what a request waits beside a main function that is up if all functions are cold
    unquantised    the same for the best known plan of a copy that is not quantised, beside that of a quantised checkpoint
    others         the same for other numbers of requests at once
    most           for people: why no larger number of them is in `others`
    """

    concurrency: int = 1
    n_out: float
    overhead_s: float
    billed_s: tuple[float, ...]
    granule_s: float
    call_usd: float
    log_usd: float
    per_hour: float | None
    cold_share: float
    cold_after_s: float | None
    waking: tuple[float, float] | None
    wake: tuple[float, float] | None
    ttft: Wait
    step: Wait
    passes: float = 1.0
    bill: Bill
    functions_wait_s: float
    main: Machine
    baselines: tuple[Machine, ...] = ()
    unquantised: Table | None = None
    others: tuple[Table, ...] = ()
    most: str = ""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of requests at once that there are tables for, ascending."""
        return tuple(sorted(one.concurrency for one in (self, *self.others)))

    def at(self, concurrency: int | None) -> Table:
        """Look up the table for so many requests at once; None: as many as the plan is for."""
        return self if concurrency is None else next(one for one in (self, *self.others) if one.concurrency == concurrency)


class Setting(Part):
    """What the sliders say.

    They are factors on the price of functions and on the overhead of a call, requests an hour (None: unknown), and requests at once (None:
    as many as the plan is for).
    """

    price: float = 1.0
    overhead: float = 1.0
    per_hour: float | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class Figures:
    """What one way to run the model costs and takes. Costs are in USD a request; None has no price.

    busy_usd, idle_usd   the main function's time, and its rented hours without work
    functions_usd        expert functions
    fees_usd             fees and reads of S3
    """

    ttft_s: float
    tpot_s: float
    instances: int
    busy_usd: float | None
    idle_usd: float
    functions_usd: float
    fees_usd: float

    @property
    def usd(self) -> float | None:
        """The whole cost."""
        return None if self.busy_usd is None else self.busy_usd + self.idle_usd + self.functions_usd + self.fees_usd


def evaluate(table: Table, setting: Setting) -> Mapping[str, Figures]:
    """Add up what the plan and all that is beside it cost and take at a setting, by title.

    What cannot serve so many requests at once is left out.
    """
    table = table.at(setting.concurrency)
    overhead_s = table.overhead_s * setting.overhead
    cold, waking = _cold_share(table, setting.per_hour), _waking(table, setting.per_hour)
    plan_cold = _machine_cold(table.main.kind, cold, waking)
    late = max(0.0, cold - plan_cold) if table.main.kind != MainKind.BY_USE else 0.0
    prompt_s, step_s, others = _wait_s(table.ttft, overhead_s), _wait_s(table.step, overhead_s), table.main.at_once - 1
    # A step of the others goes before a prompt, and their prompts go between the steps.
    ttft_s = prompt_s + (step_s if others else 0.0)
    tpot_s = table.passes * step_s + others * prompt_s / max(table.n_out, 1.0)
    functions_usd = setting.price * (_billed_usd(table, setting.overhead) + table.bill.calls * table.call_usd + cold * table.bill.cold_usd)
    functions_usd += table.bill.calls * table.log_usd + cold * table.bill.reads_usd
    late_s = late * table.functions_wait_s
    found = {table.main.title: _priced(table, table.main, setting, ttft_s, late_s, tpot_s, functions_usd, cold, waking)}
    found |= evaluate(table.unquantised, setting.model_copy(update={"concurrency": None})) if table.unquantised is not None else {}
    for machine in table.baselines:
        found[machine.title] = _priced(table, machine, setting, machine.ttft_s or 0.0, 0.0, machine.tpot_s or 0.0, 0.0, cold, waking)
    return found


def _priced(
    table: Table,
    machine: Machine,
    setting: Setting,
    warm_s: float,
    late_s: float,
    tpot_s: float,
    functions_usd: float,
    cold: float,
    waking: tuple[float, float],
) -> Figures:
    own_cold = _machine_cold(machine.kind, cold, waking)
    cold_s = own_cold * machine.start_s + late_s
    own_s = (warm_s + table.n_out * tpot_s) / machine.at_once + cold_s
    fees_usd = machine.fee_usd + own_cold * machine.reads_usd
    busy_usd: float | None = machine.usd_per_s * own_s
    idle_usd, instances = 0.0, 1
    if machine.kind != MainKind.BY_USE:
        if setting.per_hour is None:
            busy_usd = None
        else:
            instances = max(1, math.ceil(own_s * setting.per_hour / 3600 - 1e-9))
            up = waking[1] if machine.kind == MainKind.TO_ZERO else 1.0
            share_usd = up * instances * machine.usd_per_hour / setting.per_hour
            busy_usd = min(busy_usd or 0.0, share_usd)
            idle_usd = share_usd - busy_usd
    return Figures(warm_s + cold_s, tpot_s, instances, busy_usd, idle_usd, functions_usd, fees_usd)


def _machine_cold(kind: MainKind, cold: float, waking: tuple[float, float]) -> float:
    return cold if kind == MainKind.BY_USE else waking[0] if kind == MainKind.TO_ZERO else 0.0


def _cold_share(table: Table, per_hour: float | None) -> float:
    if table.cold_after_s is None or per_hour is None:
        return table.cold_share
    return math.exp(-per_hour * table.cold_after_s / 3600)


def _waking(table: Table, per_hour: float | None) -> tuple[float, float]:
    if table.wake is None or per_hour is None:
        return table.waking or (0.0, 1.0)
    idle_s, wake_s = table.wake
    after = math.exp(-per_hour * idle_s / 3600)
    woken = after / (1 + per_hour / 3600 * after * wake_s)
    return woken, 1 - woken


def _wait_s(wait: Wait, overhead_s: float) -> float:
    return wait.constant_s + sum(weight * max(0.0, overhead_s - slack_s) for weight, slack_s in wait.terms)


def _billed_usd(table: Table, factor: float) -> float:
    granule_s, usd = table.granule_s, 0.0
    for weight, inside_s in table.bill.terms:
        billed_s = sum(math.ceil((factor * own_s + inside_s) / granule_s - 1e-6) for own_s in table.billed_s) * granule_s
        usd += weight * billed_s / len(table.billed_s)
    return usd
