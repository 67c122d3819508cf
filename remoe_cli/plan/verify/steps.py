"""For the verifier: decode steps of several requests at once, and what they share.

Steps are drawn from the recorded tokens in the way that method.md, section 11, says, with code of its own.
"""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import LayerPlan, MainSpec, WorkloadRef
from remoe_cli.plan.verify.inputs import Layer, VerifierInputs
from remoe_cli.profile.latency_record import Latency

DRAWN, FEWEST = 1024, 64  # tokens of all drawn steps together; the fewest steps
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
    """Count the rows of each expert in each drawn step, of so many tokens.

    Shapes: [steps, experts].
    """
    if (layer, tokens) in inputs.steps:
        return inputs.steps[layer, tokens]
    k, experts = inputs.profile.record.spec.top_k, len(routed.use)
    padded = {(-1,) * (k - len(choice)) + choice: weight for choice, weight in routed.choices.items()}
    choices = sorted(padded)
    weights = [padded[choice] * (1 - inputs.even_share) for choice in choices]
    if inputs.even_share:
        total = math.fsum(padded.values())
        choices += [tuple(sorted((first + step) % experts for step in range(k))) for first in range(experts)]
        weights += [total * inputs.even_share / experts] * experts
    ends, count = np.cumsum(weights), max(FEWEST, DRAWN // tokens)
    rows = np.zeros((count, experts), dtype=np.int64)
    for place in range(tokens):
        within = math.fmod(PART * (place + 1), 1.0)
        for step, part in enumerate(np.random.RandomState(place).permutation(count).tolist()):
            chosen = choices[int(np.searchsorted(ends, (part + within) / count * ends[-1], side="right"))]
            for expert in chosen:
                if expert >= 0:
                    rows[step, expert] += 1
    inputs.steps[layer, tokens] = rows
    return rows


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
