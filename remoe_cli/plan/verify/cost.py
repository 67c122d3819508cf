"""A second cost model, for the verifier: plain loops over layers and recorded tokens.

It shares nothing with the planner's, so that an error in the planner's arithmetic is not repeated here. One invocation carries a token's
experts of a function, and TPOT takes E[max] over the recorded tokens. Experts on the GPU take their own time, beside those on the CPU.
Where several requests are served at once, or answers have drafts, steps.py has their decode steps.

Source: method.md, sections 3, 4, 11 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import fmean

import numpy as np
import numpy.typing as npt

from remoe_cli.plan.catalog.catalog import Catalog
from remoe_cli.plan.document import Costs, LayerPlan, MainSpec, Outcome
from remoe_cli.plan.verify import assistant
from remoe_cli.plan.verify.hits import hit_shares
from remoe_cli.plan.verify.inputs import Layer, VerifierInputs
from remoe_cli.plan.verify.steps import at_once, drawn, is_drawn, mean_of_steps, most_tokens, several
from remoe_cli.plan.verify.waking import hours_usd, start_of
from remoe_cli.profile.hardware import latency_from
from remoe_cli.profile.latency_record import Latency, Roofline

TOLERANCE = 1e-9


# The main function


def latency_of(inputs: VerifierInputs, main: MainSpec) -> Latency:
    """Choose the times of a main spec: those of the hardware that it names, or the profile's own.

    They are the profile's own where the spec names no hardware, or where the profile was measured on CPUs and the spec has only CPUs.
    """
    own = inputs.profile.record.latency
    on_cpus_alike = own.source == "measured" and main.gpu_memory_mb is None and own.gpu_expert is None and own.copy_s.fixed_s == 0
    if main.hardware is None or on_cpus_alike:
        return own
    record = inputs.profile.record
    return latency_from(main.hardware, record.spec, main.vcpus, record.assistant.spec if record.assistant else None)


def vcpus_of(latency: Latency, main: MainSpec) -> tuple[float, float]:
    """Compute the vCPUs that experts are computed with, and the number above which nothing gets faster."""
    curve = latency.local_expert.curve
    useful = min(latency.main_vcpus, curve.saturation_vcpus) if isinstance(curve, Roofline) else latency.main_vcpus
    return latency.main_vcpus if main.vcpus is None else min(main.vcpus, latency.main_vcpus), useful


def accelerated(inputs: VerifierInputs, main: MainSpec) -> bool:
    """Tell whether non-expert modules are on a GPU."""
    return main.gpu_memory_mb is not None or (main.usd_per_hour is None and inputs.catalog.main.usd_per_accelerator_gb_second > 0)


def gpu_tier(inputs: VerifierInputs, main: MainSpec) -> bool:
    """Tell whether experts may be on the GPU: the instance has one of its own, and its time is known."""
    return main.gpu_memory_mb is not None and latency_of(inputs, main).gpu_expert is not None


def gpu_room_bytes(inputs: VerifierInputs, main: MainSpec) -> float:
    """Compute the GPU memory that weights, KV cache and hidden states may take."""
    side = inputs.catalog.main
    left = (main.gpu_memory_mb or 0) - (main.gpu_memory_mb or 0) * side.gpu_hidden_share - side.gpu_runtime_memory_mb
    return max(left, 0.0) * 2**20


def gpu_work_bytes(inputs: VerifierInputs, main: MainSpec) -> int:
    """Compute what a layer with experts on the GPU takes there meanwhile.

    It is three times the outputs of all slots of the largest pass.
    """
    spec = inputs.profile.record.spec
    return 3 * largest_pass(inputs, main) * spec.top_k * spec.hidden_state_bytes


def largest_pass(inputs: VerifierInputs, main: MainSpec) -> int:
    """Count the rows of the longest prompt, or those of a decode step if they are more."""
    return max(most_tokens(inputs, main), *(n_in for n_in, _ in inputs.longest))


def gpu_seconds(latency: Latency, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute how long the GPU takes for experts with so many tokens each, one after another.

    Shapes: [.., experts]; [..].
    """
    if latency.gpu_expert is None or not tokens.shape[-1]:
        return np.zeros(tokens.shape[:-1])
    seconds: npt.NDArray[np.float64] = latency.gpu_expert.seconds(tokens, 1.0).sum(axis=-1)
    return seconds


