"""For the verifier: decode steps of several rows, of requests at once or of drafts.

Steps are drawn from the recorded tokens in the way that method.md, sections 11 and 12, says, with code of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, MainSpec, WorkloadRef
from remoe_cli.plan.verify.inputs import Layer, VerifierInputs
from remoe_cli.profile.latency_record import Latency

DRAWN, FEWEST = 1024, 64  # tokens of all drawn steps together; the fewest steps
DRAFTED, FIRST_WIDTH_SEED = 512, 65536  # drawn steps with drafts; the seed by which the rows of the first request are dealt out
PART = (math.sqrt(5) - 1) / 2
Counts = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


def at_once(catalog: Catalog, workload: WorkloadRef, main: MainSpec) -> int:
    """Count the requests that an instance of a main function serves at once.

    One that is not always on serves no more than its platform gives it.
    """
    most, always_on = catalog.main.serverless_concurrency, main.usd_per_hour is not None and not main.scales_to_zero
    return workload.concurrency if always_on or most is None else min(most, workload.concurrency)


def drawn(inputs: VerifierInputs, layer: int, routed: Layer, tokens: int) -> Counts:
    """Count the rows of each expert in each drawn step, of so many requests.

    Shapes: [steps, experts].
    """
    if (layer, tokens) in inputs.steps:
        return inputs.steps[layer, tokens]
    if inputs.has_drafts:
        inputs.steps[layer, tokens] = _with_drafts(inputs, layer, routed, tokens)
        return inputs.steps[layer, tokens]
    choices, ends = _cumulated(inputs, routed)
    count = max(FEWEST, DRAWN // tokens)
    rows = np.zeros((count, len(routed.use)), dtype=np.int64)
    for place in range(tokens):
        within = math.fmod(PART * (place + 1), 1.0)
        for step, part in enumerate(np.random.RandomState(place).permutation(count).tolist()):
            _add(rows[step], choices[int(np.searchsorted(ends, (part + within) / count * ends[-1], side="right"))])
    inputs.steps[layer, tokens] = rows
    return rows


def _add(row: Counts, chosen: Iterable[int]) -> None:
    for expert in chosen:
        if expert >= 0:
            row[expert] += 1


def _cumulated(inputs: VerifierInputs, routed: Layer) -> tuple[list[tuple[int, ...]], npt.NDArray[np.float64]]:
    """List the choices of the recorded tokens in order, and of those routed evenly, with their cumulated weights."""
    k, experts = inputs.profile.record.spec.top_k, len(routed.use)
    padded = {(-1,) * (k - len(choice)) + choice: weight for choice, weight in routed.choices.items()}
    choices = sorted(padded)
    weights = [padded[choice] * (1 - inputs.even_share) for choice in choices]
    if inputs.even_share:
        total = math.fsum(padded.values())
        choices += [tuple(sorted((first + step) % experts for step in range(k))) for first in range(experts)]
        weights += [total * inputs.even_share / experts] * experts
    return choices, np.cumsum(weights)


def _with_drafts(inputs: VerifierInputs, layer: int, routed: Layer, requests: int) -> Counts:
    """Count the same where each request has a draft or none: its rows are tokens that follow each other, if the profile has such."""
    k, experts, even = inputs.profile.record.spec.top_k, len(routed.use), inputs.even_share
    shares, order = np.cumsum(inputs.passes[1]), inputs.order
    trace, (choices, ends) = inputs.profile.arrays["trace_ids"], _cumulated(inputs, routed)
    if order is not None:
        ends = np.cumsum(order[1])
    rows = np.zeros((DRAFTED, experts), dtype=np.int64)

    def drawn_at(place: int) -> list[float]:
        within = math.fmod(PART * (place + 1), 1.0)
        return [(part + within) / DRAFTED for part in np.random.RandomState(place).permutation(DRAFTED).tolist()]

    for request in range(requests):
        dealt = np.random.RandomState(FIRST_WIDTH_SEED + request).permutation(DRAFTED).tolist()
        widths = [1 + min(int((shares <= (part + PART) / DRAFTED * shares[-1]).sum()), len(shares) - 1) for part in dealt]
        starts = drawn_at(request)
        for row in range(max(widths)):
            own = drawn_at(request * len(shares) + row) if order is None else starts
            for step in (step for step, width in enumerate(widths) if width > row):
                if order is None:
                    _add(rows[step], choices[int(np.searchsorted(ends, own[step] * ends[-1], side="right"))])
                elif own[step] < 1 - even:
                    first = int(np.searchsorted(ends, own[step] / (1 - even) * ends[-1], side="right"))
                    _add(rows[step], trace[order[0][(first + row) % len(order[0])], layer].tolist())
                else:
                    first = math.floor(math.fmod((own[step] - (1 - even)) / even + PART * row, 1.0) * experts)
                    _add(rows[step], ((first + slot) % experts for slot in range(k)))
    return rows


def mean_of_steps(inputs: VerifierInputs, main: MainSpec, seconds: Callable[[int], float]) -> float:
    """Compute the mean over decode steps of what depends on their rows."""
    served = at_once(inputs.catalog, inputs.plan.workload, main)
    return math.fsum(share * seconds(served * rows) for rows, share in enumerate(inputs.passes[1], 1) if share)


def is_drawn(inputs: VerifierInputs, main: MainSpec) -> bool:
    """Tell whether steps are drawn: they have more tokens than one."""
    return inputs.has_drafts or at_once(inputs.catalog, inputs.plan.workload, main) > 1


def most_tokens(inputs: VerifierInputs, main: MainSpec) -> int:
    """Count the tokens of the largest decode step."""
    return at_once(inputs.catalog, inputs.plan.workload, main) * inputs.most_rows


def several(
    inputs: VerifierInputs, layer: LayerPlan, rows: Counts, latency: Latency, vcpus: float, usd: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Compute the mean seconds of a step in a layer, and the mean cost of its invocations.

    Both are for all requests together. `usd` is what a second and a call of its functions cost.
    """
    side, record = inputs.catalog.function, inputs.profile.record
    remote = {expert for part in layer.parts for expert in part} | set(layer.gpu)
    each = np.arange(rows.max() + 1)
    longest: Seconds = latency.local_expert.seconds(each, vcpus)[rows[:, [e for e in range(rows.shape[1]) if e not in remote]]].sum(axis=1)
    if layer.gpu and latency.gpu_expert is not None:
        longest = np.maximum(longest, latency.gpu_expert.seconds(each, 1.0)[rows[:, list(layer.gpu)]].sum(axis=1))
    measured, function_vcpus, cost = record.latency.invocation, min(side.max_useful_vcpus, layer.memory_mb / side.mb_per_vcpu), 0.0
    rate = measured.bytes_per_s if measured else side.network_bytes_per_s
    outside_s = inputs.call_factor * (fmean(measured.unbilled_s.tenths) if measured else side.warm_unbilled_s)
    overheads_s = [inputs.call_factor * overhead for overhead in (measured.billed_s.tenths if measured else (side.warm_billed_s,))]
    for part in layer.parts:
        here = rows[:, list(part)]
        called, sent = np.flatnonzero(here.any(axis=1)), here.sum(axis=1)
        work_s = record.latency.remote_expert.work_s(each, function_vcpus)[here].sum(axis=1)
        inside_s = np.asarray(record.latency.remote_expert.elapsed_s(work_s, function_vcpus))
        inside_s = inside_s + 2 * sent * record.spec.hidden_state_bytes * side.wire_expansion / rate
        waits = outside_s + fmean(overheads_s) + inside_s
        longest[called] = np.maximum(longest[called], waits[called])
        for overhead_s in overheads_s:
            granules = np.ceil((overhead_s + inside_s[called]) * 1000 / side.billing_granularity_ms - 1e-6)
            cost += float(granules.sum()) * side.billing_granularity_ms / 1000 * usd[0] / len(overheads_s) / len(rows)
        cost += len(called) / len(rows) * usd[1]
    return float(longest.mean()), cost
