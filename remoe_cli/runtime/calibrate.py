"""Measure a deployment through its own expert functions.

It measures warm invocations, cold starts, and invocations while prompts are answered.

The calls are those of serving: `invoke` from a thread like the dispatcher's, with batches that the functions can compute. The functions
say themselves which experts they hold. This module does not know where functions run; the caller passes in how a cold start is forced.
Calls are spaced like those of decoding, so that a function's CPU quota is full again when the next call comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from remoe_cli.errors import DeployError, InvokeError
from remoe_cli.function.codec import STORAGE, Batch, pack, unpack
from remoe_cli.function.expert_ffn import narrow
from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.cost import main_function
from remoe_cli.plan.document import Plan
from remoe_cli.plan.problem.request import PlanRequest, make_problem
from remoe_cli.profile.latency_record import ColdStart, InvocationTiming, Quantiles
from remoe_cli.profile.record import Profile, write_profile
from remoe_cli.runtime.invoke import Invocation, Sample, health, invoke

_FUNCTIONS = 8  # measured in turn: more would not tell more
_ROWS = (1, 32, 256)
_LARGEST_BYTES = 4_000_000  # of hidden states: in base64 below Lambda's payload limit
_WARM_S, _ROUNDS = 4.0, 120
_TOKENS = 200  # of an answer that are compared with each other
_TURN_S = 0.025  # least time between two calls of one function: above a period of its CPU quota
_COLD_STARTS, _COLD_S = 7, 4.0
T = TypeVar("T")


@dataclass(frozen=True)
class _Callee:
    """One expert function, the experts that it holds, and their input width and number type."""

    client: Any
    name: str
    experts: tuple[int, ...]
    width: int
    dtype: str

    def batch(self, rows: int) -> Batch:
        """Make a batch of `rows` rows for as many experts as there are rows, within the payload limit."""
        rows = max(1, min(rows, _LARGEST_BYTES // (self.width * STORAGE[self.dtype].itemsize)))
        experts = self.experts[:rows]
        counts = [rows // len(experts) + (i < rows % len(experts)) for i in range(len(experts))]
        data = np.random.default_rng(0).standard_normal((rows, self.width), dtype=np.float32)
        return Batch(self.dtype, experts, tuple(counts), narrow(data, self.dtype))

    def call(self, pool: ThreadPoolExecutor, batch: Batch) -> tuple[Sample, Invocation]:
        start = time.perf_counter()
        frame, invocation = pool.submit(invoke, self.client, self.name, pack(batch)).result()
        answer = unpack(frame)
        elapsed_s = time.perf_counter() - start
        wire = invocation.request_bytes + invocation.response_bytes
        return (wire, elapsed_s, invocation.duration_ms / 1000, answer.compute_us / 1e6), invocation


def measure_target(
    target: str, client: Any, functions: Sequence[str], restart: Callable[[str], None]
) -> tuple[InvocationTiming, ColdStart]:
    """Measure the functions of the deployment `target`, in about 10 s; they are warm afterwards.

    `restart(function)` must make the function's next call a cold start.

    Raises: DeployError for a deployment without functions or whose functions do not start cold, InvokeError when a function fails or is of
    another version.
    """
    if not functions:
        raise DeployError(
            f"The deployment '{target}' has no expert functions to measure: its plan keeps every expert local.",
            "Deploy a plan with remote experts, for example one made with --remote-share 0.25.",
        )
    step = -(-len(functions) // _FUNCTIONS)
    callees = [_callee(client, name) for name in sorted(functions)[::step]]
    with ThreadPoolExecutor(1, "calibrate") as pool:
        return _warm(target, callees, pool), _cold(target, callees, pool, restart)


def with_target(profile: Profile, out: Path, invocation: InvocationTiming, cold_start: ColdStart) -> Profile:
    """Write a copy of the profile with the times that `measure_target` measured."""
    latency = profile.record.latency.model_copy(update={"invocation": invocation, "cold_start": cold_start})
    return write_profile(out, profile.record.model_copy(update={"latency": latency}), profile.arrays)


def with_answers(profile: Profile, out: Path, plan: Plan, catalog: Catalog, answers: Sequence[dict[str, Any]]) -> Profile:
    """Write a copy of the profile whose overhead of an invocation comes from `answers`.

    `plan` is the plan of the deployment that answered. A call costs more while a model is served than alone: functions, main process and
    client may share cores, and the main process finds its caches cold after the wait. What a token takes longer for each call, beyond the
    call itself, is therefore counted as the call's time outside the function. It is not counted below zero, for no wait makes the main
    process faster.

    Raises: DeployError when no answer has a call after its first token.
    """
    try:
        called = [tuple(call) for answer in answers for _, calls in answer["calls"] for call in calls]
    except ValueError:
        message = "The deployment's main function is of another version of remoe."
        raise DeployError(message, "Deploy the plan again, then measure it.") from None
    if not called:
        raise DeployError(
            "No answer of the deployment called a function for more than its first token.", "Give prompts with longer answers."
        )
    _, elapsed_s, duration_s, compute_s = np.array(sorted(called)).T
    own_s, experts_s = _own_s(profile, plan, catalog)
    points = [[_besides_calls(seconds, calls, experts_s) for seconds, calls in _some(answer["calls"])] for answer in answers]
    # Tokens of one answer tell it best, as the machine's speed drifts. Where all of them have as many calls, the profile has to tell.
    beside_s = _slope([pair for tokens in points for pair in combinations(tokens, 2)])
    if beside_s is None:
        beside_s = _slope([((0, own_s), token) for tokens in points for token in tokens]) or 0.0  # a few calls of long answers tell nothing
    latency = profile.record.latency
    assert latency.invocation is not None, "a target is measured before its answers are"
    overhead = {"unbilled_s": quantiles(elapsed_s - duration_s + max(0.0, beside_s)), "billed_s": quantiles(duration_s - compute_s)}
    latency = latency.model_copy(update={"invocation": latency.invocation.model_copy(update=overhead)})
    return write_profile(out, profile.record.model_copy(update={"latency": latency}), profile.arrays)


def _own_s(profile: Profile, plan: Plan, catalog: Catalog) -> tuple[float, float]:
    """Return the seconds of a token whose experts are all local, and those of one layer's experts."""
    problem = make_problem(profile, catalog, PlanRequest())
    experts_s = problem.spec.top_k * main_function.expert_step_s(problem, plan.main)
    return main_function.decode_rest_s(problem, plan.main) + len(plan.layers) * experts_s, experts_s


