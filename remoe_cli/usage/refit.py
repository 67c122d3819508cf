"""Fit the times of calls to what served requests told (runtime/observed.py).

The result is a profile with these times. Three things are fitted: what a warm call takes besides computing, and the rate of its payload;
what computing takes in a function, as a factor on the profile's curve; and what a cold start takes. Where served requests tell too little
about one of them, the profile's time stays, and a remark says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from remoe_cli.errors import DeployError, UsageError
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost.expert_functions import function_vcpus
from remoe_cli.plan.document import Plan
from remoe_cli.profile.latency_record import ColdStart, Curve, InvocationTiming, Timing
from remoe_cli.profile.record import Profile, refuse_foreign, write_profile
from remoe_cli.runtime.calibrate import quantiles, rate, with_answers
from remoe_cli.runtime.invoke import Sample
from remoe_cli.runtime.observed import Observed

LEAST_CALLS, LEAST_COLD = 20, 3
_LEAST_OF_A_SIZE = 5  # calls of one size of payload
_WIDEST = 64.0  # times the profile's computing, and its inverse: beyond it the figures are of something else
_KEPT = 2000  # samples in the new profile
_ANSWERS = 500  # that are compared token by token


@dataclass(frozen=True)
class Refit:
    """A profile with fitted times, and what they come from.

    calls, cold_starts   that served requests told of
    computing            how many times as long as in the old profile an expert takes in a function
    remarks              what could not be fitted, in whole sentences
    """

    profile: Profile
    calls: int
    cold_starts: int
    computing: float
    remarks: tuple[str, ...]


def refuse_old(out: Path, profile: Path) -> None:
    """Refuse to write the new profile where it cannot be, or over the one that it is made from."""
    if out.resolve() == profile.resolve():
        raise UsageError(f"{out} is the profile of the deployed plan, which is not written over.", "Give a new folder with -o.")
    refuse_foreign(out)


def refuse_all_local(name: str, plan: Plan) -> None:
    """Refuse a deployment whose plan has no expert function, and so no call.

    Raises: DeployError.
    """
    if not any(layer.remote for layer in plan.layers):
        raise DeployError(
            f"The deployment '{name}' has no expert functions whose calls could be fitted: its plan keeps every expert local.",
            "Deploy a plan with remote experts, for example one made with --remote-share 0.25.",
        )


def refit(name: str, profile: Profile, plan: Plan, catalog: Catalog, observed: Sequence[Observed], out: Path) -> Refit:
    """Write a copy of the profile with the times of calls that served requests told.

    Raises: DeployError where they told of too few warm calls or there are no functions, UsageError where the copy cannot be written.
    """
    refuse_old(out, profile.path)
    refuse_all_local(name, plan)
    tokens = [[token for token in each.tokens if token[1]] for each in observed]
    alone = [call for each in tokens for _, calls in each for call in calls]
    shared = [call for each in observed for call in each.shared]
    warm = [*alone, *shared, *(call for each in observed for call in each.first)]
    if len(warm) < LEAST_CALLS:
        raise DeployError(
            f"The receipts of '{name}' tell of {len(warm)} warm calls of expert functions, and {LEAST_CALLS} are needed.",
            "Ask the deployment more, or measure it with 'remoe profile measure'.",
        )
    remarks: list[str] = []
    latency = profile.record.latency
    bytes_per_s = _bytes_per_s(warm)
    if bytes_per_s is None:
        old = latency.invocation
        bytes_per_s = old.bytes_per_s if old else catalog.function.network_bytes_per_s
        remarks.append("All payloads had nearly one size, so the rate of the network is as it was.")
    small = alone or _smallest(shared) or _smallest(warm)
    if not alone:
        remarks.append("No token was made alone, so what a token takes longer for each call, besides the call itself, is not counted.")
    if not alone and not shared:
        most_bytes = max(size for size, *_ in small)
        remarks.append(f"Only prompts had calls, so what a call takes is that of their smallest calls, of up to {most_bytes:,} bytes.")
    _, elapsed_s, duration_s, compute_s = np.array(small).T
    invocation = InvocationTiming(
        target=name,
        measured_on=date.today().isoformat(),
        unbilled_s=quantiles(elapsed_s - duration_s),
        billed_s=quantiles(duration_s - compute_s),
        bytes_per_s=bytes_per_s,
        samples=tuple(warm[:: -(-len(warm) // _KEPT)]),
    )
    cold = [call for each in observed for call in each.cold]
    if len(cold) >= LEAST_COLD:
        cold_start: ColdStart | None = _cold_start(cold, latency.cold_start)
    else:
        cold_start = latency.cold_start
        remarks.append(f"{len(cold)} calls started an instance, which is too few, so the time of a cold start is as it was.")
    computed = [each for one in observed for each in one.computing]
    forms: dict[str, Timing | None] = {name: getattr(latency, name) for name in ("remote_expert", "packed_expert", "unquantised_expert")}
    used = "packed_expert" if plan.model.packed and latency.packed_expert is not None else "remote_expert"
    forms[used], factor = _computing(getattr(latency, used), catalog, computed)
    for name, timing in forms.items():  # nobody has served the other forms: they change as this one does
        if name != used and timing is not None and factor != 1:
            forms[name] = timing.model_copy(update={"curve": _scaled(timing.curve, factor), "points": (), "residuals": ()})
    latency = latency.model_copy(update={"invocation": invocation, "cold_start": cold_start, **forms})
    fitted = replace(profile, record=profile.record.model_copy(update={"latency": latency}))
    answers = [{"calls": each} for each in tokens[:: max(1, -(-len(tokens) // _ANSWERS))] if each]
    written = with_answers(fitted, out, plan, catalog, answers) if answers else write_profile(out, fitted.record, fitted.arrays)
    return Refit(written, len(warm), len(cold), factor, tuple(remarks))


def _sizes(calls: Sequence[Sample]) -> list[list[Sample]]:
    """Group calls by the size of their payload, the smallest first. Sizes of few calls are left out."""
    groups: dict[int, list[Sample]] = {}
    for call in calls:
        groups.setdefault(call[0].bit_length(), []).append(call)
    return [groups[size] for size in sorted(groups) if len(groups[size]) >= _LEAST_OF_A_SIZE]


def _smallest(calls: Sequence[Sample]) -> Sequence[Sample]:
    """Return the calls of the smallest payloads, whose time the profile counts by their bytes."""
    return next(iter(_sizes(calls)), calls)


def _bytes_per_s(calls: Sequence[Sample]) -> float | None:
    """Fit the rate of the network over payloads of different sizes; None where there is one size only."""
    sizes = _sizes(calls)
    return rate(sizes) if len(sizes) > 1 and sizes[-1][0][0] >= 4 * sizes[0][0][0] else None


def _cold_start(calls: Sequence[tuple[float, float, float]], old: ColdStart | None) -> ColdStart:
    """Summarise cold starts: the steps within the start and within the function are divided as they were, where that is known."""
    total_s, init_s, duration_s = (statistics.median(each) for each in zip(*calls, strict=True))
    steps = (old.process_s, old.imports_s, old.weights_s, old.first_result_s) if old else (0.0, 1.0, 1.0, 0.0)
    start, inside = steps[0] + steps[1] or 1.0, steps[2] + steps[3] or 1.0
    return ColdStart(
        starts=len(calls),
        process_s=init_s * steps[0] / start,
        imports_s=init_s * steps[1] / start,
        weights_s=duration_s * steps[2] / inside,
        first_result_s=duration_s * steps[3] / inside,
        total_s=total_s,
        waits_s=tuple(sorted(wait_s for wait_s, _, _ in calls[-_KEPT:])),
    )


def _computing(timing: Timing, catalog: Catalog, calls: Sequence[tuple[int, int, int, float]]) -> tuple[Timing, float]:
    """Fit the time of an expert in a function: the factor on the curve at which half of the calls take longer, and half shorter.

    A CPU quota makes waiting depend on the whole work of a call, so the factor is looked for, and not divided out.
    """
    if len(calls) < LEAST_CALLS:
        return timing, 1.0
    experts, rows, memory_mb, seconds = np.array(calls, dtype=np.float64).T
    vcpus = function_vcpus(catalog.function, memory_mb)
    work_s = experts * timing.work_s(rows / experts, vcpus)

    def ratios(factor: float) -> Any:
        return timing.elapsed_s(work_s * factor, vcpus) / np.maximum(seconds, 1e-7)

    low, high = 1 / _WIDEST, _WIDEST
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if np.median(ratios(middle)) > 1 else (middle, high)
    error = float(np.median(np.abs(ratios(low) - 1)))
    update: dict[str, Any] = {"curve": _scaled(timing.curve, low), "held_out_error": error, "errors": {}, "points": (), "residuals": ()}
    return timing.model_copy(update=update), low


def _scaled(curve: Curve, factor: float) -> Curve:
    """Multiply the work of a curve. The period of a CPU quota is the system's, and stays."""
    fields = type(curve).model_fields
    times = {name: getattr(curve, name) * factor for name in fields if name.endswith("_s") and name != "period_s"}
    return curve.model_copy(update=times)