def request_bytes(inputs: VerifierInputs, main: MainSpec) -> int:
    """Compute non-expert modules, and KV cache and hidden states of the longest request.

    The latter count as often as requests are served at once.
    """
    spec = inputs.profile.record.spec
    tokens = max(n_in + n_out for n_in, n_out in inputs.longest)
    kv = sum(layer.bytes_per_token * (tokens if layer.window is None else min(tokens, layer.window)) for layer in spec.kv_layers)
    kv += sum(int(layer.compressed_bytes_per_token * tokens) for layer in spec.kv_layers)
    each = kv + tokens * spec.hidden_state_bytes + assistant.cache_bytes(inputs, tokens)
    return spec.nonexpert_bytes + assistant.weight_bytes(inputs) + at_once(inputs.catalog, inputs.plan.workload, main) * each


def main_bytes(inputs: VerifierInputs, main: MainSpec, cpu_experts: int) -> float:
    """Compute the CPU memory of a main function with so many experts in it.

    Where it has a GPU of its own, it needs buffers to copy a prompt, and room to load.
    """
    spec, side = inputs.profile.record.spec, inputs.catalog.main
    held, loading = request_bytes(inputs, main), 1.0
    if accelerated(inputs, main):
        answers = at_once(inputs.catalog, inputs.plan.workload, main) * max(n_out for _, n_out in inputs.longest)
        held = answers * spec.hidden_state_bytes
    if main.gpu_memory_mb is not None:
        held, loading = held + (1 + spec.top_k) * largest_pass(inputs, main) * spec.hidden_state_bytes, side.gpu_load_factor
    return side.runtime_memory_mb * 2**20 + held + cpu_experts * spec.expert_bytes * loading


def outcome(inputs: VerifierInputs, main: MainSpec, instances: int, layers: Sequence[LayerPlan]) -> Outcome:
    """Compute mean cost, TTFT and TPOT of the plan's requests under a placement."""
    return outcome_and_costs(inputs, main, instances, layers)[0]


def outcome_and_costs(inputs: VerifierInputs, main: MainSpec, instances: int, layers: Sequence[LayerPlan]) -> tuple[Outcome, Costs]:
    """Compute the same, and the main function's and each layer's part of the cost."""
    latency = latency_of(inputs, main)
    workload = inputs.plan.workload
    vcpus, served = vcpus_of(latency, main)[0], at_once(inputs.catalog, workload, main)
    step, cold = rest_step_s(inputs, main), 0.0
    start, layers_usd, at = start_of(inputs.catalog, workload, main), [], inputs.plan.targets.ttft_at
    deciding = [] if at is None else [at.n_in]  # the prompt whose TTFT the target is held against, beside those of the kinds
    rest_s = rest_prompts_s(inputs, main, (*deciding, *(kind.n_in for kind in inputs.kinds)))
    ttft, decided = sum(kind.share * rest_s[kind.n_in] for kind in inputs.kinds), sum(rest_s[n] for n in deciding)
    local_step_s, gpu_step_s = float(latency.local_expert.seconds(1, vcpus)), float(gpu_seconds(latency, np.ones(1)))
    for index, (layer, routed) in enumerate(zip(layers, inputs.layers, strict=True)):
        remote, gpu, usd = set(layer.remote), set(layer.gpu), 0.0
        local_use = np.array([use for e, use in enumerate(routed.use) if e not in remote | gpu])
        gpu_use = np.array([routed.use[e] for e in layer.gpu])
        for n in deciding:
            waits = [call(inputs, layer, rows)[0] for rows in prompt_rows(inputs, layer, routed, n)]
            waits.append(float(gpu_seconds(latency, gpu_use * n)))
            decided += max([float(latency.local_expert.seconds(local_use * n, vcpus).sum()), *waits])
        for kind in inputs.kinds:
            local_s = float(latency.local_expert.seconds(local_use * kind.n_in, vcpus).sum())
            calls = [call(inputs, layer, rows) for rows in prompt_rows(inputs, layer, routed, kind.n_in)]
            gpu_s = float(gpu_seconds(latency, gpu_use * kind.n_in))
            ttft += kind.share * max([local_s, gpu_s, *(waited for waited, _ in calls)])
            usd += kind.share * sum(billed for _, billed in calls)
        if is_drawn(inputs, main):
            rate = function_usd_per_s(inputs, layer) if layer.remote else 0.0
            usd_each = rate, inputs.price_factor * inputs.catalog.function.usd_per_request + logged_usd(inputs)
            step_s, step_usd = several(inputs, layer, drawn(inputs, index, routed, served), latency, vcpus, usd_each)
        else:
            step_s, step_usd = decode(inputs, layer, routed, local_step_s, gpu_step_s)
        step += step_s
        usd += inputs.n_out * inputs.passes[0] * step_usd / served
        if start is not None:
            cold += start.share * (len(local_use) + len(gpu)) * read_bytes(inputs)[1] / start.bytes_per_s
        if layer.remote:
            started = start_s(inputs, layer)
            cold += (workload.cold_share if start is None else start.functions_share) * started
            start_usd = started * function_usd_per_s(inputs, layer) + start_reads_usd(inputs, layer)
            usd += workload.cold_share * len(layer.parts) * layer.replicas * start_usd
        layers_usd.append(usd)
    if start is not None:
        cold += start.share * start.wait_s(read_bytes(inputs)[0])
    tpot = inputs.passes[0] * step
    if served > 1:  # a step goes before each prompt, and prompts of the others between the steps of an answer
        tpot, ttft, decided = tpot + (served - 1) * ttft / max(1.0, inputs.n_out), ttft + step, decided + step
    request_s, ttft = (ttft + inputs.n_out * tpot) / served + cold, ttft + cold
    costs = Costs(main_usd=main_usd(inputs, main, instances, request_s), layers_usd=tuple(layers_usd))
    usd = costs.main_usd + sum(layers_usd)
    percentile_s = None if at is None else decided + (cold_wait_s(inputs, main, layers) if at.cold else 0.0)
    return Outcome(cost_usd_per_request=usd, ttft_s=ttft, tpot_s=tpot, ttft_percentile_s=percentile_s), costs