def _some(tokens: Sequence[T]) -> Sequence[T]:
    """Return tokens of all parts of an answer, few enough to compare each with each."""
    return tokens[:: -(-len(tokens) // _TOKENS)] if tokens else tokens


def _besides_calls(seconds: float, calls: Sequence[Sample], experts_s: float) -> tuple[int, float]:
    """Return a token's number of calls, and its seconds besides them.

    A layer that waits for a call computes its local experts meanwhile, so their time is not counted as waiting.
    """
    return len(calls), seconds - sum(max(0.0, elapsed_s - experts_s) for _, elapsed_s, _, _ in calls)


def _slope(pairs: Iterable[tuple[tuple[int, float], tuple[int, float]]]) -> float | None:
    """Fit a slope robustly: the median slope over pairs of points, weighted by their distance in x; None without any distance."""
    slopes = sorted(((b[1] - a[1]) / (b[0] - a[0]), abs(b[0] - a[0])) for a, b in pairs if a[0] != b[0])
    if not slopes:
        return None
    weights = np.cumsum([weight for _, weight in slopes])
    return slopes[int(np.searchsorted(weights, weights[-1] / 2))][0]


def _callee(client: Any, name: str) -> _Callee:
    reply = health(client, name)
    try:
        return _Callee(client, name, tuple(reply["experts"]), int(reply["width"]), str(reply["dtype"]))
    except KeyError as missing:
        raise InvokeError(
            f"The expert function {name} does not report its {missing}.", "Deploy the plan again: the function may be of another version."
        ) from None


def _warm(target: str, callees: Sequence[_Callee], pool: ThreadPoolExecutor) -> InvocationTiming:
    """Measure all sizes in turn on every function, so that a busy moment of the machine affects all."""
    batches = [[callee.batch(rows) for rows in _ROWS] for callee in callees]
    for callee, sizes in zip(callees, batches, strict=True):
        callee.call(pool, sizes[-1])  # from here on everything it needs is ready
    samples: list[list[Sample]] = [[] for _ in _ROWS]
    give_up = time.perf_counter() + _WARM_S
    for turn in range(_ROUNDS):
        # Every other turn is of the smallest payload, whose spread is wanted.
        size = 0 if turn % 2 == 0 else 1 + (turn // 2) % (len(_ROWS) - 1)
        begun = time.perf_counter()
        for callee, sizes in zip(callees, batches, strict=True):
            sample, invocation = callee.call(pool, sizes[size])
            if invocation.init_ms is None and not invocation.retries:
                samples[size].append(sample)
        if time.perf_counter() > give_up and all(samples):
            break
        time.sleep(max(0.0, begun + _TURN_S - time.perf_counter()))
    if not all(samples):
        raise DeployError(f"No call of the functions of '{target}' was warm.", "Measure when nothing else uses or restarts them.")
    small = np.array(samples[0])
    return InvocationTiming(
        target=target,
        measured_on=date.today().isoformat(),
        unbilled_s=quantiles(small[:, 1] - small[:, 2]),
        billed_s=quantiles(small[:, 2] - small[:, 3]),
        bytes_per_s=rate(samples),
        samples=tuple(sample for group in samples for sample in group),
    )


def quantiles(seconds: np.ndarray[Any, Any]) -> Quantiles:
    """Summarise times: median, 90% and 99% quantiles, and the means of ten equal parts.

    Only clocks of two processes can give a time below zero; it counts as zero.

    >>> quantiles(np.array([0.1, 0.3, 0.2])).p50
    0.2
    """
    ascending = np.sort(np.maximum(seconds, 0.0))
    p50, p90, p99 = np.quantile(ascending, [0.5, 0.9, 0.99]).tolist()
    # Each value stands for an equal share of the axis; a tenth is the mean of what lies on its part of it.
    tenths = np.repeat(ascending, 10).reshape(10, -1).mean(axis=1).tolist()
    return Quantiles(p50=p50, p90=p90, p99=p99, tenths=tuple(tenths))


def rate(samples: Sequence[Sequence[Sample]]) -> float:
    """Return bytes per second on the wire.

    It is the median slope, over groups of payload sizes, of the time that is not computing.
    """
    medians = [(statistics.median(s[0] for s in group), statistics.median(s[1] - s[3] for s in group)) for group in samples]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(medians, 2) if b[0] > a[0]]
    return 1 / max(statistics.median(slopes), 1e-12) if slopes else 1e12  # payloads that cost nothing measurable


def _cold(target: str, callees: Sequence[_Callee], pool: ThreadPoolExecutor, restart: Callable[[str], None]) -> ColdStart:
    """Measure cold starts one by one, each with a row for every expert of the function."""
    starts = list(_cold_starts(callees, pool, restart))
    if not starts:
        raise DeployError(f"No function of '{target}' could be made to start cold.", "Measure when nothing else uses them.")
    medians = {name: statistics.median(split[name] for split in starts) for name in starts[0]}
    return ColdStart(starts=len(starts), **medians, waits_s=tuple(sorted(split["total_s"] for split in starts)))


def _cold_starts(callees: Sequence[_Callee], pool: ThreadPoolExecutor, restart: Callable[[str], None]) -> Iterator[dict[str, float]]:
    give_up = time.perf_counter() + _COLD_S
    for turn in range(_COLD_STARTS):
        callee = callees[turn % len(callees)]
        restart(callee.name)
        (_, total_s, _, _), invocation = callee.call(pool, callee.batch(len(callee.experts)))
        reply = health(callee.client, callee.name)
        if invocation.init_ms is not None and not invocation.retries and reply["cold_start"]:
            yield reply["cold_start"] | {"total_s": total_s}
        if time.perf_counter() > give_up:
            return
