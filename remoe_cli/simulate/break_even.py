"""Up to how many requests an hour a plan is cheaper than what is always on, by their burstiness.

The plan and its alternatives that are rented by the hour meet the same requests in `run`, at several traffics. Between the two traffics
where the cheaper one changes, a tenth of a decade apart, the line is straight in logarithms. With more traffic, what is rented gets
instances as the mean needs them, the plan's main function too where it is rented.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import MainKind, Plan
from remoe_cli.plan.problem.problem import Problem
from remoe_cli.plan.problem.request import problem_of
from remoe_cli.profile.record import Profile
from remoe_cli.progress import Report, no_report
from remoe_cli.simulate.requests import Source, drawn, own_burstiness
from remoe_cli.simulate.run import Run, run
from remoe_cli.simulate.service import Service
from remoe_cli.simulate.summary import Figure
from remoe_cli.simulate.ways import at_traffic, other_ways, own_way, placed, with_instances

BURSTINESS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEAST_PER_HOUR, MOST_PER_HOUR = 0.1, 1e5
MOST_REFUSED = 0.01  # share of the requests that a way may leave without an answer to be compared
_PER_DECADE, _COUNT, _SEEDS = 10, 2000, 3
_LAST = round(_PER_DECADE * math.log10(MOST_PER_HOUR / LEAST_PER_HOUR))


@dataclass(frozen=True)
class BreakEvenBursts:
    """Where a plan and what is always on cost the same, for requests of one burstiness.

    burstiness    coefficient of variation of the times between requests
    own           whether these are the times of a trace, not drawn anew
    per_hour      requests an hour up to which the plan is cheaper, over the seeds; LEAST_PER_HOUR and MOST_PER_HOUR are the ends of what
                  is looked at, so the plan is never or always the cheaper one between them
    refused       share of the requests that the plan leaves without an answer there; above MOST_REFUSED it is never the cheaper one
    ttft_s        (p50, p99) of the plan there
    against       what is always on and costs the same there; None where nothing does that answers
    against_ttft_s    the same of that
    """

    burstiness: float
    own: bool
    per_hour: Figure
    refused: float
    ttft_s: tuple[float, float]
    against: str | None
    against_ttft_s: tuple[float, float]


@dataclass(frozen=True)
class _Compared:
    """A plan beside the cheapest always-on way; `extra` is the logarithm of its cost by the other's."""

    extra: float
    own: Run
    against: Service | None
    other: Run | None


def break_even_bursts(inputs: tuple[Plan, Profile, Catalog], source: Source, report: Report = no_report) -> tuple[BreakEvenBursts, ...]:
    """Find the break-even traffic of each burstiness, and of a trace's own times.

    Empty where the plan has nothing serverless, or nothing else is always on.
    """
    asked: list[float | None] = [*BURSTINESS, *(() if source.gaps_s is None else (None,))]
    at, guess = _compared_at(inputs, source), _first_guess(inputs[0], source)
    if at is None:
        return ()
    found = []
    for done, burstiness in enumerate(asked):
        report(done, len(asked))
        one = _at_burstiness(at, replace(source, burstiness=burstiness), guess)
        if burstiness is not None:
            guess = _step_of(one.per_hour.mean)
        found.append(one)
    report(len(asked), len(asked))
    return tuple(found)


def break_even(inputs: tuple[Plan, Profile, Catalog], source: Source) -> BreakEvenBursts | None:
    """Find the break-even traffic of requests as these come; None as in `break_even_bursts`."""
    at = _compared_at(inputs, source)
    return None if at is None else _at_burstiness(at, source, _first_guess(inputs[0], source))


def _first_guess(plan: Plan, source: Source) -> int:
    return _step_of(plan.break_even_traffic.requests_per_hour if plan.break_even_traffic else source.per_hour)


def _compared_at(inputs: tuple[Plan, Profile, Catalog], source: Source) -> Callable[[int], list[Service]] | None:
    """Give what is compared at each traffic; None where the plan has nothing serverless, or nothing else is always on."""
    plan, problem = inputs[0], problem_of(*inputs)
    if plan.main.kind is MainKind.ALWAYS_ON and not any(layer.remote for layer in plan.layers):
        return None
    at = _services_at(problem, plan, source)
    return None if len(at(0)) == 1 else at