def rest_prompts_s(inputs: VerifierInputs, main: MainSpec, prompts: Iterable[int]) -> dict[int, float]:
    """Compute prefill of prompts without experts."""
    latency, copies = latency_of(inputs, main), 2 * len(inputs.profile.record.spec.moe_layers)
    slower, of_assistant = slower_than_most(inputs, main, latency), partial(assistant.prompt_s, inputs, latency.assistant)
    return {
        n: (float(latency.nonexpert_prefill.seconds(n)) + of_assistant(n)) * slower + copies * float(latency.copy_s.seconds(n))
        for n in prompts
    }


def slower_than_most(inputs: VerifierInputs, main: MainSpec, latency: Latency) -> float:
    """Compute how many times as long modules on CPUs take as with the most vCPUs that help; 1 on a GPU."""
    vcpus, useful = vcpus_of(latency, main)
    return 1.0 if accelerated(inputs, main) else useful / min(vcpus, useful)


def rest_step_s(inputs: VerifierInputs, main: MainSpec) -> float:
    """Compute a decode step without experts.

    Each further row takes what a further token of a prompt takes.
    """
    latency, served = latency_of(inputs, main), at_once(inputs.catalog, inputs.plan.workload, main)
    more_s = mean_of_steps(inputs, main, lambda rows: float(latency.nonexpert_prefill.seconds(rows) - latency.nonexpert_prefill.seconds(1)))
    copies_s = mean_of_steps(inputs, main, lambda rows: float(latency.copy_s.seconds(rows)))
    own_s = latency.nonexpert_decode_s + more_s + assistant.step_s(inputs, latency.assistant, served)
    return own_s * slower_than_most(inputs, main, latency) + 2 * len(inputs.profile.record.spec.moe_layers) * copies_s


def turn_s(inputs: VerifierInputs) -> float:
    """Compute how long a prompt waits for a decode step of the others; 0 where there are none."""
    main = inputs.plan.main
    if (served := at_once(inputs.catalog, inputs.plan.workload, main)) == 1:
        return 0.0
    latency = latency_of(inputs, main)
    vcpus = vcpus_of(latency, main)[0]
    each = [
        several(inputs, layer, drawn(inputs, index, inputs.layers[index], served), latency, vcpus)[0]
        for index, layer in enumerate(inputs.plan.layers)
    ]
    return rest_step_s(inputs, main) + math.fsum(each)


def main_usd(inputs: VerifierInputs, main: MainSpec, instances: int, request_s: float) -> float:
    """Price a request in the main function, which it keeps busy for so long."""
    side, per_hour = inputs.catalog.main, inputs.plan.workload.requests_per_hour
    if (usd := hours_usd(inputs.catalog, inputs.plan.workload, main, instances)) is not None:
        return usd
    if main.usd_per_hour is not None:
        return main.usd_per_hour * (request_s / 3600 if per_hour is None else instances / per_hour)
    accelerator = side.usd_per_accelerator_gb_second * request_bytes(inputs, main) / 2**30
    return (cpu_usd_per_s(inputs, main) + accelerator) * request_s + each_usd(inputs, main)


