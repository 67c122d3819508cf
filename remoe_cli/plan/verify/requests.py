"""For the verifier: limits of time and payload, request by request.

Means hide the longest request, so each one is looked at by itself: its largest payload, its longest invocation against the timeout of the
functions, and its whole time, should it find all cold, against what the platform lets it take.

Source: method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from remoe_cli.lambda_limits import MAX_TIMEOUT_S
from remoe_cli.plan.document import LayerPlan
from remoe_cli.plan.verify.cost import (
    TOLERANCE,
    call,
    cold_wait_s,
    function_vcpus,
    functions_wait_s,
    gpu_seconds,
    latency_of,
    prompt_rows,
    rest_prompts_s,
    start_s,
    turn_s,
    vcpus_of,
    waited_s,
)
from remoe_cli.plan.verify.inputs import Layer, VerifierInputs
from remoe_cli.plan.verify.steps import is_drawn, most_tokens
from remoe_cli.plan.verify.waking import start_of

ROOM, LEAST_TIMEOUT_S = 4.0, 30  # a call may take so many times its predicted time; a shorter timeout than this saves nothing
SHARES = (0.5, 0.95, 0.99)
Request = tuple[float, int, int]  # a share of all, prompt tokens, and further tokens
Limit = tuple[str, object, str]  # the field, what it states, and what is found


@dataclass(frozen=True)
class Times:
    """TTFT of warm requests by prompt tokens, the wait of a cold one, and the limits that were broken.

    Where several requests are served at once, a decode step goes before the prompt.
    """

    warm_s: dict[int, float]
    cold_s: float
    broken: tuple[Limit, ...]


def times(inputs: VerifierInputs, prompts: Sequence[int]) -> Times:
    """Work out TTFT of each prompt, and what it breaks in the functions."""
    plan, broken = inputs.plan, list[Limit]()
    latency = latency_of(inputs, plan.main)
    vcpus, warm_s = vcpus_of(latency, plan.main)[0], rest_prompts_s(inputs, plan.main, prompts)
    wire_bytes, most = inputs.profile.record.spec.hidden_state_bytes * inputs.catalog.function.wire_expansion, inputs.catalog.function
    for index, layer in enumerate(plan.layers):
        routed, elsewhere = inputs.layers[index], {*layer.remote, *layer.gpu}
        local = np.array([use for expert, use in enumerate(routed.use) if expert not in elsewhere])
        gpu = np.array([routed.use[expert] for expert in layer.gpu])
        longest_s, largest = (_step_s(inputs, layer), (0.0, 0)) if layer.remote else (0.0, (0.0, 0))
        counts = np.array(prompts, dtype=np.float64)
        local_s = np.concatenate(
            [latency.local_expert.seconds(np.outer(some, local), vcpus).sum(axis=1) for some in _pieces(counts, local)]
        )
        if len(gpu):
            local_s = np.maximum(local_s, np.concatenate([gpu_seconds(latency, np.outer(some, gpu)) for some in _pieces(counts, gpu)]))
        for n_in, own_s, call_s, rows in zip(prompts, local_s.tolist(), *_sent(inputs, layer, routed, prompts), strict=True):
            warm_s[n_in] += max(own_s, call_s)
            longest_s, largest = max(longest_s, call_s), max(largest, (rows, n_in))
        if layer.remote and is_drawn(inputs, plan.main):
            largest = max(largest, (_step_rows(inputs, layer), 0))
        if (payload := largest[0] * wire_bytes) > most.payload_limit_bytes * (1 + TOLERANCE):
            sender = f"a prompt of {largest[1]} tokens" if largest[1] else "a decode step"
            found = f"{sender} sends {payload:.0f} of {most.payload_limit_bytes} bytes"
            broken.append((f"layers[{index}].replicas", layer.replicas, found))
        broken += _timeout(inputs, index, layer, longest_s)
    turn = turn_s(inputs)
    warm_s = {n_in: seconds + turn for n_in, seconds in warm_s.items()}
    return Times(warm_s, cold_wait_s(inputs, plan.main, plan.layers), tuple(broken))


def _pieces(counts: npt.NDArray[np.float64], beside: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Divide prompts, so that no table of them and of experts is large."""
    return np.array_split(counts, 1 + len(counts) * len(beside) // 2**20)


def _sent(inputs: VerifierInputs, layer: LayerPlan, routed: Layer, prompts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Compute seconds and rows of each prompt's largest invocations: one by one where replicas share the experts, else all at once."""
    if layer.replicas > 1:
        sent = [prompt_rows(inputs, layer, routed, n_in) for n_in in prompts]
        calls = [max((call(inputs, layer, rows)[0] for rows in groups), default=0.0) for groups in sent]
        return calls, [max(map(sum, groups), default=0.0) for groups in sent]
    counts, timing = np.array(prompts, dtype=np.float64), inputs.profile.record.latency.remote_expert
    vcpus, longest, most = function_vcpus(inputs.catalog, layer.memory_mb), np.zeros(len(prompts)), np.zeros(len(prompts))
    for part in layer.parts:
        uses = np.array([use for expert in part if (use := routed.use[expert]) > 0])
        if not len(uses):
            continue
        work_s = np.concatenate([timing.work_s(np.outer(some, uses), vcpus).sum(axis=1) for some in _pieces(counts, uses)])
        rows = counts * uses.sum()
        longest = np.maximum(longest, waited_s(inputs, np.asarray(timing.elapsed_s(work_s, vcpus)), rows))
        most = np.maximum(most, rows)
    return longest.tolist(), most.tolist()


def too_long(inputs: VerifierInputs, found: Times, requests: Sequence[Request], tpot_s: float) -> Iterator[Limit]:
    """Find the requests that the platform ends before they are answered."""
    main, workload = inputs.plan.main, inputs.plan.workload
    start = start_of(inputs.catalog, workload, main)
    ends_s = inputs.catalog.main.rented_timeout_s if start is None else start.ends_s
    cold_s = found.cold_s if start is not None or workload.cold_share > 0 else 0.0
    if main.scales_to_zero and workload.cold_share > 0:  # functions may take longer to start than the main function does
        cold_s += functions_wait_s(inputs, inputs.plan.layers)
    for _, n_in, n_out in requests:
        taken_s = found.warm_s[n_in] + cold_s + n_out * tpot_s
        if ends_s is not None and taken_s > ends_s * (1 + 2 * TOLERANCE):
            size = f"{n_in} prompt + {n_out + 1} output tokens"
            yield "main", main.name, f"a request of {size} takes {taken_s} s, and {ends_s:g} s are allowed"


def spread(inputs: VerifierInputs, found: Times, requests: Sequence[Request], tpot_s: float) -> Iterator[Limit]:
    """Find what the plan states wrongly of the times that shares of the requests do not exceed."""
    plan, ttft, whole = inputs.plan, list[tuple[float, float]](), list[tuple[float, float]]()
    start, cold = start_of(inputs.catalog, plan.workload, plan.main), plan.workload.cold_share
    waits = [(cold, found.cold_s)]
    if start is not None:
        waits = [(start.share, found.cold_s), (start.functions_share, functions_wait_s(inputs, plan.layers))]
    for share, n_in, n_out in requests:
        for part, wait_s in ((1 - math.fsum(part for part, _ in waits), 0.0), *waits):
            ttft.append((found.warm_s[n_in] + wait_s, share * part))
            whole.append((found.warm_s[n_in] + wait_s + n_out * tpot_s, share * part))
    for index, one in enumerate(inputs.plan.spread):
        for name, values, stated_s in (("ttft_s", ttft, one.ttft_s), ("total_s", whole, one.total_s)):
            within, below = (math.fsum(part for s, part in values if s <= stated_s * (1 + off * TOLERANCE)) for off in (2, -2))
            if below > one.share + TOLERANCE or within < one.share - TOLERANCE or math.isclose(within, below, abs_tol=1e-15):
                yield f"spread[{index}].{name}", stated_s, f"{below} of the requests take less, {within} no more"


def _step_s(inputs: VerifierInputs, layer: LayerPlan) -> float:
    """Compute the invocation for tokens whose experts are all in one function, which share them out evenly."""
    experts = max(map(len, layer.parts))
    rows = _step_rows(inputs, layer)
    hit = min(rows, experts)
    return call(inputs, layer, [rows / hit] * hit)[0]


def _step_rows(inputs: VerifierInputs, layer: LayerPlan) -> int:
    return most_tokens(inputs, inputs.plan.main) * min(inputs.profile.record.spec.top_k, max(map(len, layer.parts)))


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