def _services_at(problem: Problem, plan: Plan, source: Source) -> Callable[[int], list[Service]]:
    """Remember the plan, and what else is always on, at each traffic."""

    @cache
    def own(instances: int) -> Service:
        return own_way(problem, plan, replace(placed(plan), instances=instances), source)

    @cache
    def at(step: int) -> list[Service]:
        busy = at_traffic(problem, _per_hour(step))
        rented = (one for one in other_ways(busy, plan, source) if one.instances is not None)
        return [own(with_instances(busy, placed(plan)).instances), *rented]

    return at


def _at_burstiness(at: Callable[[int], list[Service]], source: Source, guess: int) -> BreakEvenBursts:
    steps, runs = list[float](), list[_Compared]()
    for seed in range(_SEEDS):
        step, there = _of_seed(at, source, seed, round(steps[-1]) if steps else guess)
        steps.append(step)
        runs.append(there)
    against, other = runs[0].against, runs[0].other
    return BreakEvenBursts(
        burstiness=(own_burstiness(source) or 0.0) if source.burstiness is None else source.burstiness,
        own=source.burstiness is None,
        per_hour=Figure(*(_per_hour(step) for step in (float(np.mean(steps)), min(steps), max(steps)))),
        refused=float(runs[0].own.refused.mean()),
        ttft_s=_times_s(runs[0].own),
        against=None if against is None else f"{against.name}, {against.spec}",
        against_ttft_s=(math.nan, math.nan) if other is None else _times_s(other),
    )


def _of_seed(at: Callable[[int], list[Service]], source: Source, seed: int, guess: int) -> tuple[float, _Compared]:
    """Find the step of the traffic at which both cost the same, and what requests meet next to it."""

    @cache
    def compared(step: int) -> _Compared:
        return _compared(at(step), replace(source, per_hour=_per_hour(step)), seed)

    step = _crossing(lambda at: compared(at).extra, guess)
    return step, compared(math.ceil(step))


def _compared(services: list[Service], source: Source, seed: int) -> _Compared:
    arrivals = drawn(source, _COUNT, seed)
    own, *rest = (run(service, arrivals, seed) for service in services)
    able = [(other, service) for other, service in zip(rest, services[1:], strict=True) if _answers(other)]
    if not able:
        return _Compared(-math.inf if _answers(own) else math.inf, own, None, None)
    other, against = min(able, key=lambda pair: pair[0].usd)
    return _Compared(math.log(own.usd / other.usd) if _answers(own) else math.inf, own, against, other)


def _answers(one: Run) -> bool:
    return float(one.refused.mean()) <= MOST_REFUSED


def _crossing(extra: Callable[[int], float], guess: int) -> float:
    """Find the step from which on `extra` is no longer below 0, beginning at a guess; else an end."""
    low = high = guess
    width = 1
    while extra(high) < 0:
        if high == _LAST:
            return high
        low, high, width = high, min(_LAST, high + width), 2 * width
    while extra(low) >= 0:
        if low == 0:
            return low
        low, high, width = max(0, low - width), low, 2 * width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if extra(middle) < 0 else (low, middle)
    least, most = extra(low), extra(high)
    return low + (-least / (most - least) if math.isfinite(least) and math.isfinite(most) else 0.5)


def _times_s(one: Run) -> tuple[float, float]:
    answered = one.ttft_s[~np.isnan(one.ttft_s)]
    median, late = np.percentile(answered, (50, 99)).tolist() if len(answered) else (math.nan, math.nan)
    return median, late


def _per_hour(step: float) -> float:
    return float(LEAST_PER_HOUR * 10 ** (step / _PER_DECADE))


def _step_of(per_hour: float) -> int:
    return min(_LAST, max(0, round(_PER_DECADE * math.log10(max(per_hour, LEAST_PER_HOUR) / LEAST_PER_HOUR))))