def cpu_usd_per_s(inputs: VerifierInputs, main: MainSpec) -> float:
    """Price a second of a main function's CPU memory, and of as much /tmp beyond the free part."""
    side = inputs.catalog.main
    cpu = side.usd_per_gb_second[inputs.catalog.architecture] * main.memory_mb / 1024
    return cpu + max(0.0, main.memory_mb - inputs.catalog.function.storage_free_mb) / 1024 * side.usd_per_storage_gb_second


def each_usd(inputs: VerifierInputs, main: MainSpec) -> float:
    """Price what each request to a main function paid by use costs besides time.

    That is its fee, its log, and reads of S3 in its share of cold starts.
    """
    side, storage = inputs.catalog.main, inputs.catalog.storage
    reads = math.ceil(main.memory_mb * 2**20 / side.bytes_per_read) if side.bytes_per_read else 0
    return side.usd_per_request + logged_usd(inputs) + inputs.plan.workload.cold_share * reads * storage.usd_per_1000_reads / 1000


def logged_usd(inputs: VerifierInputs) -> float:
    """Price the log of one invocation."""
    return inputs.catalog.storage.usd_per_log_gb * inputs.catalog.function.log_bytes_per_call / 2**30


# The expert functions


def function_vcpus(catalog: Catalog, memory_mb: int) -> float:
    """Compute the vCPUs of an expert function."""
    return min(catalog.function.max_useful_vcpus, memory_mb / catalog.function.mb_per_vcpu)


def prompt_rows(inputs: VerifierInputs, layer: LayerPlan, routed: Layer, n_in: int) -> list[list[float]]:
    """List the rows of each expert in each invocation of a prompt.

    Replicas share the experts: most work at one vCPU first, each to the replica with the least so far.
    """
    tokens = [use * n_in for use in routed.use]
    if layer.replicas <= 1:
        groups = [[e for e in part if tokens[e] > 0] for part in layer.parts]
        return [[tokens[e] for e in group] for group in groups if group]
    timing, one = inputs.profile.record.latency.remote_expert, min(inputs.catalog.function.max_useful_vcpus, 1.0)
    work = {e: float(timing.work_s(tokens[e], one)) for e in layer.remote if tokens[e] > 0}
    rows: list[list[float]] = [[] for _ in range(layer.replicas)]
    load = [0.0] * layer.replicas
    for expert in sorted((e for e in work if work[e] > 0), key=lambda e: (-work[e], e)):
        least = load.index(min(load))
        rows[least].append(tokens[expert])
        load[least] += work[expert]
    return [group for group in rows if group]


def read_bytes(inputs: VerifierInputs) -> tuple[int, int]:
    """Return what is read of all but routed experts, with an assistant, and of one expert, as stored."""
    spec = inputs.profile.record.spec
    read = spec.stored if spec.stored is not None and spec.stored.served else spec
    return read.nonexpert_bytes + assistant.weight_bytes(inputs), read.expert_bytes


def fetched_bytes(inputs: VerifierInputs) -> int:
    """Return what a function reads of one routed expert: as stored, or as quantised on request."""
    remote = inputs.profile.record.spec.remote
    return read_bytes(inputs)[1] if remote is None else remote.expert_bytes


def function_usd_per_s(inputs: VerifierInputs, layer: LayerPlan) -> float:
    """Price a second of one function: its memory, and its /tmp beyond the free part.

    The /tmp holds the experts of the fullest function.
    """
    side = inputs.catalog.function
    tmp_mb = math.ceil(max(map(len, layer.parts)) * fetched_bytes(inputs) / 2**20) + side.storage_spare_mb
    memory_usd = layer.memory_mb / 1024 * side.usd_per_gb_second[inputs.catalog.architecture]
    tmp_usd = max(0.0, tmp_mb - side.storage_free_mb) / 1024 * side.usd_per_storage_gb_second
    return inputs.price_factor * (memory_usd + tmp_usd)


