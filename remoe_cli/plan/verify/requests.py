"""For the verifier: the limits of time and payload, request by request.

Means hide the longest request, so each one is looked at by itself: its largest payload, its longest invocation against the timeout of the
functions, and its whole time, should it find all cold, against what the platform lets it take.

Source: method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from remoe_cli.lambda_limits import MAX_TIMEOUT_S
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.verify.cost import TOLERANCE, Layer, VerifierInputs, accelerated, call, latency_of, prompt_rows, start_s, vcpus_of

ROOM, LEAST_TIMEOUT_S = 4.0, 30  # a call may take so many times its predicted time; a shorter timeout than this saves nothing
Limit = tuple[str, object, str]  # the field, what it states, and what is found


def request_limits(inputs: VerifierInputs, requests: Iterable[tuple[int, int]], tpot_s: float) -> Iterator[Limit]:
    """Find what any of the requests, given by prompt tokens and further tokens, breaks."""
    answers: dict[int, int] = {}
    for n_in, n_out in requests:
        answers[n_in] = max(n_out, answers.get(n_in, 0))
    seconds = _main_s(inputs, sorted(answers))
    for index, layer in enumerate(inputs.plan.layers):
        longest_s = _step_s(inputs, layer) if layer.remote else 0.0
        for n_in in seconds:
            part_s, call_s, payload = _layer(inputs, layer, inputs.layers[index], n_in)
            seconds[n_in] += part_s
            longest_s = max(longest_s, call_s)
            if payload > (most := inputs.catalog.function.payload_limit_bytes) * (1 + TOLERANCE):
                yield f"layers[{index}].replicas", layer.replicas, f"a prompt of {n_in} tokens sends {payload:.0f} of {most} bytes"
        yield from _timeout(inputs, index, layer, longest_s)
    cold_s, ends_s = _cold_s(inputs), _ends_s(inputs)
    for n_in, warm_s in seconds.items():
        if (taken_s := warm_s + cold_s + answers[n_in] * tpot_s) > ends_s * (1 + 2 * TOLERANCE):
            yield (
                "main",
                inputs.plan.main.name,
                f"a request of {n_in} + {answers[n_in]} tokens takes {taken_s} s, and {ends_s:g} s are allowed",
            )


def _main_s(inputs: VerifierInputs, prompts: list[int]) -> dict[int, float]:
    """Compute TTFT without experts for each prompt."""
    plan = inputs.plan
    latency, copies = latency_of(inputs, plan.main), 2 * len(plan.layers)
    vcpus, useful = vcpus_of(latency, plan.main)
    beside = 1.0 if accelerated(inputs, plan.main) else useful / min(vcpus, useful)
    return {n: float(latency.nonexpert_prefill.seconds(n)) * beside + copies * float(latency.copy_s.seconds(n)) for n in prompts}


def _layer(inputs: VerifierInputs, layer: LayerPlan, routed: Layer, n_in: int) -> tuple[float, float, float]:
    """Compute what one layer adds to a prompt, its longest invocation, and its largest payload."""
    latency = latency_of(inputs, inputs.plan.main)
    vcpus, _ = vcpus_of(latency, inputs.plan.main)
    local = np.array([use * n_in for expert, use in enumerate(routed.use) if expert not in set(layer.remote)])
    local_s, sent = float(latency.local_expert.seconds(local, vcpus).sum()), prompt_rows(inputs, layer, routed, n_in)
    call_s = max((call(inputs, layer, rows)[0] for rows in sent), default=0.0)
    payload = max(map(sum, sent), default=0.0) * inputs.profile.record.spec.hidden_state_bytes * inputs.catalog.function.wire_expansion
    return max(local_s, call_s), call_s, payload


def _step_s(inputs: VerifierInputs, layer: LayerPlan) -> float:
    """Compute the invocation for a token whose experts are all in one function."""
    return call(inputs, layer, [1.0] * min(inputs.profile.record.spec.top_k, max(map(len, layer.parts))))[0]


def _timeout(inputs: VerifierInputs, index: int, layer: LayerPlan, longest_s: float) -> Iterator[Limit]:
    stated, most_s = layer.timeout_s, min(inputs.catalog.function.timeout_s, MAX_TIMEOUT_S)
    if not layer.remote:
        if stated != 0:
            yield f"layers[{index}].timeout_s", stated, "0 without remote experts"
        return
    needed_s = start_s(inputs, layer) + ROOM * longest_s
    if needed_s > most_s * (1 + 2 * TOLERANCE):
        yield f"layers[{index}].timeout_s", stated, f"a function needs {needed_s} s, and {most_s:g} s are allowed"
    elif not max(LEAST_TIMEOUT_S, needed_s) - 1e-5 <= stated <= max(LEAST_TIMEOUT_S, needed_s + 1):
        yield f"layers[{index}].timeout_s", stated, f"{max(LEAST_TIMEOUT_S, math.ceil(needed_s))}"


def _cold_s(inputs: VerifierInputs) -> float:
    """Compute what a request waits that finds everything cold, if there may be one."""
    plan, side, spec = inputs.plan, inputs.catalog.main, inputs.profile.record.spec
    if plan.main.usd_per_hour is None:
        local = sum(spec.experts_per_layer - len(layer.remote) for layer in plan.layers)
        return side.cold_start_s + (spec.nonexpert_bytes + local * spec.expert_bytes) / side.load_bytes_per_s
    return sum(start_s(inputs, layer) for layer in plan.layers if layer.remote) if plan.workload.cold_share > 0 else 0.0


def _ends_s(inputs: VerifierInputs) -> float:
    side = inputs.catalog.main
    if inputs.plan.main.usd_per_hour is None:
        return side.timeout_s
    return math.inf if side.rented_timeout_s is None else side.rented_timeout_s
