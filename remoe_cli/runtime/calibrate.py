"""Measuring a live target: warm invocations and cold starts of a deployment's own functions, as its dispatcher sees them, and
what calls take while prompts are answered.

The calls are those of serving (`invoke`, from a thread of the dispatcher's kind, packing included), with frames that the functions
can compute; what they hold they say themselves. This module does not know where functions run: how a cold start is forced is given
to it. Calls are spaced as decoding spaces them, so that a CPU quota is whole again when the next one comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

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
from remoe_cli.runtime.invoke import Invocation, health, invoke

_FUNCTIONS = 8  # measured in turn: more would not tell more
_ROWS = (1, 32, 256)
_LARGEST_BYTES = 4_000_000  # of hidden states: in base64 below Lambda's payload limit
_WARM_S, _ROUNDS = 4.0, 120
_TURN_S = 0.025  # least time between two calls of one function: above a period of its CPU quota
_COLD_STARTS, _COLD_S = 7, 4.0
# What a call took: payload bytes on the wire both ways, seconds for the dispatcher, in the function, and computing.
Sample = tuple[int, float, float, float]


@dataclass(frozen=True)
class _Callee:
    """One function and what it holds. `client` is shared by all."""

    client: Any
    name: str
    experts: tuple[int, ...]
    width: int
    dtype: str

    def batch(self, rows: int) -> Batch:
        """`rows` rows over as many experts as there are for them, no more than a payload may hold."""
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
    """Measure the deployment `target` through its own functions; takes some 10 s and ends with them warm.

    `restart(function)` must make the function's next call a cold start. Raises DeployError for a deployment without functions or one
    whose functions do not start cold, InvokeError when a function fails or is of another version.
    """
    if not functions:
        raise DeployError(
            f"The deployment '{target}' has no expert functions to measure: its plan keeps every expert local.",
            "Deploy a plan that sends some experts away, for example one made with --remote-share 0.25.",
        )
    step = -(-len(functions) // _FUNCTIONS)
    callees = [_callee(client, name) for name in sorted(functions)[::step]]
    with ThreadPoolExecutor(1, "calibrate") as pool:
        return _warm(target, callees, pool), _cold(target, callees, pool, restart)


def with_target(profile: Profile, out: Path, invocation: InvocationTiming, cold_start: ColdStart) -> Profile:
    """Write a copy of the profile whose latency carries what was measured on a live target."""
    latency = profile.record.latency.model_copy(update={"invocation": invocation, "cold_start": cold_start})
    return write_profile(out, profile.record.model_copy(update={"latency": latency}), profile.arrays)


def with_answers(profile: Profile, out: Path, plan: Plan, catalog: Catalog, answers: Sequence[dict[str, Any]]) -> Profile:
    """Write a copy of the profile which takes the overhead of an invocation from `answers` (with their calls) of a deployment of `plan`.

    In serving a call costs more than alone: functions, main process and client may share cores, and what computed before the wait has
    lost its caches after it. What a token takes longer for each call, besides the call, is therefore counted as the call's, outside the
    function; less than nothing is not, for no wait makes the main process faster.
    Raises DeployError when no answer has a call for a further token.
    """
    calls = [call for answer in answers for call in answer["calls"]]
    largest_bytes = 2 * min((wire for wire, *_ in calls), default=0)  # the others are a prompt's
    decoding = [answer | {"calls": [call for call in answer["calls"] if call[0] <= largest_bytes]} for answer in answers]
    decoding = [answer for answer in decoding if answer["calls"] and answer["receipt"]["tpot_s"]]
    if not decoding:
        raise DeployError(
            "No answer of the deployment called a function for more than its first token.", "Give prompts with longer answers."
        )
    _, elapsed_s, duration_s, compute_s = np.array(sorted(tuple(call) for answer in decoding for call in answer["calls"])).T
    # The machine's speed drifts: both what the profile took without any call and the answers with more and fewer calls tell it.
    own_s, experts_s = _own_s(profile, plan, catalog)
    beside_s = _slope([(0.0, own_s), *(_besides_calls(answer["calls"], answer["receipt"], experts_s) for answer in decoding)])
    latency = profile.record.latency
    assert latency.invocation is not None, "a target is measured before its answers are"
    overhead = {"unbilled_s": quantiles(elapsed_s - duration_s + max(0.0, beside_s)), "billed_s": quantiles(duration_s - compute_s)}
    latency = latency.model_copy(update={"invocation": latency.invocation.model_copy(update=overhead)})
    return write_profile(out, profile.record.model_copy(update={"latency": latency}), profile.arrays)


def _own_s(profile: Profile, plan: Plan, catalog: Catalog) -> tuple[float, float]:
    """Seconds of a token whose experts are all local, and what of it are the experts of one layer."""
    problem = make_problem(profile, catalog, PlanRequest())
    experts_s = problem.spec.top_k * main_function.expert_step_s(problem, plan.main)
    return main_function.decode_rest_s(problem, plan.main) + len(plan.layers) * experts_s, experts_s


def _besides_calls(calls: Sequence[Sample], receipt: dict[str, Any], experts_s: float) -> tuple[float, float]:
    """An answer's calls per further token, and the seconds of one besides its calls, if none were remote: a layer that waits for a call
    saves its local experts, which run meanwhile."""
    further = receipt["generated_tokens"] - 1
    waited_s = sum(max(0.0, elapsed_s - experts_s) for _, elapsed_s, _, _ in calls)
    return len(calls) / further, receipt["tpot_s"] - waited_s / further


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """How y grows with x, whatever a few points say: the median of the slopes between any two, weighted by their distance in x."""
    slopes = sorted(((b[1] - a[1]) / (b[0] - a[0]), abs(b[0] - a[0])) for a, b in combinations(points, 2) if a[0] != b[0])
    weights = np.cumsum([weight for _, weight in slopes])
    return slopes[int(np.searchsorted(weights, weights[-1] / 2))][0]


def _callee(client: Any, name: str) -> _Callee:
    said = health(client, name)
    try:
        return _Callee(client, name, tuple(said["experts"]), int(said["width"]), str(said["dtype"]))
    except KeyError as missing:
        raise InvokeError(
            f"The expert function {name} does not say its {missing}.", "Deploy the plan again: the function may be of another version."
        ) from None


def _warm(target: str, callees: Sequence[_Callee], pool: ThreadPoolExecutor) -> InvocationTiming:
    """All sizes in turn, each on every function, so that a busy spell of the machine hits all alike."""
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
        bytes_per_s=_rate(samples),
        samples=tuple(sample for group in samples for sample in group),
    )


def quantiles(seconds: np.ndarray[Any, Any]) -> Quantiles:
    """The spread of at least one time; a time below zero, which only clocks of two processes can make, counts as zero."""
    ascending = np.sort(np.maximum(seconds, 0.0))
    p50, p90, p99 = np.quantile(ascending, [0.5, 0.9, 0.99]).tolist()
    # Each value stands for an equal share of the axis; a tenth is the mean of what lies on its part of it.
    tenths = np.repeat(ascending, 10).reshape(10, -1).mean(axis=1).tolist()
    return Quantiles(p50=p50, p90=p90, p99=p99, tenths=tuple(tenths))


def _rate(samples: Sequence[Sequence[Sample]]) -> float:
    """Bytes a second on the wire: the median slope between sizes of the time besides computing."""
    medians = [(group[0][0], statistics.median(s[1] - s[3] for s in group)) for group in samples]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(medians, 2) if b[0] > a[0]]
    return 1 / max(statistics.median(slopes), 1e-12) if slopes else 1e12  # payloads that cost nothing measurable


def _cold(target: str, callees: Sequence[_Callee], pool: ThreadPoolExecutor, restart: Callable[[str], None]) -> ColdStart:
    """One cold start after another, each with a row for every expert of the function, as a prompt would bring."""
    starts = list(_cold_starts(callees, pool, restart))
    if not starts:
        raise DeployError(f"No function of '{target}' could be made to start cold.", "Measure when nothing else uses them.")
    return ColdStart(starts=len(starts), **{name: statistics.median(split[name] for split in starts) for name in starts[0]})


def _cold_starts(callees: Sequence[_Callee], pool: ThreadPoolExecutor, restart: Callable[[str], None]) -> Iterator[dict[str, float]]:
    give_up = time.perf_counter() + _COLD_S
    for turn in range(_COLD_STARTS):
        callee = callees[turn % len(callees)]
        restart(callee.name)
        (_, total_s, _, _), invocation = callee.call(pool, callee.batch(len(callee.experts)))
        said = health(callee.client, callee.name)
        if invocation.init_ms is not None and not invocation.retries and said["cold_start"]:
            yield said["cold_start"] | {"total_s": total_s}
        if time.perf_counter() > give_up:
            return