def call(inputs: VerifierInputs, layer: LayerPlan, rows: Iterable[float]) -> tuple[float, float]:
    """Compute the seconds that one invocation is waited for, and what it costs.

    `rows` are those of each expert. The overhead of a live target, where the profile has it, goes before the catalog's. Only time in the
    function is billed; of an overhead with a spread, each of the equally likely values is rounded up by itself.
    """
    side, latency = inputs.catalog.function, inputs.profile.record.latency
    timing, measured, each = latency.remote_expert, latency.invocation, list(rows)
    vcpus = function_vcpus(inputs.catalog, layer.memory_mb)
    rate = measured.bytes_per_s if measured else side.network_bytes_per_s
    outside_s = inputs.call_factor * (fmean(measured.unbilled_s.tenths) if measured else side.warm_unbilled_s)
    inside_s = float(timing.elapsed_s(timing.work_s(each, vcpus).sum(), vcpus))
    inside_s += 2 * sum(each) * inputs.profile.record.spec.hidden_state_bytes * side.wire_expansion / rate
    overheads_s = measured.billed_s.tenths if measured else (side.warm_billed_s,)
    durations_s = [inputs.call_factor * overhead_s + inside_s for overhead_s in overheads_s]
    billed_ms = fmean(math.ceil(d * 1000 / side.billing_granularity_ms - 1e-6) * side.billing_granularity_ms for d in durations_s)
    usd = billed_ms / 1000 * function_usd_per_s(inputs, layer) + inputs.price_factor * side.usd_per_request + logged_usd(inputs)
    return outside_s + fmean(durations_s), usd


def waited_s(inputs: VerifierInputs, work_s: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the same seconds for many invocations, from the time of their experts and their rows."""
    side, measured = inputs.catalog.function, inputs.profile.record.latency.invocation
    rate = measured.bytes_per_s if measured else side.network_bytes_per_s
    outside_s = inputs.call_factor * (fmean(measured.unbilled_s.tenths) if measured else side.warm_unbilled_s)
    overhead_s = inputs.call_factor * fmean(measured.billed_s.tenths if measured else (side.warm_billed_s,))
    return outside_s + overhead_s + work_s + 2 * rows * inputs.profile.record.spec.hidden_state_bytes * side.wire_expansion / rate


def decode(inputs: VerifierInputs, layer: LayerPlan, routed: Layer, local_step_s: float, gpu_step_s: float) -> tuple[float, float]:
    """Compute the mean seconds of one token in this layer, and the mean cost of its invocations."""
    seen = hit_shares(inputs, layer, routed)
    once = {h: call(inputs, layer, [1.0] * h) for h in {h for _, _, hits in seen for h in hits} | ({1} if layer.remote else set())}
    seconds = usd = 0.0
    for (local, gpu, each), share in seen.items():
        if inputs.plan.invocations == "per-expert":
            waits, costs = [h * once[1][0] for h in each], [h * once[1][1] for h in each]
        else:
            waits, costs = [once[h][0] for h in each], [once[h][1] for h in each]
        seconds += share * max([local * local_step_s, gpu * gpu_step_s, *waits])
        usd += share * sum(costs)
    return seconds, usd


def start_s(inputs: VerifierInputs, layer: LayerPlan) -> float:
    """Compute the time from the call to the first result of a function that has to start."""
    side, measured = inputs.catalog.function, inputs.profile.record.latency.cold_start
    read_s = max(map(len, layer.parts)) * fetched_bytes(inputs) / side.load_bytes_per_s
    return (max(0.0, measured.total_s - measured.weights_s) if measured else side.cold_start_s) + read_s


def cold_wait_s(inputs: VerifierInputs, main: MainSpec, layers: Sequence[LayerPlan]) -> float:
    """Compute what a request waits that finds everything cold."""
    spec = inputs.profile.record.spec
    if (start := start_of(inputs.catalog, inputs.plan.workload, main)) is not None:
        local = sum(spec.experts_per_layer - len(layer.remote) for layer in layers)
        nonexpert_bytes, expert_bytes = read_bytes(inputs)
        return start.wait_s(nonexpert_bytes + local * expert_bytes)
    return functions_wait_s(inputs, layers)


def functions_wait_s(inputs: VerifierInputs, layers: Sequence[LayerPlan]) -> float:
    """Compute what a request waits that finds all expert functions cold."""
    return sum(start_s(inputs, layer) for layer in layers if layer.remote)


def start_reads_usd(inputs: VerifierInputs, layer: LayerPlan) -> float:
    """Price the reads of S3 of one function that has to start: its shard's head, and all its experts."""
    piece = inputs.catalog.function.bytes_per_read
    if not piece:
        return 0.0
    reads = 1 + max(map(len, layer.parts)) * math.ceil(fetched_bytes(inputs) / piece)
    return reads * inputs.catalog.storage.usd_per_1000_reads / 1000
